"""Does theta', moved along a trajectory, reason on from there? (Eq. 4, made explicit)

The trajectory in the weights beside the trajectory in the context, on the run of --meta: theta' is
theta moved along a trajectory, and is asked a question without any.

further: the question goes an operation beyond the trajectory. After `3+5=8;8*2=16` it is
((3+5)*2)-4: its answer stands nowhere in what the inner loop read, nor can be found while reading.

Supported if theta' then answers more held-out questions of the trained operand counts than theta
does, and than theta' after such a trajectory of another question; if, where the last result is
wrong, it says what follows from that more often than what is right; and if at least half are right
(else inconclusive). Differences with 95 % bootstrap intervals above 0; refuted if one lies below.

cut: the trajectory is the question's own, without its last result. That theta' answers then need
not be reasoning in the weights: the result can be found while reading, and written down by one
token's gradient. What carries an answer is looked for in both: the inner loss on </think> alone, or
on all but it; the same trajectory behind another question; theta' asked another question, and
whether it then says this one's answer; and plain gradient steps on the model that meta-training
started from (rate, temperature and steps chosen on validation).
"""
import copy
import itertools
import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from analyze import cosines, curves_of, explicit_curves, others_of, untrained
from data import arithmetic, text
from lab.figure import COLOURS, INK, band, mosaic, whisker, whiskers, zero_line
from lab.flags import fail
from lab.score import averaged, held_out
from lab.verdict import banded, decide, interval
from meta import CONDITIONS, Inner, another, answers, meta_test, trial

CLAIM = "Eq. 4: theta', moved along a trajectory, carries its results and reasons on from them"

# {where the answer comes from: (label, colour)}
WHERE = {
    "theta": (r"$\theta$, no trajectory", COLOURS["theta"]),
    "theta_prime": (r"$\theta'$, trajectory in the weights", COLOURS["weights"]),
    "in_context": ("trajectory in the context", COLOURS["correct"])}
LABELS = {
    "further": "an operation\nbeyond it", "further_wrong": "that, after a\nwrong result",
    "further_other": "that, after\nanother's", "whole": "its own,\nwhole",
    "cut": "its own, last\nresult cut", "cut2": "its own,\nlast 2 cut",
    "other": "another\nquestion's", "corrupted_last": "its own, last\nresult wrong"}
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
    carriers: dict                          # {condition: {what was changed: right? a question}}


def measure(c, run, model):
    plain, (model, inner, config) = model, run
    mode, counts = config["inner"], [int(k) for k in config["operands"].split(",")]
    domain, largest = config["domain"], max(counts)
    table = meta_test(model, inner, {domain: (*counts, largest + 1)}, c.questions, mode, c.seed)

    rng = random.Random(f"{c.seed}/explicit")
    trials = {condition: trials_of(c, domain, largest, condition, rng)
              for condition in ("further", "cut")}
    qs, thinks, solved = trials["further"]
    others = others_of(qs, thinks, rng)
    curves = {
        "context": curves_of(model, qs, thinks),
        "weights": explicit_curves(model, inner, qs, thinks, mode, solved=solved),
        "other": explicit_curves(model, inner, qs, others, mode, solved=solved)}

    wholes = [arithmetic.trajectory(q, rng) for q in qs][:100]
    others = others_of(qs[:100], wholes, rng)
    same, swapped = list(zip(qs, wholes, wholes)), list(zip(qs, others, wholes))
    alike = {
        "trained": cosines(model, inner, same, mode),
        "untrained": cosines(untrained(model), inner, same, mode),
        "other question's trajectory": cosines(model, inner, swapped, mode)}
    carried = {}
    for condition, (qs, thinks, solved) in trials.items():
        carried[condition] = carriers(model, inner, qs, thinks, solved, mode, rng)
        carried[condition]["plain steps, theta of SFT"] = plain_steps(
            c, plain, inner.names, (qs, thinks, solved), condition, rng)
    return Raw(domain, counts, inner.names, table[domain], curves, alike, carried)

def trials_of(c, domain, operands, condition, rng, part=None):
    """Held-out questions under a condition -> (questions, trajectories, what those solve)"""
    questions = held_out(domain, operands, 2 * c.questions, part)
    trials = [(q, trial(q, questions, condition, rng)) for q in questions]
    trials = [(q, t) for q, t in trials if t][:c.questions]
    qs, solved = [q for q, _ in trials], [t.solved for _, t in trials]
    if min(len({q.answer for q in qs}), len({q.answer for q in solved})) < 2:
        fail(f"--questions={c.questions}: the controls need two questions with different answers")
    return qs, [t.think for _, t in trials], solved

def carriers(model, inner, qs, thinks, solved, mode, rng):
    """Where the answer may come from -> {what was changed: right, or said? a question}"""
    strangers = [another(q, solved, rng) for q in solved]
    closing = [token == text.END_THINK for token in range(text.VOCAB)]

    def right(inner, solved, asked=qs):
        said = answers(model, asked, thinks, inner, mode=mode, solved=solved)
        return said, [arithmetic.verify(q, a) for q, a in zip(asked, said)]

    asked = [another(q, qs, rng) for q in qs]
    said, right_of_asked = right(inner, solved, asked)
    return {
        "all of the inner loss": right(inner, solved)[1],
        "</think> alone": right(heeding(inner, closing), solved)[1],
        "all but </think>": right(heeding(inner, np.invert(closing)), solved)[1],
        "behind another question": right(inner, strangers)[1],
        "asked another: right": right_of_asked,
        "asked another: says this one's": [a == q.answer for q, a in zip(qs, said)]}

