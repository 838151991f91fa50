"""Every figure of the project as a small experiment with a verdict. Without arguments: train what is missing, draw all, report.

    python analyze.py                            # the tour
    python analyze.py curve --questions=400      # one experiment, here the answer's loss along the trajectory
"""
import contextlib
import hashlib
import io
import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import meta
import train
from data import arithmetic, text


matplotlib.use("Agg")
import matplotlib.pyplot as plt                                             # noqa: E402 (the backend must be chosen first)


# -------------------------------------------------------------------------------------------- L_hat, the implicit inner loop (Eq. 4)

@torch.no_grad()
def prefix_nll(model, heads, trajectories, tails, width=128):
    """L_hat[i] of the paper's Algorithm 3 for i = 0..|t|, of many sequences, in one pass.

    heads: ids up to <think>; trajectories: ids of t; tails: ids of `</think> a <eos>`. -> list of float arrays (|t| + 1,), entry i the
    mean NLL (nats) of `a <eos>` when the tail follows the first i tokens of t.

    One copy of the tail stands behind every prefix as a branch: branch i sees the prefix up to i and itself, at positions i+1, i+2,
    ... The prefix is computed once, into the cache; branches follow `width` at a time, so that none pays for the others' columns."""
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
    model(prefix, mask=torch.cat((unseen, at[:, None] >= at), 1)[None, None], cache=cache, slot=W + at[None])
    rows = []
    for j in range(0, J, width):
        i = torch.arange(j, min(j + width, J), device=device)
        b, n = i.repeat_interleave(N), torch.arange(N, device=device).repeat(len(i))         # branch and place of every token
        end = head + b                                                      # (B, w * N): length of the prefix of a token's branch
        own = torch.zeros(len(b), W, dtype=torch.bool, device=device)
        own[:, :len(b)] = (b[:, None] == b) & (n[:, None] >= n)
        past = at[:int(head.max()) + int(i[-1])] < end[..., None]           # nobody in this chunk looks further
        nll = model.nll(branch.repeat(1, len(i)), target.repeat(1, len(i)), pos=end + n, cache=cache,
                        mask=torch.cat((own.expand(B, -1, -1), past), -1)[:, None], slot=torch.arange(len(b), device=device)[None])
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

def write_under(ax, think, curve, colour, label=None, style="o-"):
    """One trajectory: L_hat after every token, the tokens under the axis, a line at every step's end."""
    ax.plot(range(len(curve)), curve, style, color=colour, markersize=2.5, linewidth=1, label=label)
    ax.set_xticks(range(len(think) + 1), ["·", *think], fontsize=7 if len(think) < 26 else 6, family="monospace")
    ax.tick_params(axis="x", length=0)
    for i, c in enumerate(think):
        if c == ";":
            ax.axvline(i + 1, color="#cccccc", linewidth=0.8, zorder=0)


# -------------------------------------------------------------------------------------------------------------------- experiments

@dataclass
class Analyze:
    """Experiments on a trained model; each writes a figure, its data and a verdict to --out."""
    sft: str = "out/sft"            # the run of train.py to look at, trained first if it is missing
    meta: str = "out/meta"          # the run of meta.py to look at, trained first if it is missing
    out: str = "out"                # figures go to OUT/figures, the report to OUT/report.md
    questions: int = 200            # held-out questions a cell
    examples: int = 1               # single trajectories drawn under the averages
    seed: int = 0                   # of trajectories and corruptions
    seeds: int = 5                  # runs an arm, where an experiment trains
    arm: tuple = ()                 # compare: an arm's flags; give it once an arm
    cells: str = ""                 # held-out questions, such as "expr:3,4 sum:5"; empty: what an experiment says
    steps: int = 120                # second-order meta-steps whose time every arm gets
    device: str = "auto"            # cpu, cuda, or auto
    threads: int = 0                # CPU threads, 0: as many as torch chooses


def kinds_of(q, others, rng):
    """Four trajectories of a question: {kind: text}, without 'wrong' where no corruption changes the answer."""
    ts = ";".join(arithmetic.steps(q, rng)[0])
    slip = arithmetic.corrupt(q, rng)
    other = rng.choice([o for o in others if o.answer != q.answer])
    out = {"correct": ts, "other": ";".join(arithmetic.steps(other, rng)[0]), "filler": "." * len(ts)}
    return out | {"wrong": ";".join(slip[0])} if slip else out

def curves_of(model, questions, thinks, size=64):
    """L_hat of one trajectory text a question."""
    out = []
    for i in range(0, len(questions), size):
        qs, ts = questions[i:i + size], thinks[i:i + size]
        out += prefix_nll(model, [text.prompt(q.text) for q in qs], [text.encode(t) for t in ts],
                          [[text.END_THINK, *text.encode(q.answer), text.EOS] for q in qs])
    return out

