"""Every figure of the project as a small experiment with a verdict. Without arguments: train what is missing, draw all, report.

    python analyze.py                            # the tour
    python analyze.py curve --questions=400      # one experiment, here the answer's loss along the trajectory
"""
import copy
import ctypes
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data import arithmetic
from data.flags import fail, flags

TOUR = ("curve", "explicit", "patch", "gradient", "landscape", "tokens", "delimiter", "prune")            # what runs unasked, on a trained model
TRAINING = ("compare", "methods", "length", "generalize", "support", "race")        # these train what they need
NAMES = (*TOUR, "order", "speed", *TRAINING, "report")


@dataclass
class Analyze:
    """Experiments on a trained model; each writes a figure, its data and a verdict to --out."""
    sft: str = "out/sft"            # the run of train.py to look at, trained first if it is missing
    meta: str = "out/meta"          # the run of meta.py to look at, trained first if it is missing
    out: str = "out"                # figures go to OUT/figures, the report to OUT/report.md
    questions: int = 200            # held-out questions a cell
    grid: int = 31                  # landscape: points a side, odd so that theta is one of them
    uncut: str = "out/uncut"        # curve: a run trained with --cut=0, looked at too if it is there
    examples: int = 1               # single trajectories drawn under the averages
    seed: int = 0                   # of trajectories and corruptions
    seeds: int = 5                  # runs an arm, where an experiment trains
    jobs: int = 0                   # of those at a time; 0: one a CPU core, each with one thread; on CUDA 1
    arm: tuple = ()                 # compare: an arm's flags; give it once an arm
    cells: str = ""                 # held-out questions, such as "expr:3,4 sum:5"; empty: what an experiment says
    device: str = "auto"            # cpu, cuda, or auto
    threads: int = 0                # CPU threads, 0: as many as torch chooses

def cells_of(spec):
    """'expr:3,4 sum:5' -> [(domain, operands)]."""
    out = []
    for part in spec.split():
        domain, _, counts = part.partition(":")
        for k in counts.split(","):
            if not any(k == str(n) for n in (*arithmetic.TRAINED.get(domain, ()), *arithmetic.OOD.get(domain, ()))):
                fail(f"--cells={spec}: {part!r} is not a domain and its operand counts, such as expr:3,4")
            out.append((domain, int(k)))
    if not out:
        fail("--cells is empty: name some, such as 'expr:3,4 sum:5'")
    return out

def command_line():
    """-> (names of experiments, an Analyze)."""
    names = [a for a in sys.argv[1:] if not a.startswith("-")]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("analyze.py runs in one process, without torchrun")
    for n in names:
        if n not in NAMES:
            fail(f"there is no experiment {n!r}: choose from {', '.join(NAMES)}")
    if len({*names}) < len(names):
        fail("an experiment is named twice")
    c, _ = flags(Analyze, [a for a in sys.argv[1:] if a.startswith("-")])
    if c.cells:
        cells_of(c.cells)
    if c.grid % 2 == 0:
        fail(f"--grid={c.grid} is even, and an even grid does not hold theta itself: take {c.grid + 1}")
    if ("compare" in names) != bool(c.arm) or len(c.arm) == 1:
        fail('compare needs two arms or more, and nothing else takes any: --arm="--steps=300" --arm="--steps=300 --style=short"')
    return names, c

if __name__ == "__main__":
    COMMAND = command_line()                                                # before the seconds that torch takes to import

import matplotlib                                                           # noqa: E402
import numpy as np                                                          # noqa: E402
import torch                                                                # noqa: E402
from tqdm import tqdm                                                       # noqa: E402

import meta                                                                 # noqa: E402
import train                                                                # noqa: E402
from data import text                                                       # noqa: E402
from model import Config, Model, attention                                  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt                                             # noqa: E402 (the backend must be chosen first)


# -------------------------------------------------------------------------------------------- L_hat, the implicit inner loop (Eq. 4)

@torch.no_grad()
def prefix_nll(model, heads, trajectories, tails, width=128):
    """L_hat[i] of the paper's Algorithm 3 for i = 0..|t|, of many sequences, in one pass.

    heads: ids up to <think>; trajectories: ids of t; tails: ids of `</think> a <eos>`. -> list of float arrays (|t| + 1,), entry i the
    mean NLL (nats) of `a <eos>` when the tail follows the first i tokens of t.

    One copy of the tail stands behind every prefix as a branch: branch i sees the prefix up to i and itself, at positions i+1, i+2,
    ... The prefix is computed once, into the cache; branches follow `width` at a time, so that none pays for the others' columns. (512 tokens: 37
    times as fast as batches of prefixes, on a CPU.)"""
    device, B = model.head.weight.device, len(heads)
    N, P = max(map(len, tails)) - 1, max(len(h) + len(t) for h, t in zip(heads, trajectories))
    pad = lambda rows, size, fill: torch.tensor([r + [fill] * (size - len(r)) for r in rows], device=device)
    prefix, branch = pad([h + t for h, t in zip(heads, trajectories)], P, text.PAD), pad([t[:-1] for t in tails], N, text.PAD)
    target = pad([t[1:] for t in tails], N, text.IGNORE)
    head = torch.tensor([len(h) for h in heads], device=device)[:, None]
    J = max(map(len, trajectories)) + 1
    W = min(width, J) * N
    cache, at = model.new_cache(B, W + P), torch.arange(P, device=device)   # slots: first the branches', then the prefix's
    unseen = torch.zeros(P, W, dtype=torch.bool, device=device)
    model(prefix, mask=torch.cat((unseen, at[:, None] >= at), 1)[None, None], cache=cache, slot=slice(W, W + P))
    rows = []
    for j in range(0, J, width):
        i = torch.arange(j, min(j + width, J), device=device)
        b, n = i.repeat_interleave(N), torch.arange(N, device=device).repeat(len(i))         # branch and place of every token
        end = head + b                                                      # (B, w * N): length of the prefix of a token's branch
        own = torch.zeros(len(b), W, dtype=torch.bool, device=device)
        own[:, :len(b)] = (b[:, None] == b) & (n[:, None] >= n)
        past = at[:int(head.max()) + int(i[-1])] < end[..., None]           # nobody in this chunk looks further
        nll = model.nll(branch.repeat(1, len(i)), target.repeat(1, len(i)), pos=end + n, cache=cache,
                        mask=torch.cat((own.expand(B, -1, -1), past), -1)[:, None], slot=slice(0, len(b)))
        rows.append(nll.view(B, len(i), N).sum(-1))
    curves = torch.cat(rows, 1) / (target >= 0).sum(1, keepdim=True)
    return [c[:len(t) + 1].cpu().numpy() for c, t in zip(curves, trajectories)]


# ---------------------------------------------------------------------------------------------------------------- small statistics

def bootstrap(values, statistic=np.mean, n=2000, seed=0):
    """(estimate, low, high): a statistic over the first axis and its 95 % percentile interval, resampling that axis."""
    v, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    draws = np.array([statistic(v[rng.integers(0, len(v), len(v))], axis=0) for _ in range(n)])
    return statistic(v, axis=0), np.quantile(draws, 0.025, axis=0), np.quantile(draws, 0.975, axis=0)

def interval(values, statistic=np.mean):
    """The same for a scalar, as a list for JSON."""
    return [round(float(x), 4) for x in bootstrap(values, statistic)]

def crossed(v):
    """[mean, low, high] of (seeds, questions) values: the bootstrap resamples both."""
    v, rng = np.asarray(v, dtype=float), np.random.default_rng(0)
    draws = [v[np.ix_(rng.integers(0, len(v), len(v)), rng.integers(0, v.shape[1], v.shape[1]))].mean() for _ in range(1000)]
    return [round(float(x), 4) for x in (v.mean(), *np.quantile(draws, (0.025, 0.975)))]

def decide(margins, statistic={}):
    """Margins {name: a number a question or a run, above 0 where the claim holds} -> (verdict, {name: interval}).

    Supported if every mean (or other statistic) has its 95 % interval above 0, refuted if one lies below 0, else inconclusive.
    Two axes are seeds and questions, and both are resampled."""
    gaps = {n: crossed(m) if np.ndim(m) == 2 else interval(m, statistic.get(n, np.mean)) for n, m in margins.items()}
    return "supported" if all(g[1] > 0 for g in gaps.values()) else "refuted" if any(g[2] < 0 for g in gaps.values()) else "inconclusive", gaps

def spearman(y):
    """Rank correlation of a sequence with its own index, ties averaged; 0 where it is constant."""
    rank = lambda v: np.array([(np.sum(v < x) + np.sum(v <= x) - 1) / 2 for x in v])
    a, b = rank(np.arange(len(y))), rank(np.round(y, 6))
    return float(np.corrcoef(a, b)[0, 1]) if b.std() else 0.0


# ------------------------------------------------------------------------------------------------------------------------ figures

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#F0E442")      # Okabe and Ito: colour-blind safe
COLOURS = {"correct": "#0072B2", "wrong": "#D55E00", "filler": "#999999", "other": "#E69F00", "weights": "#009E73", "theta": "#CC79A7"}
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150, "savefig.dpi": 150,
                     "axes.titlesize": 10, "legend.frameon": False, "lines.linewidth": 1.6, "figure.constrained_layout.use": True})
GRID = np.linspace(0, 1, 41)                                                # fractions of a trajectory

def on_grid(curves):
    """Curves of any lengths -> (N, 41), linear between their points, x = fraction of the trajectory."""
    return np.stack([np.interp(GRID, np.linspace(0, 1, len(c)), c) for c in curves])

def band(ax, curves, colour, label, style="-"):
    mean, low, high = bootstrap(on_grid(curves), n=500)
    ax.plot(GRID, mean, style, color=colour, label=label)
    ax.fill_between(GRID, low, high, color=colour, alpha=0.2, linewidth=0)

def whisker(ax, x, ci, colour, **kw):
    """A bar with its interval, ci = [mean, low, high]."""
    ax.bar(x, ci[0], kw.pop("width", 0.7), color=colour, **kw)
    ax.errorbar(x, ci[0], [[ci[0] - ci[1]], [ci[2] - ci[0]]], fmt="none", ecolor="#333333", elinewidth=0.8)

def whiskers(ax, x, rows, colour, **kw):
    """Joined dots at x, each the mean of a row of numbers with its interval."""
    mean, low, high = zip(*(bootstrap(v, n=500) for v in rows))
    ax.errorbar(x, mean, [np.subtract(mean, low), np.subtract(high, mean)], fmt="o-", color=colour, **{"markersize": 3} | kw)

def draw_path(ax, sheet, sides, at, size=1.0):
    """L_q over a plane, (b, a) values at sides = (a, b), and a path at (points, 2) in it: from the plus to the star. -> the shading."""
    high = max(float(np.quantile(sheet, 0.95)), 1e-3)
    shade = ax.contourf(*sides, np.minimum(sheet, high), np.linspace(0, high, 15), cmap="cividis")
    ax.plot(*at.T, "-", color="white", linewidth=2.4)
    ax.plot(*at.T, "o-", color=COLOURS["wrong"], markersize=3.5, linewidth=1)
    ax.plot(*at[0], "P", color="white", markersize=9 * size, markeredgecolor="black")
    ax.plot(*at[-1], "*", color="white", markersize=13 * size, markeredgecolor="black")
    return shade

def write_under(ax, think, curve, colour, label=None, style="o-"):
    """One trajectory: L_hat after every token, the tokens under the axis, a line at every step's end."""
    ax.plot(range(len(curve)), curve, style, color=colour, markersize=2.5, linewidth=1, label=label)
    ax.set_xticks(range(len(think) + 1), ["·", *think], fontsize=7 if len(think) < 26 else 6, family="monospace")
    ax.tick_params(axis="x", length=0)
    for i, c in enumerate(think):
        if c == ";":
            ax.axvline(i + 1, color="#cccccc", linewidth=0.8, zorder=0)


# -------------------------------------------------------------------------------------------------------------------- experiments

def row_loss(model, ids, targets, **kw):
    """Mean NLL (nats) of every row's targets -> (B,)."""
    return model.nll(ids, targets, **kw).sum(1) / (targets >= 0).sum(1)

def tail_of(q, answer=None):
    return [text.END_THINK, *text.encode(q.answer if answer is None else answer), text.EOS]

def kinds_of(q, others, rng):
    """Four trajectories of a question: {kind: text}, without 'wrong' where no corruption changes the answer."""
    ts = ";".join(arithmetic.steps(q, rng)[0])
    slip = arithmetic.corrupt(q, rng)
    other = rng.choice([o for o in others if o.answer != q.answer])
    out = {"correct": ts, "other": ";".join(arithmetic.steps(other, rng)[0]), "filler": "." * len(ts)}
    return out | {"wrong": ";".join(slip[0])} if slip else out

def curves_of(model, questions, thinks, answers=None, size=64):
    """L_hat of one trajectory text a question; `answers`: of other answers than the true ones."""
    rows = list(zip(questions, thinks, answers or [q.answer for q in questions]))
    return [curve for i in range(0, len(rows), size) for curve in prefix_nll(model, *zip(*(
        (text.prompt(q.text), text.encode(t), tail_of(q, a)) for q, t, a in rows[i:i + size])))]

def curve_margins(drop, rho, share):
    """drop: {kind: L_hat's fall, a number a question}; rho: Spearman of L_hat with the position; share: of the fall in its largest 5 % of steps."""
    return {"falls": drop["correct"], **{f"falls more than {kind}": drop["correct"] - v for kind, v in drop.items() if kind != "correct"}}, \
           {"spearman below -0.5": -0.5 - rho, "less than half of the fall in its largest 5 % of steps": 0.5 - share}

def cliff(y):
    """Share of a curve's fall from first to last point that its largest 5 % of steps (at least one) make; None where it does not fall by 0.1."""
    falls = np.sort(-np.diff(y))[::-1]
    return float(falls[:max(1, round(0.05 * len(falls)))].sum() / (y[0] - y[-1])) if y[0] - y[-1] > 0.1 else None

