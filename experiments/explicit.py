"""Can an inner loop along a trajectory carry what the answer needs? (Eq. 4, made explicit)

The trajectory in the weights beside the trajectory in the context, on the run of --meta: theta' is
theta moved along the trajectory, and is asked the question without any.

Supported if theta', after a trajectory whose last result is cut off, answers more held-out
questions of the trained operand counts than theta does, and more than it does after another
question's whole trajectory: differences with 95 % bootstrap intervals above 0, and at least half
right. Refuted if an interval lies below 0 or contains it, else inconclusive. (With the whole
trajectory theta' could merely copy.)

That theta' answers does not yet say that it calculates. What carries the answer: the inner loss on
</think> alone, or on all but it; the same trajectory behind another question in the inner loop;
theta' asked another question, and whether it then says this one's answer; and plain gradient steps
on the model that meta-training started from (rate, temperature and steps chosen on validation).
"""
import copy
import itertools
import random
from typing import NamedTuple

import numpy as np
import torch

from analyze import cosines, curves_of, explicit_curves, others_of, questions_of, untrained
from data import arithmetic, text
from data.tasks import without_results
from lab.figure import COLOURS, INK, band, mosaic, whisker, whiskers, zero_line
from lab.score import averaged, held_out
from lab.verdict import banded, interval
from meta import CONDITIONS, Inner, another, answers, meta_test, outcomes

CLAIM = "Eq. 4: an inner loop along the trajectory carries what the answer needs"

# {where the answer comes from: (label, colour)}
WHERE = {
    "theta": (r"$\theta$, no trajectory", COLOURS["theta"]),
    "theta_prime": (r"$\theta'$, trajectory in the weights", COLOURS["weights"]),
    "in_context": ("trajectory in the context", COLOURS["correct"])}
LABELS = {
    "whole": "whole", "own": "the model's\nown", "cut": "last result\ncut",
    "cut2": "last 2\ncut", "cut3": "last 3\ncut", "other": "another\nquestion's",
    "corrupted_early": "wrong early,\nconsistent", "corrupted_last": "last result\nwrong"}
CURVES = {
    "context": ("in the context", COLOURS["correct"]),
    "weights": (r"in the weights, $\theta'_i$", COLOURS["weights"]),
    "other": ("another question's, in the weights", COLOURS["other"])}
# Plain gradient steps: rates, temperatures, steps.
GRID = list(itertools.product((0.01, 0.03, 0.1, 0.3, 1.0), (1.0, 10.0), (1, 3)))
COSINES = {
    "trained": COLOURS["weights"], "untrained": COLOURS["light"],
    "other question's trajectory": COLOURS["other"]}


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    domain: str
    counts: list                            # operands trained
    layers: list                            # that the inner loop moves
    table: dict                             # {operands: {condition: {where: right, a question}}}
    curves: dict                            # {in which place: [the answer's loss, a question]}
    cosines: dict                           # {condition: {layer: [cosine, a question]}}
    untrained: dict                         # `outcomes` of a model that never learned
    carriers: dict                          # {what the answer may come from: right? a question}
    plain: dict                             # {condition: right after plain steps? a question}


def measure(c, run, model):
    plain, (model, inner, config) = model, run
    mode, counts = config["inner"], [int(k) for k in config["operands"].split(",")]
    domain, largest = config["domain"], max(counts)
    cells = {domain: (*counts, largest + 1)}
    table = meta_test(model, inner, cells, c.questions, mode, c.seed)[domain]

    rng, qs = random.Random(f"{c.seed}/explicit"), questions_of(c, domain, largest)
    thinks = [arithmetic.trajectory(q, rng) for q in qs]
    others = others_of(qs, thinks, rng)
    curves = {
        "context": curves_of(model, qs, thinks),
        "weights": explicit_curves(model, inner, qs, thinks, mode),
        "other": explicit_curves(model, inner, qs, others, mode)}

    same, swapped = list(zip(qs, thinks, thinks))[:100], list(zip(qs, others, thinks))[:100]
    alike = {
        "trained": cosines(model, inner, same, mode),
        "untrained": cosines(untrained(model), inner, same, mode),
        "other question's trajectory": cosines(model, inner, swapped, mode)}
    nothing = outcomes(untrained(model), inner, qs, "whole", mode, c.seed)
    return Raw(domain, counts, inner.names, table, curves, alike, nothing,
               carriers(model, inner, qs, thinks, mode, rng),
               plain_steps(plain, inner.names, qs, thinks, rng))