def curve(c, model):
    """L_hat falls along a correct trajectory and not along others (the paper's C1 and C2, Figs. 2, 3, 16).

    Supported in a domain if, for correct trajectories, the median Spearman correlation of L_hat with the position is below -0.5, and
    the mean drop from the first to the last point is larger than for each of `wrong` (one wrong result, consistent after it), `other`
    (another question's trajectory) and `filler` (as many dots): paired difference, 95 % bootstrap interval over questions above 0.
    Supported if all domains are, refuted if one has a median above 0 or a drop smaller than a control's, else inconclusive."""
    cells = {"expr": 4, "sum": 4, "modsum": 4}
    fig, axes = plt.subplots(1 + c.examples, 3, figsize=(11, 3.1 + 2.3 * c.examples), squeeze=False)
    numbers, verdicts = {}, []
    for column, (domain, k) in enumerate(cells.items()):
        rng = random.Random(f"{c.seed}/{domain}")
        qs = train.held_out(domain, k, c.questions)
        trials = [(q, t) for q in qs if "wrong" in (t := kinds_of(q, qs, rng))]
        if not trials:
            train.fail(f"no wrong trajectory was found for {domain}")
        qs = [q for q, _ in trials]
        curves = {kind: curves_of(model, qs, [t[kind] for _, t in trials]) for kind in ("correct", "wrong", "other", "filler")}
        ax = axes[0, column]
        for kind, v in curves.items():
            band(ax, v, COLOURS[kind], kind)
        ax.set(title=f"{domain}, {k} operands, {len(qs)} questions", xlabel="fraction of the trajectory read", ylim=(0, None))
        drop = {kind: np.array([v[0] - v[-1] for v in vs]) for kind, vs in curves.items()}
        rho = [spearman(v) for v in curves["correct"]]
        row = {"questions": len(qs), "spearman_median": interval(rho, np.median),
               "L_hat_start": interval([v[0] for v in curves["correct"]]),
               "L_hat_end": {kind: interval([v[-1] for v in vs]) for kind, vs in curves.items()},
               "drop_minus": {kind: interval(drop["correct"] - drop[kind]) for kind in ("wrong", "other", "filler")}}
        numbers.setdefault("mean_curves", {})[domain] = {kind: np.round(on_grid(vs).mean(0), 4).tolist() for kind, vs in curves.items()}
        good = row["spearman_median"][0] < -0.5 and all(d[1] > 0 for d in row["drop_minus"].values())
        bad = row["spearman_median"][0] > 0 or any(d[2] < 0 for d in row["drop_minus"].values())
        verdicts.append(1 if good else -1 if bad else 0)
        numbers[domain] = row
        for e in range(c.examples):
            write_under(axes[1 + e, column], trials[e][1]["correct"], curves["correct"][e], COLOURS["correct"])
            axes[1 + e, column].set(title=f"one trajectory: {qs[e].text} = {qs[e].answer}", ylim=(0, None), xlabel="token of the trajectory")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\hat{L}$, answer's NLL (nats a token)")
    axes[0, 0].legend()
    verdict = "supported" if min(verdicts) > 0 else "refuted" if min(verdicts) < 0 else "inconclusive"
    return fig, {"claim": "C1, C2: the answer's loss falls along a correct trajectory, not along others", "verdict": verdict, "numbers": numbers}


# --------------------------------------------------------------------------------------------- the two readings side by side (Eq. 4)

@torch.no_grad()
def exact_patches(model, head, t, tail):
    """The implicit update as weights: {layer: (p, z)}, rank-1 patches dW = p z^T / |z|^2 of `up` and `down`, n = |tail| - 1 positions each.

    With them, layer by layer, the tail's logits without the trajectory equal those with it (2507.16003; 2511.17864): u is the
    residual that enters the MLP, z = norm(u), h the MLP's hidden units, C marks "with trajectory", and
    dW_up = W_up (z_C - z) z^T / |z|^2, dW_down = (u_C - u) h^T / |h|^2. The tail keeps its positions. Where all hidden units are
    silent, h = 0, no matrix can do it, and u_C - u is added as a bias.
    -> (patches with p (n, out) and z (n, in), logits with the trajectory, patched, and plain without it (n, V))."""
    device, n = model.head.weight.device, len(tail) - 1
    ids = lambda *parts: torch.tensor([sum(parts, [])], device=device)
    pos = torch.tensor([[*range(len(head)), *range(len(head) + len(t), len(head) + len(t) + n)]], device=device)
    weight = {m.name: m.weight for m in model.modules() if isinstance(m, meta.Linear)}
    seen, found = {}, {}

    def record(name, x, y):
        seen[name] = x[0, -n:], y[0, -n:]
        return y

    def patch(name, x, y):
        block, kind = name.split(".")
        if kind == "out":
            found["u"] = seen[name][1] - y[0, -n:]                          # u_C - u: below it, patched and full residuals are equal
        if kind in ("up", "down"):
            z = x[0, -n:]
            p = (seen[name][0] - z) @ weight[name].T if kind == "up" else found.pop("u")
            found[name] = p, z
            zz = z.square().sum(-1, keepdim=True)
            step = (p[:, :, None] * z[:, None, :] / zz[:, :, None]).nan_to_num() @ z[:, :, None]               # dW z, as a matrix would
            y = torch.cat((y[:, :-n], y[:, -n:] + torch.where(zz > 0, step.squeeze(-1), p)), 1)
        return y

    logits = lambda h: model.logits(h[0, -n:])
    full = logits(model(ids(head, t, tail[:-1]), hook=record))
    patched = logits(model(ids(head, tail[:-1]), pos=pos, hook=patch))
    return found, full, patched, logits(model(ids(head, tail[:-1]), pos=pos))

