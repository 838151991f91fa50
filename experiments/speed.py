"""What does each trick buy on this machine?

Two ways to the same numbers are timed in turn, after one run of each that does not count: how many
times longer the slow way takes, the median of several repeats. Then whole steps of training and
meta-training in float32 and in bfloat16, and the share of the machine's own matrix product that
training reaches, counted as 6 operations per parameter and token. The memory is the most that the
process ever had. No claim: measured, on a machine that should do nothing else.
"""
import random
import resource
import sys
import time

import numpy as np
import torch
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

import meta
import train
from analyze import direct_logp, prefix_logp
from data import tasks, text
from experiments.figure import INK, bars, panels
from lab.run import device_name, move
from lab.score import held_out
from model import Config, Model, attention

CLAIM = "what each trick buys"
TRAINS = True                       # it makes a model of its own
REPEATS = 5
LENGTHS = (64, 512, 2048)           # tokens of a row in attention
TASKS = (1, 16)                     # trajectories of a meta-gradient
CURVES = (64, 256)                  # tokens of a trajectory
MATRIX = 2048                       # rows and columns


def seconds(*ways):
    """Runs functions in turn, again and again -> how long each took (REPEATS, ways)."""
    rows = []
    for _ in range(1 + REPEATS):
        began = [time.perf_counter()]
        for f in ways:
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began.append(time.perf_counter())
        rows.append(np.diff(began))
    return np.array(rows[1:])

def by_loop(model, inner, batch):
    """The meta-gradient, one trajectory after the other, theta' as weights."""
    loss = 0
    for task in batch:
        params = meta.theta_prime(model, inner, tasks.support([task], model.device))
        query = tasks.query([task], model.device)
        h = functional_call(model, params, (), query.inputs())
        loss = loss + model.score(h, query.targets).sum()
    return grad(loss, list(model.parameters()))

def by_dual(model, inner, batch):
    """The meta-gradient in dual form, all trajectories at once."""
    hook = meta.adapt(model, inner, tasks.support(batch, model.device)).hook
    query = tasks.query(batch, model.device)
    loss = model.score(model(**query.inputs(), hook=hook), query.targets).sum()
    return grad(loss, list(model.parameters()))

def by_prefix(model, q, think):
    """The answer after every prefix, each run anew, as in the official notebook -> (|t| + 1, 10)"""
    thinks = [think[:i] for i in range(len(think) + 1)]
    parts = [thinks[i:i + 64] for i in range(0, len(thinks), 64)]
    return torch.cat([direct_logp(model, [q] * len(part), thinks=part) for part in parts])

def uncached(model, rows, n):
    """Generates n tokens, reading everything again for each."""
    for _ in range(n):
        rows = [row + new for row, new in zip(rows, model.generate(rows, text.PAD, 1))]
    return rows

def pairs(model, inner):
    """Yields (name, slow way, fast way)."""
    (q,), rng = held_out("expr", 6, 1), random.Random(0)
    for T in LENGTHS:
        qkv = torch.randn(3, 4096 // T, 3, T, 32, device=model.device, requires_grad=True)
        yield (f"attention in rows of {T}:\nwritten out / fused",
               lambda: grad(attention(*qkv, twice=True).sum(), qkv),
               lambda: grad(scaled_dot_product_attention(*qkv, is_causal=True).sum(), qkv))
    for n in TASKS:
        batch = tasks.tasks_at(0, meta.Meta(batch=n))
        yield (f"meta-gradient, trajectories: {n},\none by one / dual form",
               lambda: by_loop(model, inner, batch), lambda: by_dual(model, inner, batch))
    for T in CURVES:
        think = "".join(rng.choices("0123456789", k=T))
        yield (f"loss along {T} tokens:\nevery prefix / one pass",
               lambda: by_prefix(model, q, think), lambda: prefix_logp(model, [q], [think]))
    rows = [text.prompt(q.text)] * 64
    yield ("64 outputs of 48 tokens:\nwithout / with a cache",
           lambda: uncached(model, rows, 48), lambda: model.generate(rows, text.PAD, 48))

def steps(model, inner, dtype):
    """Times whole steps, their optimisers at a rate of 0, so that every repeat is alike."""
    model.dtype, c, outer = dtype, train.Train(), meta.Meta()
    opts, mix = train.optimisers(model, c), train.mix_of(c)
    matrix = torch.randn(MATRIX, MATRIX, device=model.device, dtype=dtype)

    def sft_step():
        train.sft(c, model, mix, 0)
        move(opts, 0.0)

    def meta_step():
        meta.meta_loss(model, inner, tasks.tasks_at(0, outer))[0].backward()
        move(opts, 0.0)
    product, sft, whole = np.median(seconds(lambda: matrix @ matrix, sft_step, meta_step), 0)
    tokens = sum(len(row.ids) for row in text.batch_at(0, c.batch, mix, c.seed))
    work = 6 * tokens * sum(p.numel() for p in model.parameters())
    rate, model.dtype = 2 * MATRIX**3 / product, None
    return {"matrix product, GFLOP/s": rate / 1e9, "SFT step, s": sft, "meta-step, s": whole,
            "SFT step, share of that rate": work / sft / rate}

def measure(c, runs):
    model, found = Model(Config(text.VOCAB)).to(runs.device), {}
    inner = meta.inner_of(model, meta.Meta())
    rows = {str(dtype)[6:]: steps(model, inner, dtype) for dtype in (torch.float32, torch.bfloat16)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1)
    for name, slow, fast in pairs(model, inner):
        times = seconds(slow, fast)
        ratio = times[:, 0] / times[:, 1]
        found[name] = {"mean": [np.median(ratio), ratio.min(), ratio.max()],
                       "seconds": np.median(times, 0).tolist()}
    return {"ratios": found, "steps": rows, "device": device_name(model.device),
            "torch": torch.__version__}

def judge(raw):
    return {"speed": "measured"}, raw

def show(numbers):
    return [f"{dtype}: {what} {value:.3g}" for dtype, row in numbers["steps"].items()
            for what, value in row.items()]

def draw(numbers):
    fig, ((ax,),) = panels(1, 1, width=7, heights=[3.6])
    bars(ax, numbers["ratios"], xscale="log", xlim=(0.5, None), xlabel="times as long",
         title=f"How much longer the slow way takes ({numbers['device']})")
    ax.axvline(1, color=INK, lw=0.8)
    return fig