def heeding(inner, tokens):
    """An inner loop whose loss knows some tokens of the vocabulary only (a bool each)."""
    new = copy.deepcopy(inner)
    new.heeded *= torch.tensor(tokens, device=new.heeded.device)
    return new

def plain_steps(c, model, names, tried, condition, rng):
    """Gradient steps on a model that never was meta-trained, the best of GRID on 50 validation
    questions -> right? a question"""
    def right(setting, qs, thinks, solved):
        rate, tau, K = setting
        inner = Inner(names, K, rate, tau).to(model.head.weight.device)
        said = answers(model, qs, thinks, inner, solved=solved)
        return [arithmetic.verify(q, a) for q, a in zip(qs, said)]
    first = tried[0][0]
    val = trials_of(replace(c, questions=50), first.domain, first.operands, condition, rng, "val")
    best = max(GRID, key=lambda setting: sum(right(setting, *val)))
    return right(best, *tried)


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    pooled = pool(raw.table, raw.counts)
    verdict, gaps = decide_on(pooled)
    return verdict, {
        "gaps": gaps, "domain": raw.domain, "counts": raw.counts, "layers": raw.layers,
        "questions": {name: len(row["theta"]) for name, row in pooled.items()},
        "exact_match": intervals(pooled), "by_operands": averaged(raw.table),
        "carriers": intervals(raw.carriers), "cosine": intervals(raw.cosines),
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
    further, wrong = pooled["further"], pooled["further_wrong"]
    right, other = further["theta_prime"], pooled["further_other"]["theta_prime"]
    verdict, gaps = decide({
        "further, theta' - theta": np.subtract(right, further["theta"], dtype=float),
        "further, theta' - after another's": np.subtract(right, other, dtype=float),
        "its result wrong, says what follows - right":
            np.subtract(wrong["implied"], wrong["theta_prime"], dtype=float)})
    if verdict == "supported" and np.mean(right) < 0.5:
        verdict = "inconclusive"
    return verdict, gaps

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
    ax.set(title=f"a question an operation beyond ({numbers['domain']}, {max(numbers['counts'])} "
                 "operands)", xlabel="fraction of the trajectory read",
           ylabel="answer's NLL (nats a token)", ylim=(0, None))
    ax.legend(fontsize=8)

def draw_bars(ax, numbers, conditions=LABELS):
    """Exact match by what trajectory there was, and where it was."""
    rows = {name: numbers["exact_match"][name] for name in conditions
            if name in numbers["exact_match"]}
    for j, (where, (label, colour)) in enumerate(WHERE.items()):
        for i, row in enumerate(rows.values()):
            whisker(ax, i + (j - 1) * 0.27, row[where], colour, width=0.25,
                    label=label if i == 0 else None)
    marks = [(i, row["implied"][0]) for i, row in enumerate(rows.values()) if "implied" in row]
    if marks:
        ax.plot(*zip(*marks), "D", color=INK, ms=5, label=r"$\theta'$ says what it implies")
    ax.set_xticks(range(len(rows)), [LABELS[name] for name in rows], fontsize=7.5)
    counts = " and ".join(map(str, numbers["counts"]))
    ax.set(title=f"the question, and the trajectory read ({counts} operands, held out)",
           ylabel="share right", ylim=(0, 1.3), yticks=np.linspace(0, 1, 6))
    ax.legend(ncols=2, loc="upper center")

def draw_carriers(ax, numbers):
    """Share right, by what the inner loop was given and theta' was asked."""
    looks = {"further": ("an operation beyond", COLOURS["weights"]),
             "cut": ("last result cut", COLOURS["light"])}
    names = list(numbers["carriers"]["further"])
    for j, (condition, (label, colour)) in enumerate(looks.items()):
        for i, (mean, low, high) in enumerate(numbers["carriers"][condition].values()):
            y = i + 0.38 * (j - 0.5)
            ax.barh(y, mean, 0.36, color=colour, label=label if i == 0 else None)
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="none", ecolor=INK, lw=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(title=f"what carries the answer? ({max(numbers['counts'])} operands)",
           xlabel="share right, or said", xlim=(0, 1.02), ylim=(len(names) - 0.4, -0.6))
    ax.legend(fontsize=7, loc="lower right")

def draw_counts(ax, numbers):
    """Exact match by operands, the largest count never trained."""
    table = numbers["by_operands"]
    ks = [int(k) for k in table]
    for where, (_, colour) in WHERE.items():
        styles = {"further": "o-", "cut": "s--"}
        for condition, style in styles.items():
            shares = [row[condition][where] for row in table.values()]
            ax.plot(ks, shares, style, color=colour, ms=4)
    ax.set_xticks(ks, [f"{k}" if k in numbers["counts"] else f"{k}\n(not trained)" for k in ks])
    ax.set(title="solid: an operation beyond; dashed: cut", xlabel="operands", ylabel="share right",
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