def curve(c, model):
    """L_hat falls along a correct trajectory and not along others (C1 and C2; Figs. 2, 3, 16), and does so progressively.

    Direction is supported in a domain if, over questions, the fall from the first to the last point is above 0 for correct trajectories and
    larger than for each of `wrong` (one wrong result, consistent after it), `other` (another question's) and `filler` (as many dots). Progressive
    is supported if the median Spearman correlation of L_hat and position is below -0.5 and the largest 5 % of steps make less than half of
    the fall (median). 95 % bootstrap intervals; refuted if one lies on the other side; else inconclusive. Overall: the worst domain."""
    cells = cells_of(c.cells or "expr:4 sum:4 modsum:4")
    uncut = train.load_model(Path(c.uncut) / "ckpt.pt", model.head.weight.device)[0] if model and (Path(c.uncut) / "ckpt.pt").exists() else None
    fig, axes = plt.subplots(2 + c.examples, len(cells), figsize=(3.7 * len(cells), 5.4 + 2.3 * c.examples), squeeze=False)
    numbers, verdicts = {}, {"direction": [], "progressive": []}
    for column, (domain, k) in enumerate(cells):
        rng = random.Random(f"{c.seed}/{domain}")
        qs = train.held_out(domain, k, c.questions)
        if len({q.answer for q in qs}) < 2:
            fail(f"--questions={c.questions}: the controls need two questions with different answers")
        trials = [(q, t) for q in qs if "wrong" in (t := kinds_of(q, qs, rng))]
        if not trials:
            fail(f"no wrong trajectory was found for {domain}")
        qs, thinks = [q for q, _ in trials], {kind: [t[kind] for _, t in trials] for kind in ("correct", "wrong", "other", "filler")}
        implied = [t.rpartition("=")[2] for t in thinks["wrong"]]
        curves = {kind: curves_of(model, qs, t) for kind, t in thinks.items()}
        says = curves_of(model, qs, thinks["wrong"], implied)               # a wrong trajectory's own conclusion, along it
        margin = [a - b for a, b in zip(curves_of(model, qs, thinks["correct"], implied), curves["correct"])]
        ax = axes[0, column]
        for kind, v in curves.items():
            band(ax, v, COLOURS[kind], kind)
        band(ax, says, COLOURS["wrong"], "wrong: the answer it implies", "--")
        ax.set(title=f"{domain}, {k} operands, {len(qs)} questions", ylim=(0, None))
        band(axes[1, column], margin, COLOURS["correct"], "margin: a wrong answer's\nloss - the right one's")
        if uncut:
            bare = curves_of(uncut, qs, thinks["correct"])
            band(axes[1, column], bare, COLOURS["theta"], "trained without truncation:\n$\\hat{L}$, correct", "--")
        axes[1, column].set(ylim=(min(0, on_grid(margin).mean(0).min()), None), xlabel="fraction of the trajectory read")
        drop = {kind: np.array([v[0] - v[-1] for v in vs]) for kind, vs in curves.items()}
        rho, share = np.array([spearman(v) for v in curves["correct"]]), np.array([x for v in curves["correct"] if (x := cliff(v)) is not None])
        direction, progressive = curve_margins(drop, rho, share if len(share) else np.ones(1))
        found = {"direction": decide(direction), "progressive": decide(progressive, dict.fromkeys(progressive, np.median))}
        for name, (v, _) in found.items():
            verdicts[name].append(v)
        numbers[domain] = {"questions": len(qs), **{name: {"verdict": v, "margins": g} for name, (v, g) in found.items()},
            "spearman_median": interval(rho, np.median), "cliff_share_median": interval(share, np.median) if len(share) else None, "L_hat_start": interval([v[0] for v in curves["correct"]]),
            "L_hat_end": {kind: interval([v[-1] for v in vs]) for kind, vs in (curves | {"wrong, implied answer": says}).items()},
            "margin_start_end": [interval([v[e] for v in margin]) for e in (0, -1)]}
        if uncut:
            s = [x for v in bare if (x := cliff(v)) is not None]
            numbers[domain]["trained_without_truncation"] = {"L_hat_start": interval([v[0] for v in bare]), "L_hat_end": interval([v[-1] for v in bare]),
                "spearman_median": interval([spearman(v) for v in bare], np.median), "cliff_share_median": interval(s, np.median) if s else None}
        numbers.setdefault("mean_curves", {})[domain] = {kind: np.round(on_grid(vs).mean(0), 4).tolist() for kind, vs in (curves | {"implied": says, "margin": margin}).items()}
        for e in range(c.examples):
            write_under(axes[2 + e, column], trials[e][1]["correct"], curves["correct"][e], COLOURS["correct"])
            axes[2 + e, column].set(title=f"{qs[e].text} = {qs[e].answer}", ylim=(0, None), xlabel="token of the trajectory")
    for row, ax in enumerate(axes[:, 0]):
        ax.set_ylabel("nats a token" if row == 1 else r"$\hat{L}$, answer's NLL (nats a token)")
    for ax in axes[:2, 0]:
        ax.legend(fontsize=7)
    if not uncut:
        numbers["trained without truncation"] = f"not looked at: there is no run in {c.uncut} (python train.py --cut=0 --out={c.uncut})"
    worst = lambda v: "refuted" if "refuted" in v else "inconclusive" if "inconclusive" in v else "supported"
    return fig, {"claim": "C1, C2: the answer's loss falls along a correct trajectory, not along others, and progressively",
                 "verdict": "; ".join(f"{name} {worst(v)}" for name, v in verdicts.items()), "numbers": numbers}


# --------------------------------------------------------------------------------------------- the two readings side by side (Eq. 4)

def layout(model, heads, ts, tails):
    """Rows `head t tail[:-1]`, every section padded to a width of its own, so that the tail stands at the end, at its true positions.

    -> ids (B, S), pos (B, S), n: width of the tail, valid (B, n), mask(seen): (B, 1, S, S), in which the tail of a row sees its head,
    the first seen[row] tokens of its t, and itself. With seen < |t| the context shrinks while the tail's positions stay."""
    device, (H, T, n) = model.head.weight.device, (max(map(len, part)) for part in (heads, ts, [t[:-1] for t in tails]))
    ids, pos, real = (torch.zeros(len(heads), H + T + n, dtype=torch.long) for _ in range(3))
    for r, (h, t, a) in enumerate(zip(heads, ts, tails)):
        for at, begin, part in ((0, 0, h), (H, len(h), t), (H + T, len(h) + len(t), a[:-1])):
            ids[r, at:at + len(part)] = torch.tensor(part, dtype=torch.long)
            pos[r, at:at + len(part)] = torch.arange(begin, begin + len(part))
            real[r, at:at + len(part)] = 1
    ids, pos, real, at = ids.to(device), pos.to(device), real.to(device).bool(), torch.arange(H + T + n, device=device)
    def mask(seen):
        hidden = (at >= H + T)[None, :, None] & ((at >= H) & (at < H + T))[None, None] & (at - H >= seen[:, None])[:, None]
        return ((at[:, None] >= at) & (real[:, None] | torch.eye(len(at), dtype=torch.bool, device=device)) & ~hidden)[:, None]
    return ids, pos, n, real[:, -n:], mask

def patched(found, n):
    """Stored patches as a hook: at the last n positions, position j of a row has the weights W + p z^T / |z|^2 of its own. Where z is
    the number 1, or 0, p is a bias."""
    def hook(name, x, y):
        if name not in found:
            return y
        p, z = found[name]
        if z.size(-1) > 1:
            zz = z.square().sum(-1, keepdim=True)
            p = p * torch.where(zz > 0, (x[:, -n:] * z).sum(-1, keepdim=True) / zz.clamp(min=torch.finfo(zz.dtype).tiny), 1)
        return torch.cat((y[:, :-n], y[:, -n:] + p), 1)
    return hook

@torch.no_grad()
def exact_patches(model, heads, ts, tails, seen=None, bias=False):
    """The implicit update as weights: {layer: (p (B, n, out), z (B, n, in))}, a rank-1 patch dW = p z^T / |z|^2 of every `up` and `down` for
    each position of the tail; with bias, a vector p added behind `down` instead of its patch, z = 1.

    With them, layer by layer, the tail's logits without the trajectory equal those with its first `seen` tokens (2507.16003; 2511.17864):
    u is the residual that enters the MLP, z = norm(u), h the MLP's hidden units, C marks "with trajectory", and
    dW_up = W_up (z_C - z) z^T / |z|^2, dW_down = (u_C - u) h^T / |h|^2. Where all hidden units are silent, h = 0, no matrix can
    do it, and u_C - u is added as a bias; where they nearly are, the matrix is huge, and a bias always the tamer choice. -> patches, logits with the trajectory, patched, plain (B, n, V), valid (B, n)."""
    ids, pos, n, valid, mask = layout(model, heads, ts, tails)
    weight = {m.name: m.weight for m in model.modules() if isinstance(m, meta.Linear)}
    none, kept, found = torch.zeros(len(heads), dtype=torch.long, device=ids.device), {}, {}
    seen = torch.tensor([len(t) for t in ts] if seen is None else seen, device=ids.device)

    def record(name, x, y):
        kept[name] = x[:, -n:], y[:, -n:]
        return y

    def patch(name, x, y):
        kind = name.split(".")[1]
        if kind == "out":
            found["u"] = kept[name][1] - y[:, -n:]                          # u_C - u: below it, patched and full residuals are equal
        if kind in ("up", "down"):
            z = x[:, -n:]
            found[name] = (kept[name][0] - z) @ weight[name].T if kind == "up" else found.pop("u"), z if kind == "up" or not bias else torch.ones_like(z[..., :1])
            y = patched({name: found[name]}, n)(name, x, y)
        return y

    run = lambda seen, hook: model.logits(model(ids, pos=pos, mask=mask(seen), hook=hook)[:, -n:])
    return found, run(seen, record), run(none, patch), run(none, None), valid

