"""What does each trick buy on this machine, and how much of the machine is used?

Whole steps of training and meta-training are timed, and the share of the machine's own matrix
product that training reaches, counted as 6 operations per parameter and token. Then two ways to the
same numbers in turn: how many times longer the slow way takes. Times are medians of several repeats
after one that does not count, or a single one where it takes seconds; memory is the most in use.
No claim: measured, on a machine that should do nothing else.
"""
import json
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.autograd import grad
from torch.func import functional_call

import meta
import train
from analyze import direct_logp, prefix_logp
from data import arithmetic, tasks, text
from experiments.figure import INK, bars, panels
from lab.run import device_name, move
from lab.score import exact_match
from model import Attention, Config, Model, backend_of, weights

CLAIM = "what each trick buys"
TRAINS, SEEDS = True, 0             # it makes a model of its own
REPEATS, LONG = 5, 4.0              # repeats of what takes fewer seconds in all
LENGTHS = (64, 512, 2048)           # tokens of a trajectory that attention reads
# Meta-gradients, rows of generation, tokens of a curve, tokens that attention reads.
SIZES = {"cpu": (12, 64, (64,), 2048), "cuda": (256, 512, (512, 4096), 16384)}


def used(cuda: bool) -> float:
    """The most memory in use since the last call, MiB; on a CPU only Linux tells."""
    if cuda:
        most = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return most
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return 0.0
    most = int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    reset.write_text("5")
    return most

def clock(cuda: bool, *ways):
    """Runs functions in turn, again and again -> seconds (repeats, ways), MiB that each took."""
    rows, start = [], time.perf_counter()
    while not rows or len(rows) <= REPEATS and time.perf_counter() - start < LONG * len(ways):
        rows.append([])
        for f in ways:
            _, before, began = used(cuda), used(cuda), time.perf_counter()
            f()
            _ = cuda and torch.cuda.synchronize()
            rows[-1].append((time.perf_counter() - began, used(cuda) - before))
    times, memory = np.moveaxis(np.array(rows[1:] or rows), 2, 0)
    return times, memory.max(0).tolist()

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

