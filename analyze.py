"""Every figure of the project as a small experiment with a verdict. Without arguments: train what is missing, draw all, report.

    python analyze.py                            # the tour
    python analyze.py curve --questions=400      # one experiment, here the answer's loss along the trajectory
"""
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

import train
from data import arithmetic, text


matplotlib.use("Agg")
import matplotlib.pyplot as plt                                             # noqa: E402 (the backend must be chosen first)


# -------------------------------------------------------------------------------------------- L_hat, the implicit inner loop (Eq. 4)

@torch.no_grad()
def prefix_nll(model, heads, trajectories, tails, width=32):
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
    J, W = max(map(len, trajectories)) + 1, width * N
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
    ax.set_xticks(range(len(think) + 1), ["·", *think], fontsize=7, family="monospace")
    ax.tick_params(axis="x", length=0)
    for i, c in enumerate(think):
        if c == ";":
            ax.axvline(i + 1, color="#cccccc", linewidth=0.8, zorder=0)


# -------------------------------------------------------------------------------------------------------------------- experiments

@dataclass
class Analyze:
    """Experiments on a trained model; each writes a figure, its data and a verdict to --out."""
    sft: str = "out/sft"            # the run of train.py to look at, trained first if it is missing
    out: str = "out"                # figures go to OUT/figures, the report to OUT/report.md
    questions: int = 200            # held-out questions a cell
    examples: int = 1               # single trajectories drawn under the averages
    seed: int = 0                   # of trajectories and corruptions
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
               "drop_minus": {kind: interval(drop["correct"] - drop[kind]) for kind in ("wrong", "other", "filler")},
               "mean_curves": {kind: np.round(on_grid(vs).mean(0), 4).tolist() for kind, vs in curves.items()}}
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

EXPERIMENTS = {"curve": curve}


def run(name, c, model, state):
    """One experiment: figure, data and verdict on disk. -> result."""
    began = time.perf_counter()
    fig, result = EXPERIMENTS[name](c, model)
    folder = Path(c.out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png")
    plt.close(fig)
    result |= {"criterion": " ".join(EXPERIMENTS[name].__doc__.split()), "checkpoint": {"run": c.sft, "steps": state["step"], "config": state["config"]},
               "config": asdict(c), "revision": train.revision(), "seconds": round(time.perf_counter() - began, 1)}
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
                      *(f"{k}: {json.dumps({a: b for a, b in v.items() if not a.startswith('mean_')})}" for k, v in r["numbers"].items()), "```", ""]
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
    device = train.device_of(c)
    sft = Path(c.sft)
    if not (sft / "summary.json").exists() and names != ["report"]:
        half = (sft / "ckpt.pt").exists()
        print(f"{'going on with' if half else 'training'} the model in {sft}")
        train.sft(*train.flags(train.Train, [f"--out={sft}", f"--device={c.device}", *["--resume"] * half], train.PRESETS))
    if names != ["report"]:
        model, state = train.load_model(sft / "ckpt.pt", device)
        for name in names or EXPERIMENTS:
            run(name, c, model, state)
    report(c)


if __name__ == "__main__":
    train.command(main)