def cosines(model, inner, trials):
    """Cosine between the explicit update of every `up` and `down` (the inner loop's) and the implicit patch at </think>, per question.

    trials: (question, trajectory of the explicit update, of the implicit one). Neither matrix is built: with dW = -alpha X^T D and
    z^T p, the inner product is -(z X^T)(D p), and the norms follow from X X^T and D D^T. -> {layer: list}, where both are not zero."""
    out = {}
    for q, a, b in trials:
        support, _ = meta.tensors([meta.Task(q, [a])], model.head.weight.device)
        fast, _ = meta.adapt(model, inner, [(support.ids, support.inner)], 1, order=1)
        found, *_ = exact_patches(model, [text.prompt(q.text)], [text.encode(b)], [tail_of(q)])
        for name in inner.names:
            if name in found:
                X, D = (torch.cat([step[name][j][0] for step in fast.steps]) for j in (0, 1))
                X = torch.cat([x * inner.rate(name, k).detach() for k, x in enumerate(X.split(len(X) // len(fast.steps)))])
                p, z = (v[0, 0] for v in found[name])
                norm = ((X @ X.T) * (D @ D.T)).sum().clamp(min=0).sqrt() * p.norm() * z.norm()
                if norm > 0:
                    out.setdefault(name, []).append(float(-(X @ z) @ (D @ p) / norm))
    return out

def explicit_curves(model, inner, questions, thinks, mode="whole", size=512):
    """L_q(theta'_i) for i = 0..|t|: theta'_i from the inner loop on the first i tokens, the query without any trajectory.

    The counterpart of `prefix_nll`. Every prefix runs its own inner loop, as one more question of a batch (i = 0: theta itself)."""
    rows, flat = [], [(q, t[:i]) for q, t in zip(questions, thinks) for i in range(1, len(t) + 1)]
    for i in range(0, len(flat), size):
        support, query = meta.tensors([meta.Task(q, [t]) for q, t in flat[i:i + size]], model.head.weight.device)
        steps = meta.by_step(support) * inner.K if mode == "step" else None
        fast, _ = meta.adapt(model, inner, [(support.ids, support.inner)], len(query.ids), steps, order=1, local=mode == "token")
        with torch.no_grad():
            rows += row_loss(model, query.ids, query.targets, hook=fast).tolist()
    with torch.no_grad():
        _, query = meta.tensors([meta.Task(q, ["="]) for q in questions], model.head.weight.device)
        theta, rows = row_loss(model, query.ids, query.targets).tolist(), iter(rows)
    return [np.array([first] + [next(rows) for _ in t]) for first, t in zip(theta, thinks)]

def untrained(model, seed=0):
    """A model of the same shape with random weights, none of them zero."""
    torch.manual_seed(seed)
    new = type(model)(model.config)
    for b in new.blocks:
        for layer in (b.out, b.down):
            torch.nn.init.kaiming_uniform_(layer.weight, a=5 ** 0.5)
    return new.to(model.head.weight.device)

def explicit(c, model):
    """The trajectory in the weights beside the trajectory in the context (Eq. 4 taken at its word), on the run in --meta.

    Supported if theta', without a trajectory in context, answers more held-out questions of the trained operand counts than theta does
    after a trajectory whose last result is cut off, and more than it does after another question's whole trajectory: differences
    with 95 % bootstrap intervals above 0, and at least half right. Refuted if an interval lies below 0 or contains it, else inconclusive.
    (With the whole trajectory theta' could merely copy.)"""
    model, inner, state = meta.load_meta(Path(c.meta) / "ckpt.pt", model.head.weight.device)
    config = state["config"]
    if config["algo"] == "none":
        fail(f"{c.meta} was trained with --algo=none: there is no theta' in it")
    domain, counts = config["domain"], [int(k) for k in config["operands"].split(",")]
    table = meta.exact_match(model, inner, {domain: (*counts, max(counts) + 1)}, c.questions, config["inner"], c.seed)[domain]
    pooled = {name: {w: sum((table[str(k)].get(name, {}).get(w, []) for k in counts), []) for w in ("theta", "theta_prime", "in_context", "implied")}
              for name in meta.CONDITIONS}
    pooled = {name: {w: v for w, v in row.items() if v} for name, row in pooled.items() if row["theta"]}
    k, rng = max(counts), random.Random(f"{c.seed}/explicit")
    qs = train.held_out(domain, k, c.questions)
    thinks = [";".join(arithmetic.steps(q, rng)[0]) for q in qs]
    others = [rng.choice([t for o, t in zip(qs, thinks) if o.answer != q.answer]) for q in qs]
    curves = {"context": curves_of(model, qs, thinks), "weights": explicit_curves(model, inner, qs, thinks, config["inner"]),
              "other": explicit_curves(model, inner, qs, others, config["inner"])}
    some = list(zip(qs, thinks, thinks))[:100]
    alike = {"trained": cosines(model, inner, some), "untrained": cosines(untrained(model), inner, some),
             "other question's trajectory": cosines(model, inner, [(q, o, t) for (q, t, _), o in zip(some, others)])}

    fig, axes = plt.subplot_mosaic([["curves", "bars", "bars"], ["example", "counts", "cosines"]], figsize=(12, 6.6), width_ratios=(1.2, 1, 1))
    ax = axes["curves"]
    for kind, label, colour in (("context", "in context", "correct"), ("weights", r"in the weights, $\theta'_i$", "weights"),
                                ("other", r"another question's, in the weights", "other")):
        band(ax, curves[kind], COLOURS[colour], label)
    ax.set(title=f"{domain}, {k} operands, {len(qs)} questions", xlabel="fraction of the trajectory read", ylabel="answer's NLL (nats a token)", ylim=(0, None))
    ax.legend()
    ax = axes["bars"]
    for j, (where, label, colour) in enumerate((("theta", r"$\theta$, no trajectory", "theta"), ("theta_prime", r"$\theta'$, trajectory in the weights", "weights"),
                                                ("in_context", "trajectory in context", "correct"))):
        for i, row in enumerate(pooled.values()):
            whisker(ax, i + (j - 1) * 0.27, interval(row[where]), COLOURS[colour], width=0.25, label=label if i == 0 else None)
    marks = [(i, np.mean(row["implied"])) for i, row in enumerate(pooled.values()) if "implied" in row]
    ax.plot(*zip(*marks), "D", color="#333333", markersize=5, label=r"$\theta'$ says what the trajectory implies")
    names = {"whole": "whole", "own": "the model's\nown", "cut": "last result\ncut", "cut2": "last 2\ncut", "cut3": "last 3\ncut",
             "other": "another\nquestion's", "corrupted_early": "wrong early,\nconsistent", "corrupted_last": "last result\nwrong"}
    ax.set_xticks(range(len(pooled)), [names[n] for n in pooled])
    ax.set(ylabel="exact match", title=f"{' and '.join(map(str, counts))} operands, held out", ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
    ax.legend(ncols=2, loc="upper center")
    for kind, colour in (("context", "correct"), ("weights", "weights")):
        write_under(axes["example"], thinks[0], curves[kind][0], COLOURS[colour])
    axes["example"].set(title=f"one trajectory: {qs[0].text} = {qs[0].answer}", xlabel="token of the trajectory", ylabel="answer's NLL (nats a token)", ylim=(0, None))
    ax, ks = axes["counts"], [*counts, max(counts) + 1]
    for where, colour in (("theta", "theta"), ("theta_prime", "weights"), ("in_context", "correct")):
        for name, style in (("whole", "o-"), ("cut", "s--")):
            if where != "theta" or name == "whole":
                ax.plot(ks, [np.mean(table[str(n)][name][where]) for n in ks], style, color=COLOURS[colour], markersize=4)
    ax.set_xticks(ks, [f"{n}" if n in counts else f"{n}\n(not trained)" for n in ks])
    ax.set(title="solid: whole, dashed: last result cut", xlabel="operands", ylabel="exact match", ylim=(-0.03, 1.05))
    ax = axes["cosines"]
    for (label, cos), colour in zip(alike.items(), ("weights", "filler", "other")):
        layers = [n for n in inner.names if n in cos]                       # a layer that no update moves has no direction
        whiskers(ax, [inner.names.index(n) for n in layers], [cos[n] for n in layers], COLOURS[colour], label=label)
    ax.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    ax.set_xticks(range(len(inner.names)), inner.names, rotation=45, fontsize=7)
    ax.set(title="explicit update against implicit patch", ylabel="cosine", xlabel="fast layer")
    ax.margins(y=0.35)
    ax.legend(fontsize=7, loc="upper left")

    cut = pooled["cut"]
    chance = meta.outcomes(untrained(model), inner, qs, "whole", config["inner"], c.seed)
    gap = lambda a, b: interval(np.subtract(a, b, dtype=float))             # the same questions in the same order: paired
    gaps = {"cut_minus_theta": gap(cut["theta_prime"], cut["theta"]), "cut_minus_other": gap(cut["theta_prime"], pooled["other"]["theta_prime"])}
    lows = [g[1] for g in gaps.values()]
    verdict = "refuted" if min(lows) <= 0 else "supported" if np.mean(cut["theta_prime"]) >= 0.5 else "inconclusive"
    numbers = {"questions": {name: len(row["theta"]) for name, row in pooled.items()}, "gaps": gaps,
               "exact_match": {name: {w: interval(v) for w, v in row.items()} for name, row in pooled.items()},
               "untrained": {w: interval(v) for w, v in chance.items()},
               "by_operands": {n: {name: {w: round(float(np.mean(v)), 4) for w, v in row.items()} for name, row in rows.items()} for n, rows in table.items()},
               "cosine": {label: {n: interval(v) for n, v in cos.items()} for label, cos in alike.items()},
               "mean_curves": {kind: np.round(on_grid(v).mean(0), 4).tolist() for kind, v in curves.items()}}
    return fig, {"claim": "Eq. 4 at its word: theta moved along the trajectory answers as if the trajectory were in context", "verdict": verdict,
                 "numbers": numbers, "checkpoint": {"run": c.meta, "checksum": train.checksum(Path(c.meta) / "ckpt.pt"), "steps": state["step"], "config": config}}


# -------------------------------------------------------------------------------------------- what the trajectory does to the weights

def rows_of(c, default="expr:4"):
    """The first cell of --cells: its questions, a correct trajectory each, another question's, and the cell as text."""
    domain, k = cells_of(c.cells or default)[0]
    qs, rng = train.held_out(domain, k, c.questions), random.Random(f"{c.seed}/{domain}/{k}")
    if len({q.answer for q in qs}) < 2:
        fail(f"--questions={c.questions}: the controls need two questions with different answers")
    ts = [";".join(arithmetic.steps(q, rng)[0]) for q in qs]
    return qs, ts, [rng.choice([t for o, t in zip(qs, ts) if o.answer != q.answer]) for q in qs], f"{domain}, {k} operands, {len(qs)} questions"

def as_ids(qs, ts):
    return [text.prompt(q.text) for q in qs], [text.encode(t) for t in ts], [tail_of(q) for q in qs]

def proposition(n=200, width=32, words=8, seed=0):
    """Proposition 2.1 in its own setting, one random layer without norm, residual or scale (Eqs. 5, 6), float64.

    -> {construction: n errors}, each relative to the change that a token t_0 makes and the new weights should reproduce: 0 is exact, 1 as
    bad as doing nothing. `printed`: the proof's W_q' = P W_q with E_t P = E_last, W_k' and W_v' through the least-squares C (Eqs.
    13-19; the product of Eq. 19 does not type-check, so M stands between E_l^+ and M^T). `direction mended`: P with E_last P = E_t.
    `rank-1 repair`: W_v' = W_v + a^T (o - a W_v) / |a|^2, with a the attended input and o the attention's output after t_0."""
    g, errors = torch.Generator().manual_seed(seed), {"printed": [], "direction mended": [], "rank-1 repair": []}
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) / shape[0] ** 0.5
    for _ in range(n):
        E, t, Wq, Wk, Wv, W1, W2, b1, b2 = new(words, width) * 3, new(1, width) * 3, *(new(width, width) for _ in range(3)), new(width, 4 * width), new(4 * width, width), *(new(1, m) for m in (4 * width, width))
        weights = lambda q, K, Wq, Wk: (q @ Wq @ (K @ Wk).T).softmax(-1)
        mlp = lambda o: (o @ W1 + b1).relu() @ W2 + b2
        last, longer = E[-1:], torch.cat((E, t))
        before = mlp(weights(last, E, Wq, Wk) @ E @ Wv)
        o = weights(t, longer, Wq, Wk) @ longer @ Wv
        after = mlp(o)
        M = torch.cat((torch.eye(words, dtype=torch.float64), (t @ torch.linalg.pinv(E)).T), 1)      # (|l|, |l| + 1)
        through = torch.linalg.pinv(E) @ M @ M.T @ E
        for name, P in (("printed", t.T @ last / t.square().sum()), ("direction mended", last.T @ t / last.square().sum())):
            errors[name].append(float((mlp(weights(last, E, P @ Wq, through @ Wk) @ E @ through @ Wv) - after).norm() / (after - before).norm()))
        a = weights(last, E, Wq, Wk) @ E
        errors["rank-1 repair"].append(float((mlp(a @ (Wv + a.T @ (o - a @ Wv) / a.square().sum())) - after).norm() / (after - before).norm()))
    return errors

def patch_margins(errors):
    """Orders of magnitude to spare: below 1e-4 in float32 and 1e-10 in float64, and 100 times below unpatched and another question's patch."""
    e = {n: np.log10(np.maximum(v, 1e-30)) for n, v in errors.items()}
    return {"float32 below 1e-4": -4 - e["float32"], "float64 below 1e-10": -10 - e["float64"],
            "unpatched": e["unpatched"] - e["float32"] - 2, "another question's patch": e["other"] - e["float32"] - 2}

def patch(c, model):
    """The trajectory as an exact rank-1 change of the weights, without it in context (Proposition 2.1; C0).

    Supported if the largest error of the answer's logits is below 1e-4 in float32 and 1e-10 in float64, and a hundred times smaller than both
    the unpatched error and that of another question's patch: mean orders of magnitude to spare, 95 % intervals above 0; refuted
    if one lies below 0. Holds for an untrained model as well: a theorem on what weights can do, not on what they were trained for."""
    qs, ts, _, title = rows_of(c)
    ids, errors = as_ids(qs, ts), {}
    biggest = lambda a, b, valid: ((a - b).abs().amax(-1) * valid).amax(-1).double().cpu().numpy()
    double = type(model).load(model.state()).double().to(model.head.weight.device)
    for name, m, bias in (("float64, bias", double, True), ("float64", double, False), ("float32", model, False)):
        found, full, mended, plain, valid = exact_patches(m, *ids, bias=bias)
        errors[name] = biggest(mended, full, valid)
    errors["unpatched"] = biggest(plain, full, valid)
    where, pos, n, _, mask = layout(model, *ids)
    rolled = {name: tuple(v.roll(1, 0) for v in pz) for name, pz in found.items()}
    with torch.no_grad():
        wrong = model.logits(model(where, pos=pos, mask=mask(torch.zeros(len(qs), dtype=torch.long, device=where.device)), hook=patched(rolled, n))[:, -n:])
    errors["other"] = biggest(wrong, full, valid & valid.roll(1, 0))
    errors["untrained, float64"] = biggest(*[exact_patches(untrained(model).double(), *ids)[i] for i in (2, 1, 4)])
    verdict, gaps = decide(patch_margins(errors))
    weight, size, spread = {m.name: m.weight.detach() for m in model.modules() if isinstance(m, meta.Linear)}, {}, {}
    for name, (p, z) in found.items():
        p, z = p[:, 0], z[:, 0]                                             # at </think>, where the answer's first digit is chosen
        size[name] = ((p.norm(dim=-1) / z.norm(dim=-1)).nan_to_num(posinf=0) / weight[name].norm()).cpu().numpy()
        unit = torch.nn.functional.normalize(p, dim=-1), torch.nn.functional.normalize(z, dim=-1)
        values = torch.linalg.eigvalsh((unit[0] @ unit[0].T) * (unit[1] @ unit[1].T))
        spread[name] = float(values.sum() ** 2 / values.square().sum().clamp(min=1e-12))
    made = proposition()
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    labels = {"float32": "patched, float32", "float64": "patched, float64", "float64, bias": "bias behind `down`\n instead, float64", "untrained, float64": "untrained model,\npatched, float64", "unpatched": "unpatched", "other": "another\nquestion's patch"}
    axes[0].boxplot([np.maximum(errors[n], 1e-17) for n in labels], orientation="horizontal", tick_labels=list(labels.values()), widths=0.6, flierprops={"markersize": 2})
    axes[0].set(xscale="log", xlabel="largest error of the answer's logits", title=title)
    axes[1].boxplot([np.maximum(e, 1e-17) for e in made.values()], orientation="horizontal", tick_labels=["as printed", "direction of P\nmended", "rank-1 repair\nof $W_v$"], widths=0.6, flierprops={"markersize": 2})
    axes[1].set(xscale="log", xlabel="error / the change to be made", title="Proposition 2.1, one random layer")
    x, twin = range(len(size)), axes[2].twinx()
    whiskers(axes[2], x, size.values(), COLOURS["correct"])
    twin.plot(x, list(spread.values()), "s--", color=COLOURS["other"], markersize=3)
    axes[2].set_xticks(x, list(size), rotation=45)
    axes[2].set(title="patches at </think>", ylim=(0, None))
    axes[2].set_ylabel("norm of dW / norm of W", color=COLOURS["correct"])
    twin.set_ylabel(f"effective rank of {len(qs)} patches", color="#9a6a00")
    twin.set(ylim=(0, None))
    twin.spines["right"].set_visible(True)
    return fig, {"claim": "C0, Proposition 2.1: some weights do without the trajectory what the model does with it", "verdict": verdict, "numbers": {
        "orders of magnitude to spare": gaps, "median error": {n: float(np.median(e)) for n, e in errors.items()}, "largest error": {n: float(np.max(e)) for n, e in errors.items()},
        "proposition 2.1, error / change": {n: [float(np.median(e)), float(np.max(e))] for n, e in made.items()},
        "rank of a patch": 1, "norm of dW / norm of W": {n: interval(v) for n, v in size.items()}, "effective rank over questions": {n: round(v, 1) for n, v in spread.items()}}}

def increments(model, qs, ts, i):
    """Does the implicit patch, when one more token is read, move along -grad L_q at the weights patched so far?

    Increment dW_{i+1} - dW_i of every `up` and of the bias behind every `down`, at every position of the answer, each with weights of its own,
    against -D z^T, the gradient of the answer's summed NLL there. The answer keeps its positions. -> {layer or 'all': cosines (questions,)}."""
    heads, t, tails = as_ids(qs, ts)
    now, *_ = exact_patches(model, heads, t, tails, i, bias=True)
    then, *_, valid = exact_patches(model, heads, t, tails, [j + 1 for j in i], bias=True)
    ids, pos, n, _, mask = layout(model, heads, t, tails)
    targets, outputs, inputs, change = torch.full((len(qs), n), text.IGNORE, device=ids.device), {}, {}, patched(now, n)
    for row, tail in zip(targets, tails):
        row[:len(tail) - 1] = torch.tensor(tail[1:])
    def keep(name, x, y):
        y = change(name, x, y)
        if name in now:
            inputs[name], outputs[name] = x.detach()[:, -n:] if now[name][1].size(-1) > 1 else now[name][1], y
        return y
    h = model(ids, pos=pos, mask=mask(torch.zeros_like(ids[:, 0])), hook=keep)[:, -n:]
    grads = torch.autograd.grad(model.score(h, targets).sum(), list(outputs.values()))
    dot = lambda a, b: (a * b).sum(-1)
    unit = lambda p, z: p / dot(z, z).clamp(min=1e-30)[..., None]           # dW = unit z^T; 0 where z = 0
    total = 0
    parts = {}
    for name, g in zip(outputs, grads):
        D, z = g[:, -n:], inputs[name]
        (p, x), (r, y) = ((unit(*f[name]), f[name][1]) for f in (now, then))
        step = -(dot(r, D) * dot(y, z) - dot(p, D) * dot(x, z))
        size = dot(p, p) * dot(x, x) + dot(r, r) * dot(y, y) - 2 * dot(p, r) * dot(x, y)
        parts[name] = torch.stack([(v * valid).sum(-1) for v in (step, size.clamp(min=0), dot(D, D) * dot(z, z))])
        total = total + parts[name]
    cosine = lambda v: (v[0] / (v[1] * v[2]).sqrt().clamp(min=1e-30)).double().cpu().numpy()
    return {name: cosine(v) for name, v in {"all": total, **parts}.items()}

def gradient_margins(cos):
    """{condition: cosines over all layers, one a question} -> (aligned at all: above 0 and every control; a gradient step: mostly along it)."""
    return {"above 0": cos["trained"], **{f"above {name}": cos["trained"] - v for name, v in cos.items() if name != "trained"}}, {"cosine above 0.5": cos["trained"] - 0.5}

def gradient(c, model):
    """Is the trajectory's implicit update a gradient step on L_q (C0b)? The paper asserts it (Eq. 4) and shows only that an update exists.

    Cosine of each increment of the exact patch with -grad L_q at the current patched weights, eight random tokens of a correct trajectory a
    question, averaged. `aligned` is supported if it is above 0 and above three controls: the trajectory's tokens shuffled, another question's
    trajectory, an untrained model (paired differences over questions); `a gradient step` if it is above 0.5. Supported: 95 % intervals
    above; refuted: one lies below; else inconclusive. (Against the
    loss of 2507.16003, linear in W and defined by these increments themselves, the cosine is 1 by construction, for any model and any text.)"""
    qs, ts, others, title = rows_of(c)
    rng, cos = random.Random(c.seed), {}
    shuffled = ["".join(rng.sample(t, len(t))) for t in ts]
    for name, (m, thinks) in {"trained": (model, ts), "shuffled": (model, shuffled), "another question's": (model, others), "untrained": (untrained(model), ts)}.items():
        for _ in range(8):
            drawn = [rng.randrange(len(t)) for t in thinks]
            for j in range(0, len(qs), 200):
                for layer, v in increments(m, qs[j:j + 200], thinks[j:j + 200], drawn[j:j + 200]).items():
                    cos.setdefault(name, {}).setdefault(layer, np.zeros(len(qs)))[j:j + 200] += v / 8
    found = dict(zip(("aligned", "a gradient step"), map(decide, gradient_margins({name: v["all"] for name, v in cos.items()}))))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.6))
    marks = dict(zip(cos, ("correct", "filler", "other", "theta")))
    for i, (name, v) in enumerate(cos.items()):
        whisker(axes[0], i, interval(v["all"]), COLOURS[marks[name]])
        layers = [n for n in v if n != "all"]
        whiskers(axes[1], np.arange(len(layers)) + 0.08 * i, [v[n] for n in layers], COLOURS[marks[name]], label=name)
    axes[0].set_xticks(range(len(cos)), [n.replace(" ", "\n") for n in cos])
    axes[1].set_xticks(range(len(layers)), layers, rotation=45)
    axes[0].set(ylabel="cosine of a token's update and $-\\nabla L_q$", title=title)
    axes[1].set(title="by layer", ylabel="cosine")
    for ax in axes:
        ax.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes[1].legend(fontsize=8)
    return fig, {"claim": "C0b: a trajectory token updates the weights along -grad L_q", "verdict": "; ".join(f"{n}: {v}" for n, (v, _) in found.items()), "numbers": {
        "gaps": {n: g for n, (_, g) in found.items()}, "cosine": {name: {layer: interval(x) for layer, x in v.items()} for name, v in cos.items()}}}

def directions(model, seed):
    """Two random directions of every matrix in the blocks, each row scaled to the norm of the weights' row ("per filter", 1712.09913)."""
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        d = {m.name: torch.randn(m.weight.shape, generator=g).to(m.weight) for m in model.modules() if isinstance(m, meta.Linear)}
        out.append({m.name: d[m.name] * m.weight.detach().norm(dim=1, keepdim=True) / d[m.name].norm(dim=1, keepdim=True) for m in model.modules() if isinstance(m, meta.Linear)})
    return out

@torch.no_grad()
def surface(model, ids, targets, plane, points, fast=None, size=1024, **kw):
    """L_q (mean NLL, nats) of every row at theta + a d1 + b d2, (a, b) = points[row], plane = (d1, d2): {layer: (out, in)}, or (n, out, in) for the
    last n positions, each with weights of its own (in = 1: a bias). Nothing is added to weights and taken away again: every row carries its own point (225 points: 12 times as fast)."""
    out = []
    for i in range(0, len(points), size):
        a = points[i:i + size]
        def hook(name, x, y):
            y = y if fast is None else fast(name, x, y)
            for k, d in enumerate(plane):
                if name in d:
                    n = d[name].size(0) if d[name].ndim == 3 else x.size(1)
                    move = x @ d[name].T if d[name].ndim == 2 else d[name][..., 0] if d[name].size(-1) == 1 else torch.einsum("bti,toi->bto", x[:, -n:], d[name])
                    y = torch.cat((y[:, :-n], y[:, -n:] + a[:, k, None, None] * move), 1)
            return y
        part = {k: v[i:i + size] for k, v in kw.items()}
        out.append(row_loss(model, ids[i:i + size], targets[i:i + size], hook=hook, **part))
    return torch.cat(out)

def principal(path):
    """A path of weights (points, parameters), the first of them 0 = theta -> (two orthonormal directions through theta, coordinates
    (points, 2), share of the path's squared length that they hold)."""
    u, s, _ = torch.linalg.svd(path @ path.T)
    s = s.clamp(min=0).sqrt()
    d = (u[:, :2] / s[:2].clamp(min=1e-12)).T @ path
    return d, path @ d.T, float(s[:2].square().sum() / s.square().sum())

def queries(model, qs, ts):
    """Rows `<think> t </think> a <eos>` -> (ids, targets of the answer). t = '' asks without a trajectory."""
    rows = [(text.prompt(q.text, t), tail_of(q)[1:]) for q, t in zip(qs, ts)]
    T = max(len(h) + len(a) for h, a in rows)
    ids = torch.tensor([h + a + [text.PAD] * (T - len(h) - len(a)) for h, a in rows], device=model.head.weight.device)
    targets = torch.tensor([[text.IGNORE] * len(h) + a + [text.IGNORE] * (T - len(h) - len(a)) for h, a in rows], device=model.head.weight.device)
    return ids[:, :-1], targets[:, 1:]

def landscape_margins(loss):
    """{condition: (centre, ring)}, a number a question: with its trajectory L_q is lower than without and than with another question's, and still
    lower on a ring around theta than at theta without one."""
    (without, _), (centre, ring), (other, _) = loss["without"], loss["context"], loss["other"]
    return {"without - in context, at theta": without - centre, "another's - in context, at theta": other - centre, "without, at theta - in context, on the ring": without - ring}

def landscape(c, model):
    """The answer's loss over two directions around theta: without the trajectory, with it, around theta' (Figs. 2, 12-16), and the real path.

    Supported if, over questions, the trajectory in context lowers L_q at theta more than another question's does, and so far that all around,
    on a ring of radius 0.25 along filter-normalised random directions, it stays below L_q at theta without a trajectory: 95 % intervals above
    0; refuted if one lies below 0; else inconclusive. The drawn paths are parameter motions, projected on their own two principal directions
    through theta: the exact patches as tokens enter the context, and the inner loop's theta'_i."""
    qs, ts, others, title = rows_of(c)
    device, plane = model.head.weight.device, directions(model, c.seed)
    angle = torch.arange(8, device=device) * (2 * np.pi / 8)
    ring = torch.cat((torch.zeros(1, 2, device=device), 0.25 * torch.stack((angle.cos(), angle.sin()), 1)))
    loss = {}
    for name, t in (("without", [""] * len(qs)), ("context", ts), ("other", others)):
        ids, targets = queries(model, qs, t)
        L = surface(model, ids.repeat_interleave(9, 0), targets.repeat_interleave(9, 0), plane, ring.repeat(len(qs), 1)).view(-1, 9).cpu().numpy()
        loss[name] = L[:, 0], L[:, 1:].mean(1)
    verdict, gaps = decide(landscape_margins(loss))
    numbers = {"gaps": gaps, "L_q": {name: {"at theta": interval(a), "on the ring": interval(b)} for name, (a, b) in loss.items()}}

    e = c.seed % len(qs)                                                    # the question that is drawn
    side = torch.linspace(-0.5, 0.5, c.grid, device=device)
    def sheet(m, ids, targets, plane, a, b, fast=None, **kw):
        points = torch.stack(torch.meshgrid(a, b, indexing="xy"), -1).view(-1, 2)
        spread = lambda v: v.expand(len(points), *v.shape[1:])
        return surface(m, spread(ids), spread(targets), plane, points, fast, **{k: spread(v) for k, v in kw.items()}).view(len(b), len(a)).cpu().numpy()
    sheets = {"no trajectory": sheet(model, *queries(model, [qs[e]], [""]), plane, side, side),
              "trajectory in context": sheet(model, *queries(model, [qs[e]], [ts[e]]), plane, side, side)}
    around = lambda coordinates: [torch.linspace(float(lo - 0.35 * (hi - lo)), float(hi + 0.35 * (hi - lo)), c.grid, device=device) for lo, hi in
                                  ((v.min(), v.max() + 1e-6) for v in coordinates.T)]
    T, paths = len(ts[e]), {}
    heads, t, tails = as_ids([qs[e]] * (T + 1), [ts[e]] * (T + 1))
    found, *_ = exact_patches(model, heads, t, tails, list(range(T + 1)), bias=True)
    matrices = [(p[..., None] * z[..., None, :] / z.square().sum(-1)[..., None, None].clamp(min=1e-30)) for p, z in found.values()]             # (T + 1, n, out, in)
    d, at, held = principal(torch.cat([m.flatten(1) for m in matrices], 1))
    pieces = [x.split([m[0].numel() for m in matrices]) for x in d]
    ids, pos, n, _, mask = layout(model, heads[:1], t[:1], tails[:1])
    target = torch.full_like(ids, text.IGNORE)
    target[0, -n:] = torch.tensor(tails[0][1:])
    where = [{name: v.view(m.shape[1:]) for name, v, m in zip(found, part, matrices)} for part in pieces]
    paths["implicit: the exact patches"] = sheet(model, ids, target, where, *around(at), pos=pos, mask=mask(torch.zeros_like(ids[:, 0]))), around(at), at, held
    if (Path(c.meta) / "ckpt.pt").exists():
        m, inner, state = meta.load_meta(Path(c.meta) / "ckpt.pt", device)
    if (Path(c.meta) / "ckpt.pt").exists() and state["config"]["algo"] != "none":
        path = [torch.zeros(1, device=device)]
        for i in range(1, T + 1):
            support, _ = meta.tensors([meta.Task(qs[e], [ts[e][:i]])], device)
            moved = meta.theta_prime(m, inner, [(support.ids, support.inner)], create_graph=False)
            path.append(torch.cat([(w - m.get_parameter(p)).detach().flatten() for p, w in moved.items()]))
        path[0] = torch.zeros_like(path[1])
        shapes = [m.get_parameter(p).shape for p in moved]
        d, at, held = principal(torch.stack(path))
        where = [{name: v.view(s) for name, v, s in zip(inner.names, x.split([s.numel() for s in shapes]), shapes)} for x in d]
        ask = queries(m, [qs[e]], [""])
        paths[r"explicit: $\theta'_i$ of the inner loop"] = sheet(m, *ask, where, *around(at)), around(at), at, held
        support, _ = meta.tensors([meta.Task(qs[e], [ts[e]])], device)
        fast, _ = meta.adapt(m, inner, [(support.ids, support.inner)], 1, order=1)
        sheets[r"around $\theta'$, trajectory in the weights"] = sheet(m, *ask, directions(m, c.seed), side, side, fast)

    top = 2.5 * max(0.1, sheets["no trajectory"][c.grid // 2, c.grid // 2])
    fig = plt.figure(figsize=(12, 7))
    axes = fig.subplot_mosaic([["s0", "s1", "s2"], ["3d", "p0", "p1"]], per_subplot_kw={"3d": {"projection": "3d"}})
    lines = np.linspace(0, top, 15)
    for ax, (name, s) in zip((axes["s0"], axes["s1"], axes["s2"]), sheets.items()):
        shade = ax.contourf(side.cpu(), side.cpu(), np.minimum(s, top), lines, cmap="cividis")
        ax.plot(0, 0, "P", color="white", markersize=8, markeredgecolor="black")
        ax.set(title=name, xlabel="filter norms along direction 1", ylabel="direction 2")
    fig.colorbar(shade, ax=axes["s2"], label="$L_q$ (nats a token)", shrink=0.8)
    x, y = np.meshgrid(side.cpu(), side.cpu())
    first, second = list(sheets.values())[:2]
    axes["3d"].plot_surface(x, y, np.minimum(first, top), cmap="cividis", alpha=0.9, linewidth=0, vmin=0, vmax=top)
    axes["3d"].plot_wireframe(x, y, np.minimum(second, top), color=COLOURS["wrong"], linewidth=0.4, rcount=16, ccount=16)
    axes["3d"].set(title="without (surface), in context (wires)", zlim=(0, top), zlabel="$L_q$")
    axes["3d"].view_init(22, -60)
    for ax, (name, (s, (a, b), at, held)) in zip((axes["p0"], axes["p1"]), paths.items()):
        shade = draw_path(ax, s, (a.cpu(), b.cpu()), at.cpu().numpy())
        ax.set(title=f"{name}\n{held:.0%} of the path's length²", xlabel="principal direction 1", ylabel="2")
        fig.colorbar(shade, ax=ax, label="$L_q$", shrink=0.8)
    for name, ax in axes.items():
        if name in ("s0", "s1", "s2", "p0", "p1") and not ax.has_data():
            ax.text(0.5, 0.5, f"needs a run of meta.py\nin {c.meta}", ha="center", va="center", transform=ax.transAxes)
            ax.set_axis_off()
    fig.suptitle(f"{qs[e].text} = {qs[e].answer}   (+: $\\theta$, star: after the whole trajectory)", fontsize=10)
    numbers |= {"drawn": qs[e].text, "share of squared length in the plane": {name.split(":")[0]: round(p[3], 3) for name, p in paths.items()},
                "paths": {name.split(":")[0]: {"sheet": np.round(s, 3).tolist(), "axes": [np.round(v.cpu().numpy(), 4).tolist() for v in axes_], "path": np.round(at.cpu().numpy(), 4).tolist()}
                          for name, (s, axes_, at, _) in paths.items()},
                "sheets": {name: np.round(s, 3).tolist() for name, s in sheets.items()}}
    return fig, {"claim": "Figs. 2, 12-16: along the trajectory the model moves into a low and wide basin of the answer's loss", "verdict": verdict, "numbers": numbers}


# ---------------------------------------------------------------------------------------------------------- tokens, delimiter, length

def classes(think):
    """The kind of every token of a trajectory: operand, operator, result, end (of a step), slip, W (with its correction)."""
    out = []
    for j, part in enumerate(think.split(";")):
        tries = part.split("W")
        for k, piece in enumerate(tries):
            left, eq, right = piece.partition("=")
            kind = "W" if k else None
            out += [kind or ("operand" if c in "0123456789" else "operator") for c in left] + [kind or "operator"] * len(eq)
            out += [kind or ("slip" if len(tries) > 1 else "result")] * len(right) + ["W"] * (k + 1 < len(tries))
        out.append("end")
    return out[:-1]

def token_margins(curves, kinds, kind, bins=5):
    """How much more L_hat falls at tokens of a kind than at others in the same fifth of their trajectory, a number a question that has both."""
    rows = [(j, b * bins // len(k), k[b], v[b] - v[b + 1]) for j, (v, k) in enumerate(zip(curves, kinds)) for b in range(len(k))]
    level = {b: np.mean([fall for _, at, name, fall in rows if at == b and name != kind] or [np.nan]) for b in range(bins)}
    own = {}
    for j, at, name, fall in rows:
        if name == kind and np.isfinite(level[at]):
            own.setdefault(j, []).append(fall - level[at])
    return np.array([np.mean(v) for v in own.values()])

def tokens(c, model):
    """Do tokens play different roles, reflection tokens above all (C6, Fig. 6)? Signed one-step falls of L_hat by kind of token.

    Roles: supported if results make L_hat fall more than other tokens in the same fifth of the trajectory. Reflection: supported if `W` and its
    correction do; only where the run was trained on `reflect` trajectories, since others never saw a W. 95 % intervals over questions above 0;
    refuted if below 0. Beside it the official notebook's ratio |L_{i+1} - L_{i-1}| / L_{i-1}, two steps against an average over one."""
    domain, k = cells_of(c.cells or "expr:4")[0]
    qs, _, _, title = rows_of(c)
    style = train.load(Path(c.sft) / "ckpt.pt")["config"]["style"]
    reflects, rng = "reflect" in style, random.Random(f"{c.seed}/tokens")
    ts = [";".join(arithmetic.steps(q, rng, "reflect" if reflects else "long")[0]) for q in qs]
    curves, kinds = curves_of(model, qs, ts), [classes(t) for t in ts]
    found = {"roles": decide({"result": token_margins(curves, kinds, "result")})}
    if reflects:
        found["reflection"] = decide({"W": token_margins(curves, kinds, "W")})
    falls, ratios = {}, {}
    for v, ks in zip(curves, kinds):
        for i, name in enumerate(ks):
            falls.setdefault(name, []).append(v[i] - v[i + 1])
            if 0 < i < len(ks):
                ratios.setdefault(name, []).append((abs(v[i + 1] - v[i]) / max(v[i], 1e-6), abs(v[i + 1] - v[i - 1]) / max(v[i - 1], 1e-6)))
    everything = np.array([x for r in ratios.values() for x in r])
    artefact = {name: {"one step": float(np.median(np.array(r)[:, 0])), "two steps": float(np.median(np.array(r)[:, 1])),
                       "mean, two steps / all, one step": float(np.array(r)[:, 1].mean() / everything[:, 0].mean())} for name, r in ratios.items()}
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    order = [n for n in ("operand", "operator", "result", "end", "slip", "W") if n in falls]
    for i, name in enumerate(order):
        whisker(axes[0], i, interval(falls[name]), COLOURS["wrong" if name == "W" else "correct" if name == "result" else "filler"])
        for j, key in enumerate(("one step", "two steps")):
            axes[1].bar(i + 0.36 * (j - 0.5), artefact.get(name, {}).get(key, 0), 0.34, color=COLOURS[("correct", "other")[j]], label=key if i == 0 else None)
    for ax in axes:
        ax.set_xticks(range(len(order)), [{"W": "W and its\ncorrection", "end": "end (;)"}.get(n, n) for n in order])
    axes[0].axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes[0].set(ylabel=r"fall of $\hat{L}$ at the token (nats)", title=title)
    axes[1].set(ylabel=r"median $|\Delta\hat{L}| / \hat{L}$", title="the notebook's ratio, spanning one step or two")
    axes[1].legend()
    return fig, {"claim": "C6: tokens play different roles; reflection tokens take large steps",
                 "verdict": "; ".join(f"{n}: {v}" for n, (v, _) in found.items()) + ("" if reflects else "; reflection: not tested (no `W` in this run's training)"),
                 "numbers": {"falls beyond position-matched tokens": {n: g for n, (_, g) in found.items()}, "falls": {n: interval(v) for n, v in falls.items()},
                             "tokens": {n: len(v) for n, v in falls.items()}, "notebook's ratio, median": artefact}}

def delimiter_margins(loss, empty, forced, goes_on):
    """A number a question each, over places before the last result: L_hat with `</think>` forced there, L_hat of `<think></think>`; right when cut
    short, right when going on."""
    return {"L of <think></think> - cut short": empty - loss, "accuracy going on - cut short": goes_on - forced}

def delimiter(c, model):
    """Is `</think>` a step of momentum: faster, perhaps to a worse place (C7, Fig. 5)? It is forced along the model's own trajectory.

    Supported if, on average over places before the last result, an answer forced there has a lower loss than after `<think></think>` (the
    thinking so far was of use at once), and costs accuracy against thinking on: 95 % intervals over questions above 0; refuted if
    one lies below 0; else inconclusive. Entropy: of the answer's first token. (The answer without any `</think>` would only measure form.)"""
    qs, _, _, title = rows_of(c)
    own = [t for t, _ in train.respond(model, qs)]
    pairs = [(q, t) for q, t in zip(qs, own) if "=" in t and text.plain(t)]
    if not pairs:
        fail(f"{c.sft}: this model writes no trajectories to cut short")
    qs, own = [q for q, _ in pairs], [t for _, t in pairs]
    places = [[round(f * len(t)) for f in np.linspace(0, 1, 11)] for t in own]
    flat = [(q, t[:i]) for q, t, at in zip(qs, own, places) for i in at]
    fq, ft = [q for q, _ in flat], [t for _, t in flat]
    shape = lambda v: np.array(v, dtype=float).reshape(len(qs), 11)
    size, rows = 1024, {"loss": [], "entropy": []}
    with torch.no_grad():
        for i in range(0, len(flat), size):
            part = slice(i, i + size)
            ids, targets = queries(model, fq[part], ft[part])
            h = model(ids)
            rows["loss"] += (model.score(h, targets).sum(1) / (targets >= 0).sum(1)).tolist()
            at = (targets >= 0).int().argmax(1)                             # </think> stands there, the answer's first token is its target
            p = model.logits(h[torch.arange(len(h)), at]).log_softmax(-1)
            rows["entropy"] += (-(p.exp() * p).sum(-1)).tolist()
        forced = [arithmetic.verify(q, a) for q, a in zip(fq, meta.answers(model, fq, ft, where="in_context", size=size))]
        on = []
        for i in range(0, len(flat), size):
            heads = [text.prompt(q.text) + text.encode(t) for q, t in flat[i:i + size]]
            for q, row in zip(fq[i:i + size], model.generate(heads, text.EOS, 64, pad=text.PAD)):
                on.append(arithmetic.verify(q, text.decode(row[row.index(text.END_THINK) + 1:]) if text.END_THINK in row else ""))
    m = {k: shape(v) for k, v in (rows | {"forced": forced, "on": on}).items()}
    early = shape([int(i < (t.rfind("=") + 1)) for t, at in zip(own, places) for i in at])
    mean = lambda v: (v * early).sum(1) / early.sum(1)
    verdict, gaps = decide(delimiter_margins(mean(m["loss"]), m["loss"][:, 0], mean(m["forced"]), mean(m["on"])))
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.3))
    x = np.linspace(0, 1, 11)
    for ax, keys in zip(axes, (("loss",), ("forced", "on"), ("entropy",))):
        for key in keys:
            centre, low, high = bootstrap(m[key], n=500)
            label, colour = {"loss": ("</think> forced here", "wrong"), "forced": ("</think> forced here", "wrong"),
                             "on": ("thinking on from here", "correct"), "entropy": ("</think> forced here", "wrong")}[key]
            ax.plot(x, centre, "o-", markersize=3, color=COLOURS[colour], label=label)
            ax.fill_between(x, low, high, color=COLOURS[colour], alpha=0.2, linewidth=0)
        ax.set(xlabel="fraction of the model's own trajectory", ylim=(0, None))
    axes[0].axhline(m["loss"][:, 0].mean(), color=COLOURS["filler"], linestyle="--", linewidth=1, label="<think></think>")
    axes[0].legend()
    axes[1].legend(loc="center left")
    axes[0].set(ylabel=r"$\hat{L}$ (nats a token)", title=title)
    axes[1].set(ylabel="exact match", ylim=(0, 1.15))
    axes[2].set(ylabel="entropy of the answer's first token (nats)")
    return fig, {"claim": "C7: the end-of-thinking delimiter acts like momentum, towards a local optimum", "verdict": verdict, "numbers": {
        "gaps": gaps, "by fraction": {k: np.round(v.mean(0), 4).tolist() for k, v in m.items()}}}

def prune_margins(right):
    """{how: right or not, a question}: the oracle's short one is as good as the whole within 5 points; deletion by |change| beats random deletion
    at as many steps; and still does when the last result is cut off, so that it is not the answer's standing there that counts."""
    return {"short - own + 0.05": right["oracle short"] - right["own"] + 0.05, "least change - random": right["least change"] - right["random"],
            "least change - random, last result cut": right["least change, cut"] - right["random, cut"]}

def prune(c, model):
    """Has a long trajectory a short equivalent (C11, Fig. 11)? Steps of the model's own trajectory are deleted until one or two are left.

    Ways: the oracle's `short` one; greedy deletion of the step with the least |change of L_hat|; random deletion; truncation from the end (budget
    forcing). Each also with its last result cut off (leak control). Supported if the short one is as good as the whole (within 5
    points), and greedy deletion (to half the steps) beats random deletion, with and without the last result: 95 % intervals over
    questions above 0; refuted if one lies below 0; else inconclusive."""
    qs, _, _, title = rows_of(c, "sum:5")
    rng = random.Random(f"{c.seed}/prune")
    own = [t for t, _ in train.respond(model, qs)]
    pairs = [(q, t.split(";")) for q, t in zip(qs, own) if text.plain(t) and t.count("=") == q.operands - 1 == t.count(";") + 1]
    if not pairs:
        fail(f"{c.sft}: this model writes no trajectories of an operation a step to shorten")
    qs, steps = [q for q, _ in pairs], [s for _, s in pairs]
    size, curves = len(steps[0]), curves_of(model, qs, [";".join(s) for s in steps])
    half, ways = size // 2, {}
    for left in range(size, -1, -1):
        kept = {"least change": [], "random": [], "truncated": []}
        for s, v in zip(steps, curves):
            ends = np.cumsum([0] + [len(x) + 1 for x in s])
            ends[-1] -= 1
            change = [abs(v[ends[j + 1]] - v[ends[j]]) for j in range(size)]
            best = sorted(np.argsort(change)[size - left:])
            kept["least change"].append(";".join(s[j] for j in best))
            kept["random"].append(";".join(s[j] for j in sorted(rng.sample(range(size), left))))
            kept["truncated"].append(";".join(s[:left]))
        for way, t in kept.items():
            ways[way, left] = t
    ways |= {("own", size): [";".join(s) for s in steps], ("oracle short", 0): [";".join(arithmetic.steps(q, rng, "short")[0]) for q in qs]}
    right, loss, length = {}, {}, {}
    for (way, left), t in ways.items():
        for cut in (False, True):
            if cut and not all("=" in x for x in t):
                continue
            think = [meta.without_results(x, 1) if cut else x for x in t]
            key = (way + ", cut" * cut, left)
            got = meta.answers(model, qs, think, where="in_context", size=1024)
            right[key] = np.array([arithmetic.verify(q, a) for q, a in zip(qs, got)], dtype=float)
            with torch.no_grad():
                ids, targets = queries(model, qs, think)
                loss[key] = row_loss(model, ids, targets).cpu().numpy()
            length[key] = float(np.mean([len(x) for x in think]))
    at = {"own": right["own", size], "oracle short": right["oracle short", 0],
          **{way + cut: right[way + cut, half] for way in ("least change", "random") for cut in ("", ", cut")}}
    verdict, gaps = decide(prune_margins(at))
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    marks = {"least change": "weights", "random": "other", "truncated": "wrong", "own": "correct", "oracle short": "theta"}
    for ax, values, cut in ((axes[0], right, ""), (axes[1], right, ", cut"), (axes[2], loss, "")):
        for way, colour in marks.items():
            keys = sorted(k for k in values if k[0] == way + cut)
            if keys:
                whiskers(ax, [length[k] for k in keys], [values[k] for k in keys], COLOURS[colour], label=way)
        ax.set(xlabel="tokens of the trajectory", xlim=(-1.5, None))
    axes[0].set(ylabel="exact match", ylim=(-0.03, 1.05), title=title)
    axes[1].set(ylabel="exact match", ylim=(-0.03, 1.05), title="last result cut off")
    axes[2].set(ylabel=r"$\hat{L}$ (nats a token)", title="loss, nothing cut off")
    axes[0].legend(fontsize=8)
    return fig, {"claim": "C11: a long trajectory has a short equivalent", "verdict": verdict, "numbers": {"gaps": gaps, "questions": len(qs),
        "exact match": {f"{way}, {left} steps" if way not in ("own", "oracle short") else way: interval(v) for (way, left), v in right.items()},
        "tokens": {f"{way}, {left} steps": round(v, 1) for (way, left), v in length.items()}}}


# -------------------------------------------------------------------------------------------- comparisons: arms, each a string of flags

def stages(c, arm, seed):
    """An arm's runs for one seed: [(script, folder, flags)], each stage starting from the one before; `|` stands between stages.

    A stage is flags of train.py, or `meta.py` and flags of it. A folder belongs to the whole chain up to it, so arms share stages."""
    out, so_far = [], []
    for stage in arm.split("|"):
        words = stage.split()
        script = meta if words[:1] == ["meta.py"] else train
        words = words[words[:1] in (["meta.py"], ["train.py"]):]
        so_far.append(" ".join([script.__name__, *words]))
        name = " ".join(so_far)
        slug = "_".join(re.findall(r"[\w.=,]+", name))[:60] + "-" + hashlib.blake2b(name.encode(), digest_size=3).hexdigest()
        if so_far[1:]:
            words = [f"--init={out[-1][1] / 'ckpt.pt'}", *words]
        out.append((script, Path(c.out) / "runs" / slug / str(seed), words))
    return out

def train_arms(c, arms):
    """Trains what is missing of arms (name -> flags) over c.seeds, c.jobs runs at a time, each a process of its own, one progress bar for the
    lot. -> {name: [folder of a seed]}."""
    todo = {s[1]: (depth, *s, seed) for seed in range(c.seeds) for arm in arms.values() for depth, s in enumerate(stages(c, arm, seed))}
    for _, script, _, words, seed in todo.values():                         # all flags are looked at before any run begins
        script.check(*flags(train.Train if script is train else meta.Meta, words))
    jobs, cores = c.jobs or (1 if c.device != "cpu" and torch.cuda.is_available() else os.cpu_count()), os.cpu_count()
    running, bar = set(), tqdm(total=len(todo), unit="run", disable=None, dynamic_ncols=True)

    def run(folder):
        _, script, _, words, seed = todo[folder]
        if not (folder / "summary.json").exists():
            own = {w.split("=")[0] for w in words}                          # what an arm says for itself stands
            words = ["--resume"] if (folder / "ckpt.pt").exists() else \
                [*words, *(f for f in (f"--device={c.device}", f"--threads={c.threads or max(1, cores // jobs)}", f"--seed={seed}", "--questions=20", "--overwrite") if f.split("=")[0] not in own)]
            p = subprocess.Popen([sys.executable, script.__file__, f"--out={folder}", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            running.add(p)
            lines = p.communicate()[1].splitlines()
            if p.returncode:
                raise OSError(f"{folder}: {lines[-1] if lines else p.returncode}")
        bar.update()
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = ThreadPoolExecutor(jobs)
    try:
        for level in sorted({depth for depth, *_ in todo.values()}):        # a stage begins when those before it are there
            list(pool.map(run, [folder for folder, (depth, *_) in todo.items() if depth == level]))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for p in running:
            if p.poll() is None:
                p.terminate()                                               # it saves first
        signal.signal(signal.SIGTERM, old)
        bar.close()
    return {name: [stages(c, arm, seed)[-1][1] for seed in range(c.seeds)] for name, arm in arms.items()}

def evaluate(c, folder, cells, n=32, k=8):
    """A run on held-out questions -> {cell: {exact, pass, mg: list, a number a question}}, kept beside the run.

    exact: greedy; pass, mg, form: Pass@k, mG-Pass@k and the share in form, from n samples. A run of meta.py also has `theta`, asked without a trajectory,
    theta' after whole trajectories and after those without their last result, and the latter in context. A run trained to answer directly is
    asked directly."""
    path, key = folder / "compare.json", f"{cells} {c.questions} {n} {k} form"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if key not in kept:
        model, state = train.load_model(folder / "ckpt.pt", train.device_of(c))
        mode, row = "direct" if state["config"].get("direct") == 1 else "trajectory", {}
        for domain, operands in cells:
            qs = train.held_out(domain, operands, c.questions)
            right = train.sampled(model, qs, n, mode)
            cell = row[f"{domain} {operands}"] = {
                "exact": [float(arithmetic.verify(q, a)) for q, (_, a) in zip(qs, train.respond(model, qs, mode))],
                "pass": [train.pass_at_k(n, r, k) for r, _ in right], "mg": [train.mg_pass_at_k(n, r, k) for r, _ in right], "form": [f / n for _, f in right]}
            if "algo" in state["config"]:
                inner = None if state["config"]["algo"] == "none" else meta.load_meta(folder / "ckpt.pt", model.head.weight.device)[1]
                whole, cut = (meta.outcomes(model, inner, qs, name, state["config"]["inner"]) for name in ("whole", "cut"))
                cell |= {"theta": cut["theta"], "context, cut": cut["in_context"]} | ({"weights": whole["theta_prime"], "weights, cut": cut["theta_prime"]} if inner else {})
        train.write(path, kept | {key: row})
    return json.loads(path.read_text())[key]

METRICS = {"exact": "exact match", "pass": "Pass@8", "mg": "mG-Pass@8", "form": "in form", "weights": "theta', whole trajectory", "weights, cut": "theta', last result cut",
           "theta": "theta, no trajectory", "context, cut": "in context, last result cut"}

def read(folder):
    """A run's log -> list of dict, one a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

def cost(log):
    """Seconds of a run: steps times the median step, since what else ran beside it is not its own."""
    return len(log) * float(np.median(np.diff([0.0, *(line["seconds"] for line in log)])))

def contest(c, arms, cells="expr:3,4", n=32):
    """Trains and evaluates arms on the same questions. -> (scores {arm: {metric: (seeds, questions)}}, {arm: numbers for the JSON})."""
    cells = cells_of(c.cells or cells)
    scores, numbers = {}, {}
    for name, folders in train_arms(c, arms).items():
        rows = [evaluate(c, f, cells, n) for f in folders]
        metrics = [m for m in METRICS if m in next(iter(rows[0].values()))]
        scores[name] = {m: np.array([sum((row[cell][m] for cell in row), []) for row in rows], dtype=float) for m in metrics}
        logs, chains = [read(f) for f in folders], [[read(s[1]) for s in stages(c, arms[name], seed)] for seed in range(c.seeds)]
        trend = {key: [[round(float(np.mean([line[key] for line in part])), 4) for part in (log[:10], log[-10:])] for log in logs]
                 for key in ("reward", "preferred") if key in logs[0][0]}   # first and last ten steps, a pair a seed
        numbers[name] = {"flags": arms[name], **trend, "checksums": [train.checksum(f / "ckpt.pt") for f in folders], **{m: crossed(v) for m, v in scores[name].items()},
                         "by_cell": {cell: round(float(np.mean([row[cell]["exact"] for row in rows])), 4) for cell in rows[0]},
                         "seconds": round(min(sum(map(cost, chain)) for chain in chains), 1),       # of the seed that was disturbed least
                         "tokens": round(float(np.mean([sum(line.get("tokens", 0) for log in chain for line in log) for chain in chains])))}
    return scores, numbers

def gaps_of(scores, pairs):
    """{'a - b, metric': interval of the paired difference} for pairs of arms."""
    return {f"{a} - {b}, {m}": crossed(scores[a][m] - scores[b][m]) for a, b in pairs for m in scores[a] if m in scores[b]}

def arms_on(ax, rows, **labels):
    """rows: {arm: ([mean, low, high], a value a seed)}, a bar an arm."""
    for i, ((mean, low, high), seeds) in enumerate(rows.values()):
        ax.barh(i, mean, 0.7, color=PALETTE[i % len(PALETTE)])
        ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="none", ecolor="#333333", elinewidth=0.8)
        ax.plot(seeds, [i] * len(seeds), ".", color="#333333", markersize=3)
    ax.set_yticks(range(len(rows)), [textwrap.fill(name, 44) for name in rows], fontsize=9 if max(map(len, rows)) < 44 else 6)
    ax.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), **labels)

def bars(scores, numbers, title="", metrics=("exact", "pass", "mg", "weights", "weights, cut")):
    """A panel a metric, an arm without it left empty."""
    metrics = [m for m in metrics if any(m in s for s in scores.values())]
    fig, axes = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 0.45 * len(scores) + 1.2), sharey=True, squeeze=False)
    for ax, m in zip(axes[0], metrics):
        arms_on(ax, {name: (numbers[name].get(m, [np.nan] * 3), s[m].mean(1) if m in s else []) for name, s in scores.items()}, xlabel=METRICS[m])
    fig.suptitle(title, fontsize=10)
    return fig

def compare(c, model=None):
    """Any arms against each other on the same held-out questions: --arm="FLAGS" --arm="FLAGS". No claim: measured.

    Differences are paired by seed and question, each arm against the first; 95 % intervals resample seeds and questions."""
    arms = {a: a for a in c.arm}
    scores, numbers = contest(c, arms)
    gaps = gaps_of(scores, [(a, c.arm[0]) for a in c.arm[1:]])
    for name, row in numbers.items():
        print(f"{name}\n    " + "  ".join(f"{METRICS[m]} {row[m][0]:.3f} [{row[m][1]:.3f}, {row[m][2]:.3f}]" for m in METRICS if m in row) + f"  {row['seconds']} s")
        for key in {"reward", "preferred"} & {*row}:
            print(f"    {key}, first and last ten steps of every seed: " + ", ".join(f"{a:.2f} to {b:.2f}" for a, b in row[key]))
    for name, g in gaps.items():
        print(f"{name}: {g[0]:+.3f} [{g[1]:+.3f}, {g[2]:+.3f}]")
    return bars(scores, numbers, f"{c.cells or 'expr:3,4'}, {c.seeds} seeds"), {"claim": "a comparison", "verdict": "measured", "numbers": {"arms": numbers, "gaps": gaps}}


BASE = "--steps=500 --domains=expr --style=long,short,filler"              # knows how to think, and as many habits that do not help
RL = "--method=grpo --domains=expr --operands=3,4"
SFT = "--domains=expr --steps"
METHODS = {"base": BASE, "SFT": f"{BASE} | {SFT}=600", "GRPO": f"{BASE} | {RL} --steps=80", "SFT, then GRPO": f"{BASE} | {SFT}=300 | {RL} --steps=40",
           "SFT, then DPO": f"{BASE} | {SFT}=300 | --method=dpo --domains=expr --operands=3,4 --steps=80"}
LENGTHS = {"short": "--steps=300 --domains=expr --operands=3,4 --style=short", "long": "--steps=300 --domains=expr --operands=3,4",
           "padded short": "--steps=300 --domains=expr --operands=3,4 --style=padded", "short, as many tokens": "--steps=368 --domains=expr --operands=3,4 --style=short"}
ORDER = {"MAML": "--steps=100", "ANIL": "--algo=anil --steps=167", "FOMAML": "--algo=fomaml --steps=143", "Reptile": "--algo=reptile --alpha=0.1 --steps=130",
         "no inner loop": "--algo=none --steps=186", "no inner loop, as many steps": "--algo=none --steps=117", "no inner loop, detached": "--algo=none --context_grad=detached --steps=117"}
POOL = "--steps=400 --domains=sum --operands=4"
SUPPORTS = {**{f"500 questions, {n} each": f"{POOL} --pool=500 --support={n}" for n in (1, 4, 16)}, "2000 questions, 1 each": f"{POOL} --pool=2000 --support=1"}
UPDATES = {f"{n} of 16, {steps} steps": f"{BASE} | {RL} --warmup=4 --update={n} --steps={steps}" for n, steps in ((16, 24), (4, 24), (2, 24), (4, 96), (2, 192))}

def methods(c, model=None):
    """SFT, GRPO, SFT then GRPO, SFT then DPO from one base (the paper's Table 1, C3 and C4). The steps are chosen for equal time by the
    cost of a step; what it came to, base included, stands beside the scores: steps times the median step, of the quickest seed.

    C3 is supported if SFT has the higher exact match and mG-Pass@8 than GRPO from the same base. C4 is supported if SFT then GRPO
    beats GRPO alone; and `stronger` if it also beats SFT alone, which the paper does not compare. Differences over seeds and questions,
    supported where all 95 % intervals are above 0, refuted where one is below, else inconclusive."""
    scores, numbers = contest(c, METHODS)
    gap = lambda a, b, m: scores[a][m] - scores[b][m]
    found = {"C3": decide({f"SFT - GRPO, {m}": gap("SFT", "GRPO", m) for m in ("exact", "mg")}),
             "C4": decide({f"SFT, then GRPO - GRPO, {m}": gap("SFT, then GRPO", "GRPO", m) for m in ("exact", "mg")}),
             "C4, stronger": decide({f"SFT, then GRPO - SFT, {m}": gap("SFT, then GRPO", "SFT", m) for m in ("exact", "mg")})}
    gains = {f"{a} - base, exact": crossed(gap(a, "base", "exact")) for a in METHODS if a != "base"}
    return bars(scores, numbers, f"{c.cells or 'expr:3,4'}, {c.seeds} seeds, seconds: {', '.join(str(round(r['seconds'])) for r in numbers.values())}"), {
        "claim": "C3, C4: SFT gives a better inner loop than RL from a weak base, and RL is better after SFT",
        "verdict": "; ".join(f"{n} {v}" for n, (v, _) in found.items()),
        "numbers": {"arms": numbers, "gaps": {k: v for _, g in found.values() for k, v in g.items()} | gains}}

def length(c, model=None):
    """Are longer trajectories better inner loops, that is more inner steps (C5)? long: an operation a step; short: two.

    Supported if long beats short at as many questions and at as many tokens, and `padded short` (dots up to long's length)
    does not beat short by as much as long does: differences in exact match over seeds and questions, 95 % intervals above 0."""
    scores, numbers = contest(c, LENGTHS)
    s = {a: v["exact"] for a, v in scores.items()}
    verdict, gaps = decide({"long - short, as many questions": s["long"] - s["short"], "long - short, as many tokens": s["long"] - s["short, as many tokens"],
                            "long - padded short": s["long"] - s["padded short"]})
    gaps["padded short - short"] = crossed(s["padded short"] - s["short"])
    return bars(scores, numbers, f"{c.cells or 'expr:3,4'}, {c.seeds} seeds"), {
        "claim": "C5: longer trajectories are more inner steps, and better", "verdict": verdict, "numbers": {"arms": numbers, "gaps": gaps}}

def generalize(c, model=None):
    """Do trajectories generalise within and across domains (C8, Fig. 7)? The runs of `methods` and one trained to answer directly, on unseen
    operand pairs, more operands than trained, and a domain never seen.

    A cell group is supported if SFT with trajectories beats both the base and direct answers there: exact match over seeds and
    questions, 95 % intervals above 0; refuted if one lies below 0; else inconclusive."""
    arms = {"direct answers": f"{SFT}=1100 --direct=1 --cut=0"} | {a: METHODS[a] for a in ("base", "SFT", "GRPO")}
    groups = {"trained sizes": "expr:3,4", "unseen pairs": "expr:2", "more operands": "expr:5,6", "new domain": "diff:3,4"}
    fig, axes = plt.subplots(1, len(groups), figsize=(12, 3), sharey=True)
    found, numbers = {}, {}
    for ax, (group, cells) in zip(axes, groups.items()):
        scores, rows = contest(replace(c, cells=cells), arms, n=8)
        found[group] = decide({f"SFT - {a}": scores["SFT"]["exact"] - scores[a]["exact"] for a in ("base", "direct answers")})
        numbers[group] = {"exact match": {a: r["exact"] for a, r in rows.items()}, "by cell": {a: r["by_cell"] for a, r in rows.items()}, "gaps": found[group][1]}
        arms_on(ax, {a: (r["exact"], scores[a]["exact"].mean(1)) for a, r in rows.items()}, title=f"{group} ({cells})", xlabel="exact match")
    return fig, {"claim": "C8: trajectories generalise within and across domains", "verdict": "; ".join(f"{g}: {v}" for g, (v, _) in found.items()), "numbers": numbers}

def order(c, model):
    """Does the order of the outer gradient matter (Eq. 8)? MAML, FOMAML, Reptile, ANIL and no inner loop, from the model in --sft.

    The steps are chosen for equal time by the cost of a step; what it came to stands beside the scores, as in `methods`. In the weights: supported if, after
    trajectories without their last result, MAML's theta' beats FOMAML's, Reptile's, and the theta that was trained as long to answer without an inner
    loop. In context: supported if the gradient through the trajectory's keys and values beats the one detached from them, at equal time and at equal
    steps. Differences over seeds and questions, supported where all 95 % intervals are above 0, refuted where one is below, else inconclusive."""
    scores, numbers = contest(c, {name: f"meta.py --init={c.sft}/ckpt.pt {words}" for name, words in ORDER.items()}, n=8)
    cut = lambda arm: scores[arm].get("weights, cut", scores[arm]["theta"])
    bare, context = "no inner loop", lambda arm: scores[arm]["context, cut"]
    found = {"in the weights": decide({f"MAML - {a}": cut("MAML") - cut(a) for a in ("FOMAML", "Reptile", bare)}),
             "in context": decide({f"{a} - detached": context(a) - context(f"{bare}, detached") for a in (bare, f"{bare}, as many steps")})}
    gaps = {k: v for _, g in found.values() for k, v in g.items()} | {"ANIL - MAML": crossed(cut("ANIL") - cut("MAML"))}
    return bars(scores, numbers, f"{c.cells or 'expr:3,4'}, {c.seeds} seeds, seconds: {', '.join(str(round(r['seconds'])) for r in numbers.values())}", ("weights", "weights, cut", "theta", "context, cut")), {
        "claim": "Eq. 8: the second-order path from the answer through the trajectory's update matters",
        "verdict": "; ".join(f"{n}: {v}" for n, (v, _) in found.items()), "numbers": {"arms": numbers, "gaps": gaps}}

def support(c, model=None):
    """More trajectories a question: distinct ones in SFT at as many samples (C9), more of a group in GRPO's gradient (C10).

    C9 is supported if 16 trajectories a question beat 1, and 4 beat 1, at as many samples. C10 is supported if 16 of 16 beat 4 and 2 of 16
    at as many steps; it survives equal gradients if it also beats them when they take as many trajectories' gradients (4 and 8
    times the steps). Exact match over seeds and questions, 95 % intervals above 0; refuted where one is below."""
    sft, sft_numbers = contest(c, SUPPORTS, "sum:4")
    rl, rl_numbers = contest(c, UPDATES)
    one, few, many, wide = (v["exact"] for v in sft.values())
    steps, fewer = {a: v["exact"] for a, v in rl.items()}, "16 of 16, 24 steps"
    found = {"C9": decide({"16 - 1 trajectories": many - one, "4 - 1 trajectories": few - one}),
             "C10": decide({f"{fewer} - {a}": steps[fewer] - steps[a] for a in ("4 of 16, 24 steps", "2 of 16, 24 steps")}),
             "C10 at equal gradients": decide({f"{fewer} - {a}": steps[fewer] - steps[a] for a in ("4 of 16, 96 steps", "2 of 16, 192 steps")})}
    gaps = {k: v for _, g in found.values() for k, v in g.items()} | {"2000 questions - 500 questions, 1 trajectory each": crossed(wide - one)}
    return bars(sft | rl, sft_numbers | rl_numbers, f"above: SFT, sum:4; below: GRPO, expr:3,4; {c.seeds} seeds"), {
        "claim": "C9, C10: more trajectories a question are a larger support set, and better", "verdict": "; ".join(f"{n} {v}" for n, (v, _) in found.items()),
        "numbers": {"SFT": sft_numbers, "GRPO": rl_numbers, "gaps": gaps}}


# -------------------------------------------------------------------------------------------------------------------------- speed

def clock(f):
    """Seconds of f(), device included."""
    began = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

def peak(f):
    """MiB that f() holds at most beyond what stood before it; None where nobody counts (neither CUDA nor Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)                                    # what is kept for later would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")                       # sets the high-water mark back
        at = lambda key: int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
        before = at("VmRSS")
        f()
        return at("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None

def ratio(slow, fast, repeats=5):
    """How many times longer `slow` takes than `fast`: warmed up, interleaved, in this process. -> {median, minimum, maximum, seconds
    and peak MiB of both}."""
    pairs = [(clock(slow), clock(fast)) for _ in range(1 + repeats)][1:]
    r = sorted(s / f for s, f in pairs)
    return {"median": round(r[len(r) // 2], 2), "minimum": round(r[0], 2), "maximum": round(r[-1], 2),
            "seconds": [round(float(np.median(t)), 5) for t in zip(*pairs)], "MiB": [m and round(m, 1) for m in (peak(slow), peak(fast))]}

def prefix_by_prefix(model, head, t, tail, size=64):
    """What `prefix_nll` replaces: every prefix run anew, `size` at a time, each batch as long as its longest. -> (|t| + 1,)."""
    rows, out = [head + t[:i] + tail for i in range(len(t) + 1)], []
    with torch.no_grad():
        for i in range(0, len(rows), size):
            part = rows[i:i + size]
            ids = torch.tensor([r + [text.PAD] * (len(part[-1]) - len(r)) for r in part], device=model.head.weight.device)
            target = torch.full_like(ids, text.IGNORE)
            for j, r in enumerate(part):
                target[j, len(r) - len(tail) + 1:len(r)] = ids[j, len(r) - len(tail) + 1:len(r)]
            out.append(model.nll(ids[:, :-1], target[:, 1:]).sum(1) / (len(tail) - 1))
    return torch.cat(out).cpu().numpy()

def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)

def meta_by_dual(model, inner, tasks, order=2):
    """The meta-gradient of whole trajectories, every question's theta' side by side (`meta.Fast`)."""
    return gradients(model, meta.meta_loss(model, inner, meta.Meta(), tasks, model.head.weight.device, order)[0])

def meta_by_loop(model, inner, tasks):
    """The same, one question after the other, theta' as weights."""
    total, (_, n_q, n_j) = 0, meta.counts_of(tasks)
    for task in tasks:
        s, q = meta.tensors([task], model.head.weight.device)
        theta = meta.theta_prime(model, inner, [(s.ids, s.inner)])
        h = torch.func.functional_call(model, theta, (q.ids,), {"plain_from": inner.lowest})
        loss = model.score(h, q.targets).sum() / n_q + model.nll(s.ids, s.joint).sum() / n_j
        total = [a + b for a, b in zip(total, gradients(model, loss))] if total else gradients(model, loss)
    return total

def meta_by_vmap(model, inner, tasks):
    """The same, `torch.func.vmap` over the questions, theta' as weights."""
    (s, q), (_, n_q, n_j) = meta.tensors(tasks, model.head.weight.device), meta.counts_of(tasks)
    layers = {m.name: f"{path}.weight" for path, m in model.named_modules() if isinstance(m, meta.Linear)}
    slow = {layers[n]: model.get_parameter(layers[n]) for n in inner.names}
    def nll(theta, ids, targets, tau=1.0):                                  # without `score`'s indexing, whose shapes depend on data
        h = torch.func.functional_call(model, theta, (ids[None],), {"plain_from": 0})
        return torch.nn.functional.cross_entropy(model.logits(h[0]) / tau, targets, ignore_index=text.IGNORE, reduction="sum")
    def one(ids, support, joint, query, answer):
        g = torch.func.grad(nll)(slow, ids, support, inner.tau)
        theta = {layers[n]: slow[layers[n]] - inner.rate(n, 0) * g[layers[n]] for n in inner.names}
        return nll(theta, query, answer) / n_q + nll({}, ids, joint) / n_j
    return gradients(model, torch.func.vmap(one)(s.ids, s.inner, s.joint, q.ids, q.targets).sum())

def matmul_share(device, dtype, rate, tokens=2048):
    """What of the matmul rate the matrices of the default shape reach by themselves: forward and both backward products, nothing between."""
    c = train.Train(**train.PRESETS["gpu" if device.type == "cuda" else "tiny"])
    sizes = [p.shape for n, p in Model(Config(text.VOCAB, c.layers, c.heads, c.width)).named_parameters() if n != "embed.weight"]
    new = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    work = [(new(tokens, i), new(tokens, o), new(o, i)) for o, i in sizes]
    seconds = float(np.median([clock(lambda: [(x @ w.T, g @ w, g.T @ x) for x, g, w in work]) for _ in range(9)][2:]))
    return round(6 * tokens * sum(o * i for o, i in sizes) / seconds / rate, 3)

def sft_share(device, rate, compiled):
    """A whole SFT step at the default shape of the device, optimisers included -> {tokens a second, share of the matmul rate}."""
    c = train.Train(**train.PRESETS["gpu" if device.type == "cuda" else "tiny"])
    model, low = Model(Config(text.VOCAB, c.layers, c.heads, c.width)).to(device), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    if compiled:
        model.compile_blocks()
    opts, step, n = train.optimisers(model, c.lr, c.lr_adam), train.sft_step(c, model, train.mix_of(c), low), sum(p.numel() for p in model.parameters())
    def whole(i):
        tokens.append(step(i)["tokens"])
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
    tokens = []
    seconds = [clock(lambda: whole(i)) for i in range(45)]
    each = float(np.median([t / s for t, s in zip(tokens[5:], seconds[5:])]))
    return {"useful tokens a second": round(each), "useful tokens x 6 x parameters, GFLOP/s": round(each * 6 * n / 1e9, 1), "share of the matmul rate": round(each * 6 * n / rate, 3)}

def speed(c, model):
    """What each trick buys on this machine: ratios of time, every one the median of five interleaved repeats in one process (the slowest: three), with the
    peak memory of both sides; and the share of the machine's own matmul rate (float32 on a CPU, bfloat16 on CUDA) that SFT reaches, counted in
    tokens that are no padding, times 6, times parameters."""
    device, rng, ratios, F = model.head.weight.device, random.Random(c.seed), {}, torch.nn.functional
    ids = lambda n: [rng.randrange(10) for _ in range(n)]
    def row(name, slow, fast, repeats=5):
        ratios[name] = r = ratio(slow, fast, repeats)
        print(f"| {name} | {r['median']:.2f} [{r['minimum']:.2f}, {r['maximum']:.2f}] | {' / '.join('-' if m is None else f'{m:.0f}' for m in r['MiB'])} |", flush=True)
    print("| ratio of times | median [minimum, maximum] | peak MiB |\n|---|---|---|")

    for T in (64, 256, 1024):
        qkv = torch.randn(3, 4096 // T, 4, T, 24, device=device, requires_grad=True)
        row(f"attention, forward and backward, 4,096 tokens in rows of {T}: written out / fused",
            *(lambda p=p: torch.autograd.grad(attention(*qkv, plain=p).sum(), qkv) for p in (True, False)))
    packed, examples, mix = train.Train(), random.Random(0), text.Mix()
    examples = sorted((mix.sample(examples) for _ in range(packed.batch)), key=lambda e: len(e.question + e.think))
    learn = lambda m, b: gradients(m, m.nll(b.ids, b.targets, pos=b.pos, mask=b.mask()).sum())
    pack, halves = text.batch(examples, device), [text.batch([e], device, room=1) for e in examples]
    halves = [text.Batch(*(torch.cat([F.pad(t, (0, max(b.ids.size(1) for b in half) - t.size(1)), value=v) for t in part]) for part, v in zip(zip(*half), (text.PAD, text.IGNORE, 0, 0))))
              for half in (halves[:32], halves[32:])]
    row("SFT forward and backward: two chunks, sorted and padded / packed", lambda: [learn(model, b) for b in halves], lambda: learn(model, pack))
    compiled, compiles = copy.deepcopy(model), True
    compiled.compile_blocks()
    try:
        row("SFT forward and backward: eager / compiled blocks", lambda: learn(model, pack), lambda: learn(compiled, pack), 15)
    except Exception as e:                                                  # many kinds: no compiler here, or an old one
        compiles = print(f"compiled blocks: not measured, torch.compile says {type(e).__name__}")
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1:
        def one_thread():
            torch.set_num_threads(1)
            learn(model, pack)
            torch.set_num_threads(threads)
        row(f"SFT forward and backward: one thread / {threads}", one_thread, lambda: learn(model, pack), 15)
    row("SFT: forward and backward / making the batch (by another process)", lambda: learn(model, pack), lambda: text.batch_at(0, packed.batch, mix, 0, device))
    hidden = [p for p in model.blocks.parameters()]
    for p in hidden:
        p.grad = torch.randn_like(p)
    ours, theirs = train.Muon(hidden, 0.0), torch.optim.Muon(hidden, 0.0, weight_decay=0.0)
    row("Muon's step: torch.optim.Muon / ours", theirs.step, ours.step)
    model.zero_grad()

    prompts = [ids(16) for _ in range(64)]
    def uncached():
        x = torch.tensor(prompts, device=device)
        with torch.no_grad():
            for _ in range(48):
                x = torch.cat((x, model.logits(model(x)[:, -1:]).argmax(-1)), 1)
    cached = lambda static: model.generate(prompts, -1, 48, static=static)
    row("64 prompts, 16 + 48 tokens: uncached / cached generation", uncached, lambda: cached(None))
    row("64 prompts, 16 + 48 tokens: shapes that grow / static shapes" + " in a CUDA graph" * (device.type == "cuda"), lambda: cached(False), lambda: cached(True))

    tail = [text.END_THINK, *ids(2), text.EOS]
    for T in (64, 256, 512, 1024):
        head, t = [text.BOS, *ids(12), text.THINK], ids(T)
        one_pass = lambda: prefix_nll(model, [head], [t], [tail])
        if T == 64:
            row(f"curve of {T} tokens: one prefix at a time / one pass", lambda: prefix_by_prefix(model, head, t, tail, 1), one_pass)
        row(f"curve of {T} tokens: 64 prefixes a batch / one pass", lambda: prefix_by_prefix(model, head, t, tail), one_pass, 3 if T > 512 else 5)
    q_ids, targets = queries(model, train.held_out("expr", 4, 1), [""])
    plane, points = directions(model, c.seed), torch.tensor([(a, b) for a in np.linspace(-1, 1, 15) for b in np.linspace(-1, 1, 15)], dtype=torch.float32, device=device)
    sheet = lambda size: surface(model, q_ids.expand(len(points), -1), targets.expand(len(points), -1), plane, points, size=size)
    row("landscape, 15 x 15 points: one by one / batched", lambda: sheet(1), lambda: sheet(1024))

    inner = meta.Inner(meta.fast_layers(model, meta.Meta.fast), 1, meta.Meta.alpha, meta.Meta.tau).to(device)
    for n in (1, 16, 64, 256):
        tasks = [meta.Task(q, [";".join(arithmetic.steps(q, rng)[0])]) for q in (train.held_out("expr", 4, 64) * 4)[:n]]
        dual = lambda: meta_by_dual(model, inner, tasks)
        row(f"second-order gradient, {n} questions: one after the other / dual form", lambda: meta_by_loop(model, inner, tasks), dual, 3 if n > 64 else 5)
        row(f"second-order gradient, {n} questions: torch.func.vmap / dual form", lambda: meta_by_vmap(model, inner, tasks), dual, 3 if n > 64 else 5)
        if n == 64:
            support, query = meta.tensors(tasks, device)
            sft = lambda: gradients(model, model.nll(support.ids, support.joint).sum() + model.nll(query.ids, query.targets).sum())
            row("64 questions: second-order meta-gradient / SFT on the same tokens", dual, sft)
            row("64 questions: first-order meta-gradient / SFT on the same tokens", lambda: meta_by_dual(model, inner, tasks, order=1), sft)

    n, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    rate = 2 * n**3 / float(np.median([clock(lambda: a @ b) for _ in range(9)][2:]))
    rates = {f"matmul {n} x {n}, {str(kind)[6:]}, GFLOP/s": round(rate / 1e9, 1), "matmuls of an SFT step alone, share of that": matmul_share(device, kind, rate),
             "SFT step": sft_share(device, rate, False), **({"SFT step, compiled blocks": sft_share(device, rate, True)} if compiles else {}),
             "generation, tokens a second": round(64 * 48 / float(np.median([clock(lambda: cached(None)) for _ in range(5)])))}
    print(json.dumps(rates))
    fig, ax = plt.subplots(figsize=(9, 0.27 * len(ratios) + 1))
    for i, (name, r) in enumerate(ratios.items()):
        ax.barh(i, r["median"] - 1, left=1, color=COLOURS["correct" if r["median"] > 1 else "wrong"], height=0.7)
        ax.plot((r["minimum"], r["maximum"]), (i, i), color="#333333", linewidth=0.8)
        ax.text(max(r["maximum"], 1), i, f"  {r['median']:.1f}", va="center", fontsize=7)
    ax.set_yticks(range(len(ratios)), list(ratios), fontsize=7)
    ax.set(xscale="log", ylim=(len(ratios) - 0.4, -0.6), xlim=(0.2, 3 * max(r["maximum"] for r in ratios.values())), xlabel=f"ratio of times ({train.device_name(device)}, torch {torch.__version__})")
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= ax.get_xlim()[1]]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.axvline(1, color="#333333", linewidth=0.8)
    return fig, {"claim": "what each trick buys", "verdict": "measured", "numbers": {"ratios": ratios, "rates": rates, "device": train.device_name(device), "torch": torch.__version__}}

RACE = "--domains=expr --until=0.95 --questions=20"
RACES = {"ours": f"{RACE} --steps=800", "AdamW in Muon's place": f"{RACE} --recipe=adamw --steps=1600", **{f"nanoGPT's recipe, {n:,} steps": f"{RACE} --recipe=nanogpt --steps={n}" for n in (3000, 4000)}}

def race(c, model=None):
    """Seconds and steps until 95 % of 200 validation questions (`expr`, 4 operands) are right, asked every 20 steps or 40 times a run: this project's recipe, AdamW
    in Muon's place, and nanoGPT's (AdamW 1e-3, betas 0.9 and 0.99, weight decay 0.1, clipping, cosine; learned positions, LayerNorm, GELU,
    tied embeddings), same shape, batches and data, each with a budget of steps of its own, over which its rate falls.

    Supported if nanoGPT's recipe takes at least three times as long, median over seeds, with either budget; refuted if less; inconclusive if a run of
    ours does not get there. Another run that does not counts with the time it took, which is too little."""
    found = {}
    for name, folders in train_arms(c, RACES).items():
        runs = [json.loads((f / "summary.json").read_text()) for f in folders]
        found[name] = {"flags": RACES[name], "seconds": [round(cost(read(f)), 1) for f in folders], **{k: [s[k] for s in runs] for k in ("steps", "reached")}, "checksums": [train.checksum(f / "ckpt.pt") for f in folders]}
    times = {f"{name} / ours": [a / b for a, b in zip(row["seconds"], found["ours"]["seconds"])] for name, row in found.items() if name != "ours"}
    fig, ax = plt.subplots(figsize=(7, 2.2))
    for i, (name, row) in enumerate(found.items()):
        ax.barh(i, np.median(row["seconds"]), 0.7, color=PALETTE[i])
        ax.plot(row["seconds"], [i] * len(row["seconds"]), ".", color="#333333")
        ax.text(max(row["seconds"]), i, f"  {np.median(row['seconds']):.0f} s, {np.median(row['steps']):.0f} steps" + f", {row['reached'].count(False)} did not get there" * (False in row["reached"]), va="center", fontsize=8)
    ax.set_yticks(range(len(found)), list(found))
    ax.set(xlabel=f"seconds to 95 % (median of {c.seeds} seeds)", ylim=(len(found) - 0.4, -0.6), xlim=(0, 1.4 * max(max(r["seconds"]) for r in found.values())))
    slower = min(np.median(v) for name, v in times.items() if "nanoGPT" in name)
    return fig, {"claim": "this recipe needs a third of the time of plain nanoGPT's, or less", "verdict": "inconclusive" if not all(found["ours"]["reached"]) else "supported" if slower >= 3 else "refuted",
                 "numbers": {"times": times, "median": {k: round(float(np.median(v)), 2) for k, v in times.items()}, "runs": found}}

EXPERIMENTS = {name: globals()[name] for name in NAMES if name != "report"}


def run(name, c, model, state):
    """One experiment: figure, data and verdict on disk. -> result."""
    began = time.perf_counter()
    fig, result = EXPERIMENTS[name](c, None if name in TRAINING else model)
    folder = Path(c.out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png")
    plt.close(fig)
    result = ({"checkpoint": {"run": c.sft, "checksum": train.checksum(Path(c.sft) / "ckpt.pt"), "steps": state["step"], "config": state["config"]}} if state and name not in TRAINING else {}) | result
    result |= {"criterion": " ".join(EXPERIMENTS[name].__doc__.split()), "config": asdict(c), "revision": train.revision(), "seconds": round(time.perf_counter() - began, 1)}
    train.write(folder / f"{name}.json", result)
    print(f"{name}: {result['verdict']} ({result['seconds']} s)   {folder / name}.png")
    return result

def results(c):
    """{experiment: what it left on disk}, in the order of the README."""
    paths = {name: Path(c.out) / "figures" / f"{name}.json" for name in EXPERIMENTS}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}

def poster(c, found):
    """One page to project: the two readings of a trajectory side by side, the landscape with its path, accuracies, the claims in a few words."""
    fig = plt.figure(figsize=(14, 9))
    axes = fig.subplot_mosaic([["curves", "implicit", "explicit"], ["bars", "claims", "claims"]], height_ratios=(1, 1.15))
    if "explicit" in found:
        n = found["explicit"]["numbers"]
        for kind, label, colour in (("context", "in the context", "correct"), ("weights", r"in the weights, $\theta'_i$", "weights"), ("other", "another question's, in the weights", "other")):
            axes["curves"].plot(GRID, n["mean_curves"][kind], color=COLOURS[colour], label=label, linewidth=2.2)
        axes["curves"].set(title="one trajectory, two places: the answer's loss as it is read", xlabel="fraction of the trajectory read", ylabel="answer's NLL (nats a token)", ylim=(0, None))
        axes["curves"].legend()
        shown = {"whole": "whole", "cut": "last result\ncut off", "cut2": "last two\ncut off", "other": "another\nquestion's"}
        for j, (where, label, colour) in enumerate((("theta", r"$\theta$, no trajectory", "theta"), ("theta_prime", r"$\theta'$, in the weights", "weights"), ("in_context", "in the context", "correct"))):
            for i, name in enumerate(shown):
                whisker(axes["bars"], i + (j - 1) * 0.27, n["exact_match"][name][where], COLOURS[colour], width=0.25, label=label if i == 0 else None)
        axes["bars"].set_xticks(range(len(shown)), list(shown.values()))
        axes["bars"].set(title="exact match after a trajectory that is ...", ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
        axes["bars"].legend(ncols=2, loc="upper center", fontsize=8)
    for name, p in found.get("landscape", {}).get("numbers", {}).get("paths", {}).items():
        draw_path(axes[name], np.array(p["sheet"]), p["axes"], np.array(p["path"]), 1.25)
        axes[name].set(title={"implicit": "its path in the context: exact patches", "explicit": r"its path in the weights: $\theta'_i$"}[name], xlabel=r"$L_q$ over the path's principal directions; + $\theta$, star: end", xticks=[], yticks=[])
    axes["claims"].set_axis_off()
    ink = {"supported": "#009E73", "refuted": "#D55E00"}
    rows = [(name, r) for name, r in found.items() if r["verdict"] != "measured"]
    for i, (name, r) in enumerate(rows):
        y = 1 - (i + 0.5) / max(1, len(rows))
        words = {w for w in ("supported", "refuted", "inconclusive") if w in r["verdict"]}
        axes["claims"].text(0, y, name, weight="bold", va="center")
        axes["claims"].text(0.11, y, textwrap.fill(r["claim"], 72), va="center", fontsize=8)
        axes["claims"].text(0.64, y, textwrap.fill(r["verdict"], 66), va="center", fontsize=7.5, color=ink.get(*words, "#333333") if len(words) == 1 else "#333333")
    fig.suptitle("Reasoning as an inner loop: the same trajectory in the context and in the weights (after arXiv 2505.19815)", fontsize=13)
    fig.savefig(Path(c.out) / "figures" / "poster.png")
    plt.close(fig)

def report(c):
    """OUT/report.md and figures/poster.png from whatever stands on disk, what was spent, and what was not run."""
    lines, found, spent = ["# Report", ""], results(c), {}
    for run in (c.sft, c.meta):
        summary = Path(run) / "summary.json"
        if summary.exists():
            s = json.loads(summary.read_text())
            spent[run] = s["seconds"]
            lines += [f"Model: {run}, {s['parameters']:,} parameters, {s['steps']} steps, {s['seconds']} s on {s['device']}, revision {s['revision']}.", ""]
            if run == c.sft:
                lines += ["Exact match on held-out questions:", "", "```", train.show_table(s["exact_match"]), "```", ""]
    spent |= {name: r["seconds"] for name, r in found.items()}
    lines += [f"Spent: {sum(spent.values()):,.0f} s, of it " + ", ".join(f"{name} {s:,.0f}" for name, s in spent.items()) + ".", ""] if spent else []
    if found:
        poster(c, found)
        lines += ["![poster](figures/poster.png)", ""]
    for name, r in found.items():
        lines += [f"## {name}: {r['verdict']}", "", r["claim"], "", f"![{name}](figures/{name}.png)", "", f"Criterion: {r['criterion']}", "",
                  f"Config: {json.dumps(r['config'])}, revision {r['revision']}, {r['seconds']} s" + (f", checkpoint {r['checkpoint'].get('checksum')}" if "checkpoint" in r else "") + ".", "", "```",
                  *(f"{k}: {json.dumps(v)}" for k, v in r["numbers"].items() if k not in ("mean_curves", "sheets", "paths")), "```", ""]
    lines += ["Not run: " + ", ".join(n for n in EXPERIMENTS if n not in found) + ".", ""] if len(found) < len(EXPERIMENTS) else []
    train.write(Path(c.out) / "report.md", "\n".join(lines))
    print(f"report: {Path(c.out) / 'report.md'}")


def main(parsed=None):
    names, c = parsed or command_line()
    device, model, state, sft = train.device_of(c), None, None, Path(c.sft)
    for name in [n for n in names or TOUR if n != "report"]:
        if name not in TRAINING and model is None:
            if not (sft / "summary.json").exists():
                half = (sft / "ckpt.pt").exists()
                print(f"{'going on with' if half else 'training'} the model in {sft}")
                train.train(*flags(train.Train, [f"--out={sft}", f"--device={c.device}", *["--resume"] * half]))
            model, state = train.load_model(sft / "ckpt.pt", device)
        if name == "explicit" and not (Path(c.meta) / "summary.json").exists():
            half = ["--resume"] if (Path(c.meta) / "ckpt.pt").exists() else [f"--init={sft / 'ckpt.pt'}"]
            print(f"meta-training into {c.meta}")
            meta.meta(*flags(meta.Meta, [f"--out={c.meta}", f"--device={c.device}", *half]))
        try:
            run(name, c, model, state)
        except SystemExit as e:                                             # it has said why; the others of a tour go on
            if names or e.code != 2:
                raise
    report(c)


if __name__ == "__main__":
    train.command(lambda: main(COMMAND))
