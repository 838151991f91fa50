"""What does each trick buy on this machine?

Ratios of time, slow over fast, every one the median of five interleaved repeats in one process (the
slowest three), both sides warmed up; and the share of the machine's own matmul rate that a whole
SFT step reaches, in float32 and in bfloat16, counted in tokens that are no padding, times 6, times
parameters. No claim: measured, on a machine that does nothing else.
"""
import random
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call

import meta
import train
from analyze import prefix_nll
from data import arithmetic, text
from data.tasks import Task, sizes_of, tensors
from lab import machine, optim
from lab.figure import COLOURS, INK, panels
from lab.score import held_out
from model import Config, Model, attention

CLAIM = "what each trick buys"
LENGTHS = (64, 256, 512, 1024)              # tokens of a curve
QUESTIONS = (1, 16, 64, 256)                # of a meta-gradient


class Pair(NamedTuple):
    """Two ways to the same thing."""
    name: str
    slow: object
    fast: object
    repeats: int = 5


# ------------------------------------------------------------------------------- the stop watch

def clock(f):
    """Seconds of f(), device included."""
    began = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

def median_seconds(f, repeats=9, warm_up=2):
    return float(np.median([clock(f) for _ in range(repeats)][warm_up:]))

def ratio(pair):
    """How many times longer `slow` takes than `fast`, interleaved, after a first one of each."""
    times = [(clock(pair.slow), clock(pair.fast)) for _ in range(1 + pair.repeats)][1:]
    ratios = [slow / fast for slow, fast in times]
    return {"median": round(float(np.median(ratios)), 2), "minimum": round(min(ratios), 2),
            "maximum": round(max(ratios), 2),
            "seconds": [round(float(np.median(side)), 5) for side in zip(*times)]}


# ------------------------------------------------------------------------------- the slow sides

def prefix_by_prefix(model, head, t, tail, size=64):
    """What `prefix_nll` replaces: every prefix run anew, `size` at a time -> (|t| + 1,)"""
    contexts = [head + t[:i] + tail[:1] for i in range(len(t) + 1)]
    means = []
    with torch.no_grad():
        for i in range(0, len(contexts), size):
            part = contexts[i:i + size]
            ids, targets = text.shifted(part, [tail[1:]] * len(part), model.head.weight.device)
            means.append(model.nll(ids, targets).sum(1) / (len(tail) - 1))
    return torch.cat(means).cpu().numpy()

def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)

def meta_by_dual(model, inner, tasks, order=2):
    """The meta-gradient of whole trajectories, every question's theta' side by side."""
    device = model.head.weight.device
    return gradients(model, meta.meta_loss(model, inner, meta.Meta(), tasks, device, order)[0])

def meta_by_loop(model, inner, tasks):
    """The same, one question after the other, theta' as weights."""
    total, sizes = None, sizes_of(tasks)
    for task in tasks:
        support, query = tensors([task], model.head.weight.device)
        theta = meta.theta_prime(model, inner, [(support.ids, support.inner)])
        h = functional_call(model, theta, (query.ids,), {"plain_from": inner.lowest})
        loss = model.score(h, query.targets).sum() / sizes.answer_tokens
        loss = loss + model.nll(support.ids, support.joint).sum() / sizes.joint_targets
        part = gradients(model, loss)
        total = part if total is None else [a + b for a, b in zip(total, part)]
    return total


# -------------------------------------------------------------------------------------- the pairs