def carriers(model, inner, qs, thinks, mode, rng):
    """Where the answer may come from, last results cut -> {what: right, or said? a question}"""
    cut, others = [without_results(t, 1) for t in thinks], [another(q, qs, rng) for q in qs]
    closing = [token == text.END_THINK for token in range(text.VOCAB)]
    only, rest = heeding(inner, closing), heeding(inner, np.invert(closing))
    rows = {
        "all of it": answers(model, qs, cut, inner, mode=mode),
        "</think> alone": answers(model, qs, cut, only, mode=mode),
        "all but </think>": answers(model, qs, cut, rest, mode=mode),
        "behind another question": answers(model, qs, cut, inner, mode=mode, givers=others)}
    right = {name: [arithmetic.verify(q, a) for q, a in zip(qs, row)] for name, row in rows.items()}
    said = answers(model, others, cut, inner, mode=mode, givers=qs)
    right["asked another: right"] = [arithmetic.verify(q, a) for q, a in zip(others, said)]
    right["asked another: says this one's"] = [a == q.answer for q, a in zip(qs, said)]
    return right

def heeding(inner, tokens):
    """An inner loop whose loss knows some tokens of the vocabulary only (a bool each)."""
    new = copy.deepcopy(inner)
    new.weight.data *= torch.tensor(tokens, device=new.weight.device)
    return new

def plain_steps(model, names, qs, thinks, rng):
    """Gradient steps on a model that never was meta-trained, the best of GRID on 50 validation
    questions -> {condition: right? a question}"""
    val = held_out(qs[0].domain, qs[0].operands, 50, "val")
    shown = [arithmetic.trajectory(q, rng) for q in val]
    right = {}
    for n, condition in enumerate(("whole", "last result cut")):
        def test(setting, questions, trajectories, n=n):
            rate, tau, K = setting
            cut = [without_results(t, n) for t in trajectories]
            inner = Inner(names, K, rate, tau).to(model.head.weight.device)
            said = answers(model, questions, cut, inner)
            return [arithmetic.verify(q, a) for q, a in zip(questions, said)]
        best = max(GRID, key=lambda setting: sum(test(setting, val, shown)))
        right[condition] = test(best, qs, thinks)
    return right


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    pooled = pool(raw.table, raw.counts)
    verdict, gaps = decide_on(pooled)
    return verdict, {
        "gaps": gaps, "domain": raw.domain, "counts": raw.counts, "layers": raw.layers,
        "questions": {name: len(row["theta"]) for name, row in pooled.items()},
        "exact_match": intervals(pooled), "by_operands": averaged(raw.table),
        "untrained": {where: interval(v) for where, v in raw.untrained.items()},
        "carriers": {name: interval(v) for name, v in raw.carriers.items()},
        "plain steps": {name: interval(v) for name, v in raw.plain.items()},
        "cosine": intervals(raw.cosines),
        "curves": {kind: banded(ys) for kind, ys in raw.curves.items()}}

def pool(table, counts):
    """The trained operand counts of a table put together -> {condition: {where: right}}"""
    pooled = {}
    for condition in CONDITIONS:
        rows = [table[str(k)][condition] for k in counts if condition in table[str(k)]]
        if rows:
            pooled[condition] = {where: sum((row[where] for row in rows), []) for where in rows[0]}
    return pooled

def decide_on(pooled):
    """The same questions in the same order: differences are paired."""
    cut, theta = pooled["cut"]["theta_prime"], pooled["cut"]["theta"]
    other = pooled["other"]["theta_prime"]
    gaps = {
        "theta', last result cut - theta": interval(np.subtract(cut, theta, dtype=float)),
        "theta', last result cut - another's": interval(np.subtract(cut, other, dtype=float))}
    if min(low for _, low, _ in gaps.values()) <= 0:
        return "refuted", gaps
    return "supported" if np.mean(cut) >= 0.5 else "inconclusive", gaps