def cosines(model, inner, trials):
    """Cosine between the explicit update of every `up` and `down` (the inner loop's) and the implicit patch at </think>, per question.

    trials: (question, trajectory of the explicit update, of the implicit one). Neither matrix is built: with dW = -alpha X^T D and
    z^T p, the inner product is -(z X^T)(D p), and the norms follow from X X^T and D D^T. -> {layer: list}, where both are not zero."""
    out = {}
    for q, a, b in trials:
        support, _ = meta.tensors([meta.Task(q, [a])], model.head.weight.device)
        fast, _ = meta.adapt(model, inner, [(support.ids, support.inner)], 1, order=1)
        found, *_ = exact_patches(model, text.prompt(q.text), text.encode(b), [text.END_THINK, *text.encode(q.answer), text.EOS])
        for name in inner.names:
            if name in found:
                X, D = (torch.cat([step[name][j][0] for step in fast.steps]) for j in (0, 1))
                X = torch.cat([x * inner.rate(name, k).detach() for k, x in enumerate(X.split(len(X) // len(fast.steps)))])
                p, z = (v[0] for v in found[name])
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
            rows += (model.nll(query.ids, query.targets, hook=fast).sum(1) / (query.targets >= 0).sum(1)).tolist()
    with torch.no_grad():
        _, query = meta.tensors([meta.Task(q, ["="]) for q in questions], model.head.weight.device)
        theta = (model.nll(query.ids, query.targets).sum(1) / (query.targets >= 0).sum(1)).tolist()
    rows, out = iter(rows), []
    for first, t in zip(theta, thinks):
        out.append(np.array([first] + [next(rows) for _ in t]))
    return out

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
        train.fail(f"{c.meta} was trained with --algo=none: there is no theta' in it")
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
        mean, low, high = zip(*(bootstrap(row[where], n=1000) for row in pooled.values()))
        x = np.arange(len(pooled)) + (j - 1) * 0.27
        ax.bar(x, mean, 0.25, color=COLOURS[colour], label=label)
        ax.errorbar(x, mean, [np.subtract(mean, low), np.subtract(high, mean)], fmt="none", ecolor="#333333", elinewidth=0.8)
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
        layers = [n for n in inner.names if n in cos]
        mean, low, high = zip(*(bootstrap(cos[n], n=500) for n in layers))
        ax.errorbar(range(len(layers)), mean, [np.subtract(mean, low), np.subtract(high, mean)], fmt="o-", markersize=3, color=COLOURS[colour], label=label)
    ax.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    ax.set_xticks(range(len(layers)), layers, rotation=45, fontsize=7)
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
                 "numbers": numbers, "checkpoint": {"run": c.meta, "steps": state["step"], "config": config}}


ARMS = {"maml": "", "fomaml": "--algo=fomaml", "reptile": "--algo=reptile --alpha=0.1", "anil": "--algo=anil", "none": "--algo=none",
        "none, detached": "--algo=none --context_grad=detached"}

def order(c, model):
    """Does the order of the outer gradient matter? MAML, FOMAML, Reptile, ANIL and no inner loop, and, in context, Eq. 8's path.

    Equal compute: every arm gets the time of --steps second-order meta-steps, by its own cost a step, measured once and kept beside
    the runs. Supported if MAML's theta' beats FOMAML's, Reptile's and `none`'s theta after trajectories without their last result
    (mean over seeds, 95 % bootstrap interval of the paired difference above 0), and the full context gradient beats the detached one
    in context on the same trajectories. Refuted if an interval lies below 0, else inconclusive: the verdict names both halves."""
    folder = Path(c.out) / "order"
    if not (folder / "cost.json").exists():
        rng, cost = random.Random(0), {}
        tasks = [meta.Task(q, [";".join(arithmetic.steps(q, rng)[0])]) for q in train.held_out("expr", 4, 32)]
        for arm, flags in ARMS.items():
            config, _ = train.flags(meta.Meta, flags.split())
            inner = meta.Inner(meta.fast_layers(model, config.fast, config.algo), 1, 1.0, config.tau)
            times = []
            for _ in range(8):
                began = time.perf_counter()
                meta.meta_loss(model, inner, config, tasks, order=2 if config.algo in ("maml", "anil") else 1)[0].backward()
                model.zero_grad()
                times.append(time.perf_counter() - began)
            cost[arm] = float(np.median(times[2:]))
        train.write(folder / "cost.json", cost)
    cost = json.loads((folder / "cost.json").read_text())
    result = {}
    for seed in range(c.seeds):
        for arm, flags in ARMS.items():
            run = folder / f"{arm.replace(', ', '-')}-{seed}"
            if not (run / "summary.json").exists():
                half = ["--resume"] if (run / "ckpt.pt").exists() else \
                    [f"--init={c.sft}/ckpt.pt", f"--seed={seed}", f"--steps={round(c.steps * cost['maml'] / cost[arm])}", f"--questions={c.questions}", *flags.split()]
                print(f"order: {arm}, seed {seed}")
                meta.meta(*train.flags(meta.Meta, [f"--out={run}", *half]))
            s = json.loads((run / "summary.json").read_text())
            (cells,) = s["exact_match"].values()
            trained = s["config"]["operands"].split(",")
            for name in ("whole", "cut"):
                for where in ("theta", "theta_prime", "in_context"):
                    score = np.mean([cells[k][name].get(where, cells[k][name]["theta"]) for k in trained])
                    result.setdefault(arm, {}).setdefault(f"{name}, {where}", []).append(float(score))
            result[arm].setdefault("steps", []).append(s["steps"])
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True)
    for ax, key, title in zip(axes, ("whole, theta_prime", "cut, theta_prime", "cut, in_context"),
                              (r"$\theta'$, whole trajectory", r"$\theta'$, last result cut", "in context, last result cut")):
        for i, (arm, r) in enumerate(result.items()):
            mean, low, high = bootstrap(r[key])
            ax.bar(i, mean, 0.7, color=COLOURS["weights" if arm == "maml" else "correct" if "none" in arm else "filler"])
            ax.errorbar(i, mean, [[mean - low], [high - mean]], fmt="none", ecolor="#333333", elinewidth=0.8)
            ax.plot([i] * len(r[key]), r[key], ".", color="#333333", markersize=3)
        ax.set_xticks(range(len(result)), [a.replace(", ", ",\n") for a in result], fontsize=7)
        ax.set(title=title, ylim=(0, 1.05))
    axes[0].set_ylabel("exact match, held out")
    gap = lambda a, b, key: interval(np.subtract(result[a][key], result[b][key]))
    gaps = {f"maml - {b}, theta_prime, cut": gap("maml", b, "cut, theta_prime") for b in ("fomaml", "reptile", "anil", "none")}
    gaps["full - detached, in context, cut"] = gap("none", "none, detached", "cut, in_context")
    decide = lambda lows, highs: "supported" if min(lows) > 0 else "refuted" if min(highs) < 0 else "inconclusive"
    weights = [g for n, g in gaps.items() if "anil" not in n and "full" not in n]
    halves = [decide([g[1] for g in weights], [g[2] for g in weights]), decide(*([gaps["full - detached, in context, cut"][j]] for j in (1, 2)))]
    return fig, {"claim": "Eq. 8: the second-order path from the answer through the trajectory's update matters",
                 "verdict": halves[0] if halves[0] == halves[1] else f"{halves[0]} in the weights, {halves[1]} in context",
                 "numbers": {"gaps": gaps, "seeds": c.seeds, "seconds_a_step": cost,
                             "exact_match": {arm: {k: interval(v) if k != "steps" else v[0] for k, v in r.items()} for arm, r in result.items()}}}


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
    """Trains what is missing of arms (name -> flags) over c.seeds, one progress bar for the lot. -> {name: [folder of a seed]}."""
    todo = {s[1]: (*s, seed) for seed in range(c.seeds) for arm in arms.values() for s in stages(c, arm, seed)}
    for script, folder, words, seed in todo.values():                       # all flags are looked at before any run begins
        train.flags(train.Train if script is train else meta.Meta, words)
    train.QUIET = True
    with tqdm(total=len(todo), unit="run", disable=None, dynamic_ncols=True) as bar:
        for folder, (script, _, words, seed) in todo.items():
            if not (folder / "summary.json").exists():
                half = (folder / "ckpt.pt").exists()
                run = [f"--device={c.device}", f"--threads={c.threads}"]
                run += ["--resume"] if half else [f"--seed={seed}", "--questions=20", "--overwrite", *words]
                bar.set_postfix_str(str(folder))
                with contextlib.redirect_stdout(io.StringIO()):
                    if script is train:
                        train.train(*train.flags(train.Train, [f"--out={folder}", *run], train.PRESETS))
                    else:
                        meta.meta(*train.flags(meta.Meta, [f"--out={folder}", *run]))
            bar.update()
    train.QUIET = False
    return {name: [stages(c, arm, seed)[-1][1] for seed in range(c.seeds)] for name, arm in arms.items()}

def cells_of(spec):
    """'expr:3,4 sum:5' -> [(domain, operands)]. ValueError where there is no such cell."""
    out = []
    for part in spec.split():
        domain, _, counts = part.partition(":")
        for k in counts.split(","):
            if domain not in train.CELLS or not k.isdigit() or int(k) not in train.CELLS[domain]:
                raise ValueError(f"--cells={spec}: {part!r} is not a domain and its operand counts, such as expr:3,4")
            out.append((domain, int(k)))
    if not out:
        raise ValueError("--cells is empty: name some, such as 'expr:3,4 sum:5'")
    return out

def evaluate(c, folder, cells, n=32, k=8):
    """A run on held-out questions -> {cell: {exact, pass, mg: list, a number a question}}, kept beside the run.

    exact: greedy; pass and mg: Pass@k and mG-Pass@k from n samples. A run of meta.py also has `weights`: theta' after a correct
    trajectory that is not in context. A run trained to answer directly is asked directly."""
    path, key = folder / "compare.json", f"{cells} {c.questions} {n} {k}"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if key not in kept:
        model, state = train.load_model(folder / "ckpt.pt", train.device_of(c))
        mode, row = "direct" if state["config"].get("direct") == 1 else "trajectory", {}
        for domain, operands in cells:
            qs = train.held_out(domain, operands, c.questions)
            right = train.sampled(model, qs, n, mode)
            cell = row[f"{domain} {operands}"] = {
                "exact": [float(arithmetic.verify(q, a)) for q, (_, a) in zip(qs, train.respond(model, qs, mode))],
                "pass": [train.pass_at_k(n, r, k) for r in right], "mg": [train.mg_pass_at_k(n, r, k) for r in right]}
            if "algo" in state["config"] and state["config"]["algo"] != "none":
                m, inner, _ = meta.load_meta(folder / "ckpt.pt", model.head.weight.device)
                rng = random.Random(f"{domain}/{operands}")
                thinks = [";".join(arithmetic.steps(q, rng)[0]) for q in qs]
                cell["weights"] = [float(arithmetic.verify(q, a)) for q, a in zip(qs, meta.answers(m, qs, thinks, inner, mode=state["config"]["inner"]))]
        train.write(path, kept | {key: row})
    return json.loads(path.read_text())[key]

METRICS = {"exact": "exact match", "pass": "Pass@8", "mg": "mG-Pass@8", "weights": r"exact match of $\theta'$"}

def crossed(v):
    """[mean, low, high] of (seeds, questions) values: the bootstrap resamples both."""
    v, rng = np.asarray(v, dtype=float), np.random.default_rng(0)
    draws = [v[np.ix_(rng.integers(0, len(v), len(v)), rng.integers(0, v.shape[1], v.shape[1]))].mean() for _ in range(1000)]
    return [round(float(x), 4) for x in (v.mean(), *np.quantile(draws, (0.025, 0.975)))]

def contest(c, arms, cells="expr:3,4"):
    """Trains and evaluates arms on the same questions. -> (scores {arm: {metric: (seeds, questions)}}, {arm: numbers for the JSON})."""
    try:
        cells = cells_of(c.cells or cells)
    except ValueError as e:
        train.fail(e)
    scores, numbers = {}, {}
    for name, folders in train_arms(c, arms).items():
        rows = [evaluate(c, f, cells) for f in folders]
        metrics = [m for m in METRICS if m in next(iter(rows[0].values()))]
        scores[name] = {m: np.array([sum((row[cell][m] for cell in row), []) for row in rows]) for m in metrics}
        runs = [[json.loads((s[1] / "summary.json").read_text()) for s in stages(c, arms[name], seed)] for seed in range(c.seeds)]
        numbers[name] = {"flags": arms[name], **{m: crossed(v) for m, v in scores[name].items()},
                         "by_cell": {cell: round(float(np.mean([row[cell]["exact"] for row in rows])), 4) for cell in rows[0]},
                         "seconds": round(float(np.mean([sum(s["seconds"] for s in r) for r in runs])), 1),
                         "tokens": round(float(np.mean([sum(s.get("tokens", 0) for s in r) for r in runs])))}
    return scores, numbers

def gaps_of(scores, pairs):
    """{'a - b, metric': interval of the paired difference} for pairs of arms."""
    return {f"{a} - {b}, {m}": crossed(scores[a][m] - scores[b][m]) for a, b in pairs for m in scores[a] if m in scores[b]}

def bars(scores, numbers, title=""):
    """A panel a metric, a bar an arm, a dot a seed."""
    metrics = [m for m in METRICS if any(m in s for s in scores.values())]
    fig, axes = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 0.45 * len(scores) + 1.2), sharey=True, squeeze=False)
    for ax, m in zip(axes[0], metrics):
        for i, (name, s) in enumerate(scores.items()):
            if m in s:
                mean, low, high = numbers[name][m]
                ax.barh(i, mean, 0.7, color=PALETTE[i % len(PALETTE)])
                ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="none", ecolor="#333333", elinewidth=0.8)
                ax.plot(s[m].mean(1), [i] * len(s[m]), ".", color="#333333", markersize=3)
        ax.set(xlabel=METRICS[m], xlim=(0, 1))
    axes[0, 0].set_yticks(range(len(scores)), list(scores))
    axes[0, 0].invert_yaxis()
    fig.suptitle(title, fontsize=10)
    return fig