def attention_pairs(device):
    for T in (64, 256, 1024):
        qkv = torch.randn(3, 4096 // T, 3, T, 32, device=device, requires_grad=True)

        def both_ways(plain, qkv=qkv):
            return torch.autograd.grad(attention(*qkv, plain=plain).sum(), qkv)
        yield Pair(f"attention, forward and backward, 4,096 tokens in rows of {T}: "
                   "written out / fused", lambda: both_ways(True), lambda: both_ways(False))

def training_pairs(model, device):
    rng, mix, size = random.Random(0), text.Mix(), train.Train.batch
    examples = [mix.sample(rng) for _ in range(size)]
    rows = sorted(map(text.encoded, examples), key=lambda row: len(row[0]))
    halves = [one_a_row(part, device) for part in (rows[:size // 2], rows[size // 2:])]
    pack = text.batch(examples, device)

    def learn_padded():
        for ids, targets in halves:
            gradients(model, model.nll(ids, targets).sum())

    def learn_packed(dtype=None):
        with machine.computing_in(model, dtype):
            nll = model.nll(pack.ids, pack.targets, pos=pack.pos, mask=pack.mask())
            gradients(model, nll.sum())
    name = "SFT forward and backward"
    yield Pair(f"{name}: two chunks, sorted and padded / packed", learn_padded, learn_packed)
    yield Pair(f"{name}: float32 / bfloat16", learn_packed, lambda: learn_packed(torch.bfloat16))

    hidden = list(model.blocks.parameters())
    for p in hidden:
        p.grad = torch.randn_like(p)
    theirs = torch.optim.Muon(hidden, 0.0, weight_decay=0.0)
    ours = optim.Muon(hidden, 0.0, dtype=torch.bfloat16)
    yield Pair("Muon's step in bfloat16: torch.optim.Muon / ours", theirs.step, ours.step)
    model.zero_grad()

def one_a_row(rows, device):
    """What packing replaces: a sample a row, padded -> (ids, targets)"""
    ids, targets = zip(*rows)
    return text.padded(ids, text.PAD, device), text.padded(targets, text.IGNORE, device)

def generation_pairs(model, device, rng):
    prompts = [digits(rng, 16) for _ in range(64)]

    def uncached():
        x = torch.tensor(prompts, device=device)
        with torch.no_grad():
            for _ in range(48):
                x = torch.cat((x, model.logits(model(x)[:, -1:]).argmax(-1)), 1)

    yield Pair("64 prompts, 16 + 48 tokens: uncached / cached generation", uncached,
               lambda: model.generate(prompts, -1, 48))

def digits(rng, n):
    return [rng.randrange(10) for _ in range(n)]

def curve_pairs(model, rng):
    tail = [text.END_THINK, *digits(rng, 2), text.EOS]
    for T in LENGTHS:
        head, t = [text.BOS, *digits(rng, 12), text.THINK], digits(rng, T)
        yield Pair(f"curve of {T} tokens: 64 prefixes a batch / one pass",
                   lambda: prefix_by_prefix(model, head, t, tail),
                   lambda: prefix_nll(model, [head], [t], [tail]), 3 if T > 512 else 5)

def meta_pairs(model, device, rng):
    c = meta.Meta()
    inner = meta.inner_of(model, c, device)
    questions = held_out("expr", 4, 64) * 4
    every = [Task(q, [arithmetic.trajectory(q, rng)]) for q in questions]
    for n in QUESTIONS:
        tasks, repeats = every[:n], 3 if n > 64 else 5
        what = f"second-order gradient, {n} question{'s' * (n > 1)}"
        yield Pair(f"{what}: one after the other / dual form",
                   lambda: meta_by_loop(model, inner, tasks),
                   lambda: meta_by_dual(model, inner, tasks), repeats)
    tasks = every[:64]
    support, query = tensors(tasks, device)

    def sft():
        loss = model.nll(support.ids, support.joint).sum()
        gradients(model, loss + model.nll(query.ids, query.targets).sum())
    for order, name in ((2, "second"), (1, "first")):
        yield Pair(f"64 questions: {name}-order meta-gradient / SFT on the same tokens",
                   lambda: meta_by_dual(model, inner, tasks, order), sft)


# ------------------------------------------------------------------------------------------ rates

def sft_rate(dtype, device):
    """A whole SFT step of the default run, optimisers included -> tokens a second that are no
    padding, parameters."""
    c, run = train.Train(), range(45)
    model = Model(Config(text.VOCAB, c.layers, c.heads, c.width)).to(device)
    opts = optim.optimisers(model, c.lr, c.lr_adam, dtype)
    steps = train.sft(c, model, train.mix_of(c), run)
    rates = []

    def step():
        rates.append(next(steps)["tokens"])
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
    with machine.computing_in(model, dtype):
        seconds = [clock(step) for _ in run]
    rate = np.median([tokens / s for tokens, s in zip(rates[5:], seconds[5:])])
    return float(rate), sum(p.numel() for p in model.parameters())

def rates_of(device):
    """{what: how fast}"""
    n, rates = 8192 if device.type == "cuda" else 2048, {}
    for dtype in (None, torch.bfloat16):
        name = "bfloat16" if dtype else "float32"
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        with machine.training_precision(device):
            matmul = 2 * n**3 / median_seconds(lambda: a @ b)
            tokens, parameters = sft_rate(dtype, device)
        rates[f"matmul {n} x {n}, {name}, GFLOP/s"] = round(matmul / 1e9, 1)
        rates[f"SFT step, {name}, tokens a second"] = round(tokens)
        rates[f"SFT step, {name}, share of that rate"] = round(tokens * 6 * parameters / matmul, 3)
    return rates


# ------------------------------------------------------------------------- measure, judge, draw

def measure(c, model):
    device, rng = model.head.weight.device, random.Random(c.seed)
    pairs = [attention_pairs(device), training_pairs(model, device),
             generation_pairs(model, device, rng), curve_pairs(model, rng),
             meta_pairs(model, device, rng)]
    return {"ratios": {pair.name: ratio(pair) for group in pairs for pair in group},
            "rates": rates_of(device), "device": machine.device_name(device),
            "torch": torch.__version__}

def judge(raw):
    return "measured", raw

def show(numbers):
    for name, row in numbers["ratios"].items():
        print(f"{row['median']:7.2f} [{row['minimum']:.2f}, {row['maximum']:.2f}]  {name}")
    for name, rate in numbers["rates"].items():
        print(f"{rate:9,}  {name}")

def draw(numbers):
    ratios = numbers["ratios"]
    fig, ((ax,),) = panels(1, 1, width=10, heights=[0.3 * len(ratios) + 1])
    for i, row in enumerate(ratios.values()):
        colour = COLOURS["correct" if row["median"] > 1 else "wrong"]
        ax.barh(i, row["median"] - 1, left=1, color=colour, height=0.7)
        ax.plot((row["minimum"], row["maximum"]), (i, i), color=INK, lw=0.8)
        ax.text(max(row["maximum"], 1), i, f"  {row['median']:.1f}", va="center", fontsize=8)
    largest = 3 * max(row["maximum"] for row in ratios.values())
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if t < largest]
    ax.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
    ax.set(xscale="log", ylim=(len(ratios) - 0.4, -0.6), xlim=(0.2, largest),
           xlabel=f"slow time / fast time ({numbers['device']}, torch {numbers['torch']})")
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.axvline(1, color=INK, lw=0.8)
    return fig