def intervals(rows):
    """{name: {key: numbers}} -> the same with intervals."""
    return {name: {key: interval(v) for key, v in row.items()} for name, row in rows.items()}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    layout = [["curves", "bars", "bars"], ["carriers", "counts", "cosines"]]
    fig, axes = mosaic(layout, (12, 6.8), width_ratios=(1.2, 1, 1))
    draw_curves(axes["curves"], numbers)
    draw_bars(axes["bars"], numbers)
    draw_carriers(axes["carriers"], numbers)
    draw_counts(axes["counts"], numbers)
    draw_cosines(axes["cosines"], numbers)
    return fig

def draw_curves(ax, numbers):
    for kind, (label, colour) in CURVES.items():
        band(ax, numbers["curves"][kind], colour, label)
    ax.set(title=f"one trajectory, two places ({numbers['domain']}, {max(numbers['counts'])} "
                 "operands)", xlabel="fraction of the trajectory read",
           ylabel="answer's NLL (nats a token)", ylim=(0, None))
    ax.legend()

def draw_bars(ax, numbers, conditions=None):
    """Exact match by what trajectory there was, and where it was."""
    rows = {name: row for name, row in numbers["exact_match"].items()
            if conditions is None or name in conditions}
    for j, (where, (label, colour)) in enumerate(WHERE.items()):
        for i, row in enumerate(rows.values()):
            whisker(ax, i + (j - 1) * 0.27, row[where], colour, width=0.25,
                    label=label if i == 0 else None)
    marks = [(i, row["implied"][0]) for i, row in enumerate(rows.values()) if "implied" in row]
    if marks:
        ax.plot(*zip(*marks), "D", color=INK, ms=5, label=r"$\theta'$ says what it implies")
    ax.set_xticks(range(len(rows)), [LABELS[name] for name in rows])
    counts = " and ".join(map(str, numbers["counts"]))
    ax.set(title=f"share right after a trajectory that is ... ({counts} operands, held out)",
           ylabel="share right", ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
    ax.legend(ncols=2, loc="upper center")

def draw_carriers(ax, numbers):
    """Share right, last result cut, by what the inner loop was given and theta' was asked."""
    rows = [(COLOURS["weights"], name, row) for name, row in numbers["carriers"].items()]
    rows += [(COLOURS["light"], f"plain steps, {name}", row)
             for name, row in numbers["plain steps"].items()]
    for i, (colour, _, (mean, low, high)) in enumerate(rows):
        ax.barh(i, mean, 0.7, color=colour)
        ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="none", ecolor=INK, lw=0.8)
    ax.set_yticks(range(len(rows)), [name for _, name, _ in rows], fontsize=8)
    ax.set(title="which of the inner loss carries the answer?", xlabel="share right, or said",
           xlim=(0, 1.02), ylim=(len(rows) - 0.4, -0.6))

def draw_counts(ax, numbers):
    """Exact match by operands, the largest count never trained."""
    table = numbers["by_operands"]
    ks = [int(k) for k in table]
    for where, (_, colour) in WHERE.items():
        styles = {"whole": "o-"} if where == "theta" else {"whole": "o-", "cut": "s--"}
        for condition, style in styles.items():
            shares = [row[condition][where] for row in table.values()]
            ax.plot(ks, shares, style, color=colour, ms=4)
    ax.set_xticks(ks, [f"{k}" if k in numbers["counts"] else f"{k}\n(not trained)" for k in ks])
    ax.set(title="solid: whole; dashed: last result cut", xlabel="operands", ylabel="share right",
           ylim=(-0.03, 1.05))

def draw_cosines(ax, numbers):
    """Layers that no update moves have no direction, and no dot."""
    layers = numbers["layers"]
    for name, colour in COSINES.items():
        row = numbers["cosine"][name]
        places = [i for i, layer in enumerate(layers) if layer in row]
        whiskers(ax, places, [row[layers[i]] for i in places], colour, label=name)
    zero_line(ax)
    ax.set_xticks(range(len(layers)), layers, rotation=45)
    ax.set(title="explicit update against implicit patch", ylabel="cosine", xlabel="fast layer")
    ax.margins(y=0.35)
    ax.legend(fontsize=7, loc="upper left")