def compare(c, model=None):
    """Any arms against each other on the same held-out questions: --arm="FLAGS" --arm="FLAGS". No claim: measured.

    Differences are paired by seed and question, each arm against the first; 95 % intervals resample seeds and questions."""
    if len(c.arm) < 2:
        train.fail('compare needs two arms or more: --arm="--steps=300" --arm="--steps=300 --style=short"')
    arms = {a: a for a in c.arm}
    scores, numbers = contest(c, arms)
    gaps = gaps_of(scores, [(a, c.arm[0]) for a in c.arm[1:]])
    for name, row in numbers.items():
        print(f"{name}\n    " + "  ".join(f"{METRICS[m]} {row[m][0]:.3f} [{row[m][1]:.3f}, {row[m][2]:.3f}]" for m in METRICS if m in row) + f"  {row['seconds']} s")
    for name, g in gaps.items():
        print(f"{name}: {g[0]:+.3f} [{g[1]:+.3f}, {g[2]:+.3f}]")
    return bars(scores, numbers, f"{c.cells or 'expr:3,4'}, {c.seeds} seeds"), {"claim": "a comparison", "verdict": "measured", "numbers": {"arms": numbers, "gaps": gaps}}


BASE = "--steps=500 --domains=expr --style=long,short,filler"              # knows how to think, and as many habits that do not help
RL = "--method=grpo --domains=expr --operands=3,4"
SFT = "--domains=expr --steps"
METHODS = {"base": BASE, "SFT": f"{BASE} | {SFT}=600", "GRPO": f"{BASE} | {RL} --steps=70", "SFT, then GRPO": f"{BASE} | {SFT}=300 | {RL} --steps=35",
           "SFT, then DPO": f"{BASE} | {SFT}=300 | --method=dpo --domains=expr --operands=3,4 --steps=40"}
