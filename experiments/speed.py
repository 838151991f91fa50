"""What does each trick buy on this machine?

Two ways to the same numbers are timed in turn, after one run of each that does not count: how many
times longer the slow way takes, the median of several repeats. Then whole steps of training and
meta-training, the share of the machine's own matrix product that training reaches, counted as 6
operations per parameter and token, and the most memory that the process had so far. No claim:
measured, on a machine that should do nothing else.
"""
import resource
import time

import numpy as np
import torch
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

import meta
import train
from analyze import direct_logp, prefix_logp
from data import arithmetic, tasks, text
from experiments.figure import INK, bars, panels
from lab.run import device_name, move
from model import Config, Model, attention

CLAIM = "what each trick buys"
TRAINS = True                       # it makes a model of its own
REPEATS = 5
LENGTHS = (64, 512, 2048)           # tokens of a row in attention, 4,096 in all
CURVE = 256                         # tokens of a trajectory


def seconds(*ways):
    """Runs functions in turn, again and again -> how long each took (REPEATS, ways)."""
    def clock(f):
        began = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began
    return np.array([[clock(f) for f in ways] for _ in range(1 + REPEATS)][1:])

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
    """The same in dual form, all trajectories at once."""
    hook = meta.adapt(model, inner, tasks.support(batch, model.device)).hook
    query = tasks.query(batch, model.device)
    loss = model.score(model(**query.inputs(), hook=hook), query.targets).sum()
    return grad(loss, list(model.parameters()))

def uncached(model, rows, n):
    """Generates n tokens, and reads everything again for each."""
    for _ in range(n):
        rows = [row + new for row, new in zip(rows, model.generate(rows, -1, 1))]
    return rows

def pairs(model, inner):
    """Yields (name, slow way, fast way)."""
    for T in LENGTHS:
        qkv = torch.randn(3, 4096 // T, 3, T, 32, device=model.device, requires_grad=True)
        yield (f"{T} tokens: attention in full / fused",
               lambda: grad(attention(*qkv, twice=True).sum(), qkv),
               lambda: grad(scaled_dot_product_attention(*qkv, is_causal=True).sum(), qkv))
    batch = tasks.tasks_at(0, meta.Meta())
    yield (f"{len(batch)} meta-gradients: in a loop / dual form",
           lambda: by_loop(model, inner, batch), lambda: by_dual(model, inner, batch))
    q, thinks = arithmetic.parse("(3+5)*2-7"), ["7" * n for n in range(CURVE + 1)]
    parts = [thinks[i:i + 64] for i in range(0, len(thinks), 64)]
    yield (f"curve of {CURVE} tokens: prefixes / one pass",
           lambda: [direct_logp(model, [q] * len(part), thinks=part) for part in parts],
           lambda: prefix_logp(model, [q], thinks[-1:]))
    rows = [text.prompt(q.text)] * 64
    yield ("48 tokens: without a cache / with one",
           lambda: uncached(model, rows, 48), lambda: model.generate(rows, -1, 48))

def steps(model, inner, dtype):
    """Times whole steps, their optimisers at a rate of 0, so that every repeat is alike."""
    model.dtype, c = dtype, train.Train()
    opts, mix = train.optimisers(model, c), train.mix_of(c)
    matrix = torch.randn(2048, 2048, device=model.device, dtype=dtype)
    tokens = train.sft(c, model, mix, 0)["tokens"]

    def sft_step():
        train.sft(c, model, mix, 0)
        move(opts, 0.0)

    def meta_step():
        meta.meta_loss(model, inner, tasks.tasks_at(0, meta.Meta()))[0].backward()
        move(opts, 0.0)
    product, sft, whole = np.median(seconds(lambda: matrix @ matrix, sft_step, meta_step), 0)
    work = 6 * tokens * sum(p.numel() for p in model.parameters())
    rate = 2 * len(matrix)**3 / product
    return {"matrix product, GFLOP/s": rate / 1e9, "SFT step, s": sft, "meta-step, s": whole,
            "SFT step, share of that rate": work / sft / rate,
            "memory, MiB (KiB on a Mac)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

def measure(c, runs):
    model, ratios = Model(Config(text.VOCAB)).to(runs.device), {}
    inner = meta.inner_of(model, meta.Meta())
    numbers = {str(d)[6:]: steps(model, inner, d) for d in (torch.bfloat16, torch.float32)}
    for name, slow, fast in pairs(model, inner):
        times = seconds(slow, fast)
        ratio = times[:, 0] / times[:, 1]
        ratios[name] = {"mean": [np.median(ratio), ratio.min(), ratio.max()],
                        "seconds": np.median(times, 0).tolist()}
    return {"ratios": ratios, "steps": numbers, "device": device_name(model.device)}

def judge(raw):
    return {"speed": "measured"}, raw

def draw(numbers):
    fig, ((ax,),) = panels(1, 1, width=7, heights=[3])
    ticks = (1, 2, 5, 10, 20, 50, 100)
    bars(ax, numbers["ratios"], xscale="log", xticks=ticks, xticklabels=ticks,
         title=f"Time of the slow way / of the fast one ({numbers['device']})")
    ax.axvline(1, color=INK, lw=0.8)
    return fig