def pairs(model, inner, size):
    """Yields (name, slow way, fast way)."""
    questions, rows, curves, tokens = size
    q, batch = arithmetic.parse("(3+5)*2-7"), tasks.tasks_at(0, meta.Meta(batch=questions))
    yield (f"{questions} meta-gradients: in a loop / dual form",
           lambda: by_loop(model, inner, batch), lambda: by_dual(model, inner, batch))
    prompts = [text.prompt(q.text)] * rows
    yield (f"48 tokens in {rows} rows: without a cache / with one",
           lambda: uncached(model, prompts, 48), lambda: model.generate(prompts, -1, 48))
    for T in curves:
        thinks, n = ["7" * i for i in range(T + 1)], 2**16 // T
        parts = [thinks[i:i + n] for i in range(0, T + 1, n)]
        yield (f"curve of {T} tokens: prefixes / one pass",
               lambda: [direct_logp(model, [q] * len(part), thinks=part) for part in parts],
               lambda: prefix_logp(model, [q], thinks[-1:]))
    model.dtype = torch.bfloat16 if model.device.type == "cuda" else None
    for T in LENGTHS:
        long = [tasks.Task(q, ["7" * T], [q])] * max(1, tokens // T)

        def with_attention(f):
            with patch("model.attention", f):
                by_dual(model, inner, long)
        yield (f"meta-gradients of {T} tokens: attention written out / fused forward",
               lambda: with_attention(lambda q, k, v, bias=None: weights(q, k, bias) @ v),
               lambda: with_attention(Attention.apply))

def steps(preset, dtype, device) -> dict:
    """Times whole steps, their optimisers at a rate of 0, so that every repeat is alike."""
    c, cuda = train.configure(train.Train(preset=preset), {"preset": preset}), device.type == "cuda"
    model, n = train.new_model(c, device), 8192 if cuda else 1024
    model.dtype, opts, mix = dtype, train.optimisers(model, c), train.mix_of(c)
    m = meta.Meta(batch=256 if preset == "gpu" else 12)
    inner, batch = meta.inner_of(model, m), tasks.tasks_at(0, m)
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    drawn = train.pieces(c, mix, train.PIECE[device.type], 0)
    tokens = sum(int((batch.ids != text.PAD).sum()) for batch in drawn)

    def sft_step():
        train.sft(c, model, drawn, 0)
        move(opts, 0.0)

    def meta_step():
        meta.meta_loss(model, inner, batch)[0].backward()
        move(opts, 0.0)
    row = {}
    for name, f in (("matrix product", lambda: matrix @ matrix), ("SFT step", sft_step),
                    ("meta-step", meta_step), ("its samples", lambda: tasks.tasks_at(0, m)),
                    ("SFT samples", lambda: train.pieces(c, mix, 256, 0)),
                    ("100 answers", lambda: exact_match(model, {"expr": (6,)}, 100))):
        times, (row[f"{name}, MiB"],) = clock(cuda, f)
        row[f"{name}, s"] = float(np.median(times))
    rate = 2 * n**3 / row["matrix product, s"]
    work = 6 * tokens * sum(p.numel() for p in model.parameters())
    card = torch.cuda.get_device_capability() if cuda else None
    return row | {
        "matrix product, GFLOP/s": rate / 1e9,
        "SFT step, share of that": work / row["SFT step, s"] / rate,
        f"all {c.steps} SFT steps, s": c.steps * row["SFT step, s"],
        f"all {m.steps} meta-steps, s": m.steps * row["meta-step, s"],
        "attention, masked and causal": [backend_of(dtype, mask, not mask, card) if cuda else "cpu"
                                         for mask in (True, False)]}

def compared(cuda, slow, fast) -> dict:
    times, memory = clock(cuda, slow, fast)
    ratio = times[:, 0] / times[:, 1]
    return {"mean": [np.median(ratio), ratio.min(), ratio.max()],
            "seconds": np.median(times, 0).tolist(), "MiB": memory}

def measure(c, runs):
    """Yields all rows so far, after each. What a card has no memory for is left out."""
    model, cuda = Model(Config(text.VOCAB)).to(runs.device), runs.device.type == "cuda"
    raw = {"ratios": {}, "steps": {}, "device": device_name(runs.device)}

    def rows():
        for preset in ("tiny", "gpu") if cuda else ("tiny",):
            for d in (torch.bfloat16, torch.float32):
                yield "steps", f"{preset}, {str(d)[6:]}", lambda: steps(preset, d, runs.device)
        for name, *ways in pairs(model, meta.inner_of(model, meta.Meta()), SIZES[runs.device.type]):
            yield "ratios", name, lambda: compared(cuda, *ways)
    for kind, name, row in rows():
        try:
            raw[kind][name] = row()
        except torch.OutOfMemoryError as e:
            print(name, str(e).splitlines()[0])
            continue
        print(name, json.dumps(raw[kind][name]))
        yield raw

def judge(raw):
    return {"speed": "measured"}, raw

def show(numbers):
    lines = []
    for name, row in numbers["steps"].items():
        lines.append(f"{name}: {row['SFT step, s']:.3f} s per SFT step, "
                     f"{row['SFT step, share of that']:.0%} of what a matrix product reaches; "
                     f"{row['meta-step, s']:.3f} s per meta-step")
    for name, row in numbers["ratios"].items():
        lines.append("{}: {:.1f} times as long; {:.0f} and {:.0f} MiB".format(
            name, row["mean"][0], *row["MiB"]))
    return lines

def draw(numbers):
    fig, ax = panels(1, 7, 3)
    ticks = (1, 2, 5, 10, 20, 50, 100)
    bars(ax, numbers["ratios"], xscale="log", xticks=ticks, xticklabels=ticks,
         title=f"Time of the slow way / of the fast one ({numbers['device']})")
    ax.axvline(1, color=INK, lw=0.8)
    return fig