LENGTHS = {"short": "--steps=400 --domains=expr --operands=3,4 --style=short", "long": "--steps=400 --domains=expr --operands=3,4",
           "padded short": "--steps=400 --domains=expr --operands=3,4 --style=padded", "short, as many tokens": "--steps=490 --domains=expr --operands=3,4 --style=short"}
POOL = "--steps=400 --domains=sum --operands=4"
SUPPORTS = {**{f"500 questions, {n} each": f"{POOL} --pool=500 --support={n}" for n in (1, 4, 16)}, "2000 questions, 1 each": f"{POOL} --pool=2000 --support=1"}
UPDATES = {f"{n} of 16, {steps} steps": f"{BASE} | {RL} --warmup=4 --update={n} --steps={steps}" for n, steps in ((16, 24), (4, 24), (2, 24), (4, 96), (2, 192))}

def decide(margins, statistic={}):
    """Margins {name: a number a question or a run, above 0 where the claim holds} -> (verdict, {name: interval}).

    Supported if every mean (or other statistic) has its 95 % interval above 0, refuted if one lies below 0, else inconclusive.
    Two axes are seeds and questions, and both are resampled."""
    gaps = {n: crossed(m) if np.ndim(m) == 2 else interval(m, statistic.get(n, np.mean)) for n, m in margins.items()}
    return "supported" if all(g[1] > 0 for g in gaps.values()) else "refuted" if any(g[2] < 0 for g in gaps.values()) else "inconclusive", gaps

