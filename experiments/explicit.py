"""Can an inner loop along a trajectory carry what the answer needs? (Eq. 4, made explicit)

The trajectory in the weights beside the trajectory in the context, on the run of --meta: theta' is
theta moved along the trajectory, and is asked the question without any.

Supported if theta', after a trajectory whose last result is cut off, answers more held-out
questions of the trained operand counts than theta does, and more than it does after another
question's whole trajectory: differences with 95 % bootstrap intervals above 0, and at least half
right. Refuted if an interval lies below 0 or contains it, else inconclusive. (With the whole
trajectory theta' could merely copy.)
"""
import random
from typing import NamedTuple

import numpy as np

from analyze import cosines, curves_of, explicit_curves, others_of, questions_of, untrained
from data import arithmetic
from lab.figure import COLOURS, INK, band, mosaic, whisker, whiskers, written_under, zero_line
from lab.score import averaged
from lab.verdict import banded, interval
from meta import CONDITIONS, meta_test, outcomes

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
    example: tuple                          # (title, trajectory)
    cosines: dict                           # {condition: {layer: [cosine, a question]}}
    untrained: dict                         # `outcomes` of a model that never learned


def measure(c, run):
    model, inner, config = run
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
    title = f"{qs[0].text} = {qs[0].answer}"
    return Raw(domain, counts, inner.names, table, curves, (title, thinks[0]), alike, nothing)


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    pooled = pool(raw.table, raw.counts)
    verdict, gaps = decide_on(pooled)
    title, tokens = raw.example
    return verdict, {
        "gaps": gaps, "domain": raw.domain, "counts": raw.counts, "layers": raw.layers,
        "questions": {name: len(row["theta"]) for name, row in pooled.items()},
        "exact_match": intervals(pooled), "by_operands": averaged(raw.table),
        "untrained": {where: interval(v) for where, v in raw.untrained.items()},
        "cosine": intervals(raw.cosines),
        "curves": {kind: banded(ys) for kind, ys in raw.curves.items()},
        "example": {"title": title, "tokens": tokens,
                    "loss": {kind: np.round(ys[0], 4).tolist() for kind, ys in raw.curves.items()}}}

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
    layout = [["curves", "bars", "bars"], ["example", "counts", "cosines"]]
    fig, axes = mosaic(layout, (12, 6.8), width_ratios=(1.2, 1, 1))
    draw_curves(axes["curves"], numbers)
    draw_bars(axes["bars"], numbers)
    draw_example(axes["example"], numbers["example"])
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

def draw_example(ax, example):
    for kind in ("context", "weights"):
        label, colour = CURVES[kind]
        written_under(ax, example["tokens"], example["loss"][kind], colour, label)
    ax.set(title=example["title"], xlabel="token of the trajectory",
           ylabel="answer's NLL (nats a token)", ylim=(0, None))

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