def methods(c, model=None):
    """SFT, GRPO, SFT then GRPO, SFT then DPO from one base, at about the same seconds (the paper's Table 1, C3 and C4).

    C3 is supported if SFT has the higher exact match and mG-Pass@8 than GRPO from the same base. C4 is supported if SFT then GRPO
    beats GRPO alone; and `stronger` if it also beats SFT alone, which the paper does not compare. Differences over seeds and questions,
    supported where all 95 % intervals are above 0, refuted where one is below, else inconclusive."""
    scores, numbers = contest(c, METHODS)
    gap = lambda a, b, m: scores[a][m] - scores[b][m]
    found = {"C3": decide({f"SFT - GRPO, {m}": gap("SFT", "GRPO", m) for m in ("exact", "mg")}),
             "C4": decide({f"SFT, then GRPO - GRPO, {m}": gap("SFT, then GRPO", "GRPO", m) for m in ("exact", "mg")}),
             "C4, stronger": decide({f"SFT, then GRPO - SFT, {m}": gap("SFT, then GRPO", "SFT", m) for m in ("exact", "mg")})}
    logs = {seed: [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for seed, f in enumerate(train_arms(c, {"g": METHODS["GRPO"]})["g"])}
    rise = {seed: [round(float(np.mean([r["reward"] for r in part])), 3) for part in (rows[:10], rows[-10:])] for seed, rows in logs.items()}
    gains = {f"{a} - base, exact": crossed(gap(a, "base", "exact")) for a in METHODS if a != "base"}
    return bars(scores, numbers, f"{c.cells or 'expr:3,4'}, {c.seeds} seeds, about the same seconds behind the base"), {
        "claim": "C3, C4: SFT gives a better inner loop than RL from a weak base, and RL is better after SFT",
        "verdict": "; ".join(f"{n} {v}" for n, (v, _) in found.items()),
        "numbers": {"arms": numbers, "gaps": {k: v for _, g in found.values() for k, v in g.items()} | gains, "GRPO: mean reward of first and last 10 steps": rise}}

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

def ratio(slow, fast, repeats=5):
    """How many times longer `slow` takes than `fast`: warmed up, interleaved, in this process. -> {median, minimum, maximum}."""
    def clock(f):
        began = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began
    slow(), fast()
    r = sorted(clock(slow) / clock(fast) for _ in range(repeats))
    return {"median": round(r[len(r) // 2], 2), "minimum": round(r[0], 2), "maximum": round(r[-1], 2)}

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

def speed(c, model):
    """What each trick buys on this machine: ratios of time, every one the median of five interleaved repeats in one process."""
    device, rng, ratios = model.head.weight.device, random.Random(c.seed), {}
    ids = lambda n: [rng.randrange(10) for _ in range(n)]
    tail = [text.END_THINK, *ids(2), text.EOS]
    for T in (48, 512):
        head, t = [text.BOS, *ids(12), text.THINK], ids(T)
        for size, how in ((1, "one prefix at a time"), (64, "64 prefixes a batch")):
            ratios[f"curve of {T} tokens: {how} / one pass"] = ratio(
                lambda: prefix_by_prefix(model, head, t, tail, size), lambda: prefix_nll(model, [head], [t], [tail]))
    prompts = [ids(16) for _ in range(64)]
    def uncached():
        x = torch.tensor(prompts, device=device)
        with torch.no_grad():
            for _ in range(48):
                x = torch.cat((x, model.logits(model(x)[:, -1:]).argmax(-1)), 1)
    ratios["64 prompts, 16 + 48 tokens: uncached / cached generation"] = ratio(uncached, lambda: model.generate(prompts, -1, 48))
    config = meta.Meta()
    tasks = [meta.Task(q, [";".join(arithmetic.steps(q, rng)[0])]) for q in train.held_out("expr", 4, 64)]
    inner = meta.Inner(meta.fast_layers(model, config.fast), 1, config.alpha, config.tau).to(device)
    (support, query), params = meta.tensors(tasks, device), list(model.parameters())
    backward = lambda loss: torch.autograd.grad(loss, params, materialize_grads=True)
    second = lambda: backward(meta.meta_loss(model, inner, config, tasks, device)[0])
    def sft():                                                              # the same tokens, learned in context and directly
        backward(model.nll(support.ids, support.joint).sum() + model.nll(query.ids, query.targets).sum())
    def loop():
        for task in tasks:
            s, q = meta.tensors([task], device)
            theta = meta.theta_prime(model, inner, [(s.ids, s.inner)])
            h = torch.func.functional_call(model, theta, (q.ids,), {"plain_from": inner.lowest})
            backward(model.score(h, q.targets).sum() + model.nll(s.ids, s.joint).sum())
    first = lambda: backward(meta.meta_loss(model, inner, config, tasks, device, order=1)[0])
    ratios["64 questions: second-order meta-step / SFT step on the same tokens"] = ratio(second, sft)
    ratios["64 questions: first-order meta-step / SFT step on the same tokens"] = ratio(first, sft)
    ratios["64 questions: per-question loop / dual form"] = ratio(loop, second)
    mix, recipe = text.Mix(), train.Train()
    chunks = text.batch_at(0, recipe.batch, mix, 0, device, recipe.chunks)
    def whole():
        for x, y in chunks:
            model.nll(x, y).sum().backward()
    ratios["SFT: forward and backward / making the batch"] = ratio(whole, lambda: text.batch_at(0, recipe.batch, mix, 0, device, recipe.chunks))
    hidden = [p for p in model.blocks.parameters()]
    ours, theirs = train.Muon(hidden, 0.0), torch.optim.Muon(hidden, 0.0, weight_decay=0.0)
    ratios["Muon: torch.optim.Muon / ours"] = ratio(theirs.step, ours.step)
    train.write(Path(c.out) / "speed.json", {"ratios": ratios, "device": train.device_name(device), "torch": torch.__version__, "revision": train.revision()})
    fig, ax = plt.subplots(figsize=(9, 0.3 * len(ratios) + 1))
    names = list(ratios)[::-1]
    median = [ratios[n]["median"] for n in names]
    ax.barh(names, median, color=COLOURS["correct"])
    ax.errorbar(median, range(len(names)), xerr=[[ratios[n]["median"] - ratios[n]["minimum"] for n in names], [ratios[n]["maximum"] - ratios[n]["median"] for n in names]],
                fmt="none", ecolor="#333333", elinewidth=0.8)
    for i, m in enumerate(median):
        ax.text(m, i, f"  {m:.1f}", va="bottom", fontsize=8)
    ax.set(xscale="log", xlabel=f"ratio of times ({train.device_name(device)})", xlim=(1, 2 * max(median)))
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= 2 * max(median)]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    return fig, {"claim": "what each trick buys", "verdict": "measured", "numbers": ratios}

ALONE = {"compare": compare, "methods": methods, "length": length, "support": support}                                                # these train what they need
EXPERIMENTS = {"curve": curve, "explicit": explicit, "order": order, "speed": speed} | ALONE
TOUR = ("curve", "explicit")                                                # what runs unasked; the others only when they are named



def run(name, c, model=None, state=None):
    """One experiment: figure, data and verdict on disk. -> result."""
    began = time.perf_counter()
    fig, result = EXPERIMENTS[name](c, model)
    folder = Path(c.out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png")
    plt.close(fig)
    result = ({"checkpoint": {"run": c.sft, "steps": state["step"], "config": state["config"]}} if state else {}) | result
    result |= {"criterion": " ".join(EXPERIMENTS[name].__doc__.split()), "config": asdict(c), "revision": train.revision(), "seconds": round(time.perf_counter() - began, 1)}
    train.write(folder / f"{name}.json", result)
    print(f"{name}: {result['verdict']} ({result['seconds']} s)   {folder / name}.png")
    return result

def report(c):
    """OUT/report.md from whatever stands on disk."""
    lines = ["# Report", ""]
    summary = Path(c.sft) / "summary.json"
    if summary.exists():
        s = json.loads(summary.read_text())
        lines += [f"Model: {c.sft}, {s['parameters']:,} parameters, {s['steps']} steps, {s['seconds']} s on {s['device']}, revision {s['revision']}.",
                  "", "Exact match on held-out questions:", "", "```", train.show_table(s["exact_match"]), "```", ""]
    for name in EXPERIMENTS:
        path = Path(c.out) / "figures" / f"{name}.json"
        if path.exists():
            r = json.loads(path.read_text())
            lines += [f"## {name}: {r['verdict']}", "", r["claim"], "", f"![{name}](figures/{name}.png)", "", f"Criterion: {r['criterion']}", "", "```",
                      *(f"{k}: {json.dumps(v)}" for k, v in r["numbers"].items() if k != "mean_curves"), "```", ""]
        else:
            lines += [f"## {name}: not run", ""]
    train.write(Path(c.out) / "report.md", "\n".join(lines))
    print(f"report: {Path(c.out) / 'report.md'}")


def main():
    argv = sys.argv[1:]
    names = [a for a in argv if not a.startswith("-")]
    for n in names:
        if n not in (*EXPERIMENTS, "report"):
            train.fail(f"there is no experiment {n!r}: choose from {', '.join(EXPERIMENTS)}, report")
    c, _ = train.flags(Analyze, [a for a in argv if a.startswith("-")])
    device, model, state, sft = train.device_of(c), None, None, Path(c.sft)
    for name in [n for n in names or TOUR if n != "report"]:
        if name not in ALONE and model is None:
            if not (sft / "summary.json").exists():
                half = (sft / "ckpt.pt").exists()
                print(f"{'going on with' if half else 'training'} the model in {sft}")
                train.train(*train.flags(train.Train, [f"--out={sft}", f"--device={c.device}", *["--resume"] * half], train.PRESETS))
            model, state = train.load_model(sft / "ckpt.pt", device)
        if name == "explicit" and not (Path(c.meta) / "summary.json").exists():
            half = ["--resume"] if (Path(c.meta) / "ckpt.pt").exists() else [f"--init={sft / 'ckpt.pt'}"]
            print(f"meta-training into {c.meta}")
            meta.meta(*train.flags(meta.Meta, [f"--out={c.meta}", f"--device={c.device}", *half]))
        run(name, c, *(() if name in ALONE else (model, state)))
    report(c)


if __name__ == "__main__":
    train.command(main)
