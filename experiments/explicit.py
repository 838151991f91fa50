"""What does theta' know after it was moved along a trajectory? (Eq. 4, made explicit)

theta' is theta moved along a trajectory by one inner step, and is then asked questions without any.
The trajectory's question is held out; most of what is asked about it is not. Sizes are its operand
counts, as in training.

it carries results: asked another operation on the trajectory's last two results, the two swapped,
    one of them, an operation beyond, or the question itself, theta' of the largest trained size is
    right more often than theta. Asked the question itself, it is so more often than theta' after
    another question's trajectory.
it leaves the rest alone: facts, and unrelated questions as long as the trajectory's, are answered
    at most 3 points worse than by theta.
as the context does: asked the question itself, with the last state missing or not, theta' is at
    most 3 points worse than the trajectory in the context.
two curves coincide: L_q(theta'_i) after i states in the weights and L_hat after i states in the
    context agree question by question, for 1 <= i < n: a rank correlation of at least 0.8 of that
    between the context and the context along another order of the same steps, and a distance of at
    most half of what it is when questions swap partners.

Supported where all 95 % intervals over questions lie above 0, refuted where one lies below, else
inconclusive.
"""
import random

import numpy as np

from analyze import explicit_curves
from data import arithmetic
from experiments import others_of
from experiments.curve import foretold, in_context, nearer, rank_correlation
from experiments.figure import BESIDE, COLOURS, band, losses, panels
from lab.flags import fail
from lab.score import commonest, held_out, shallow
from lab.verdict import decide_all, interval
from meta import outcomes

CLAIM = "Eq. 4: theta', moved along a trajectory, knows what the trajectory found"
CARRIED = ("sibling", "swapped", "left", "right", "beyond", "cut")
TOGETHER = ("sibling", "swapped", "left", "right")      # what one theta' is asked
LABELS = {"sibling": "another last operation", "swapped": "its two sides swapped",
          "left": "its left side", "right": "its right side", "beyond": "a question that goes on",
          "cut": "itself, last state missing", "whole": "itself", "fact": "a fact, such as 3+4",
          "unrelated": "an unrelated question", "other": "itself, after another's"}
WHERE = {"theta": ("theta", r"$\theta$"), "theta_prime": ("weights", r"$\theta'$"),
         "in_context": ("correct", "in the context")}


def measure(c, runs):
    """-> ({operands: {kind: {where: truths}}}, {operands: {who answers without it: share}},
    {context, reordered, weights, other, predicted: losses (N, states)})."""
    model, inner, config = runs.meta()
    largest, table, lines = max(config.counts), {}, {}
    if largest < 4:                                 # the sides of an operation are no questions yet
        fail(f"--meta={c.meta}: trajectories of 4 operands or more are expected, these have 3")
    for n in (largest, largest + 1):
        questions = held_out("expr", n, c.questions)
        lines[n] = {"guess the commonest digit": commonest(questions),
                    "guess by the last operation": float(np.mean(shallow(questions)))}
        table[n], together = {}, {where: np.ones(len(questions), bool) for where in WHERE}
        for kind in LABELS:
            row, batch = outcomes(model, inner, questions, kind, config.style, c.seed)
            table[n][kind] = {where: np.array(ok) for where, ok in row.items()}
            for where in WHERE if kind in TOGETHER else ():
                together[where][[questions.index(task.solved) for task in batch]] &= row[where]
        table[n]["together"] = together
    questions = held_out("expr", largest, c.questions // 2)
    rng = random.Random(f"{c.seed}/explicit")
    steps, orders = ([arithmetic.steps(q, rng, config.style)[0] for q in questions]
                     for _ in range(2))
    others, theirs = zip(*others_of(questions, list(zip(questions, steps)), rng))
    other = explicit_curves(model, inner, questions, theirs, others)
    return table, lines, {
        "context": in_context(model, questions, steps),
        "reordered": in_context(model, questions, orders),
        "weights": np.stack(explicit_curves(model, inner, questions, steps)),
        "predicted": foretold(model, questions, steps), "other": np.stack(other)}


def judge(raw):
    table, lines, curves = raw
    size, largest = next(iter(table.items()))
    moved = {kind: row["theta_prime"].astype(float) for kind, row in largest.items()}
    margins = {
        "it carries results":
            {f"{kind}: theta' - theta": moved[kind] - largest[kind]["theta"] for kind in CARRIED}
            | {"cut: theta' - after another's": moved["cut"] - moved["other"]},
        "it leaves the rest alone":
            {f"{kind}: theta' - theta + 3 points": moved[kind] - largest[kind]["theta"] + 0.03
             for kind in ("fact", "unrelated")},
        "as the context does":
            {f"{kind}: theta' - context + 3 points": moved[kind] - largest[kind]["in_context"]
             + 0.03 for kind in ("cut", "whole")}}
    verdicts, gaps = decide_all(margins | {"two curves coincide": coincide(curves)})
    return verdicts, {
        "gaps": gaps, "largest": size, "lines": {str(n): row for n, row in lines.items()},
        "table": {str(n): {kind: {where: interval(ok) for where, ok in row.items()}
                      for kind, row in kinds.items()} for n, kinds in table.items()},
        "curves": {name: [interval(column) for column in y.T] for name, y in curves.items()}}

def coincide(curves):
    """Compares two curves at every number of states but none and all -> margins."""
    margins = {}
    for i in range(1, curves["context"].shape[1] - 1):
        w, h, again = (curves[name][:, i] for name in ("weights", "context", "reordered"))
        margins[f"{i} states: rank correlation - 0.8 of the ceiling"] = (
            np.stack((w, h, again), 1), below_ceiling)
        margins[f"{i} states: half of swapped - distance"] = nearer(w, h)
    return margins

def below_ceiling(triples, axis):
    """(weights, context, context again), (..., N, 3) -> the first two's rank correlation less 0.8
    of the last two's."""
    return (rank_correlation(triples[..., :2], axis)
            - 0.8 * rank_correlation(triples[..., 1:], axis))


def draw(numbers):
    fig, curves, kinds = panels(2, 4.8, 3.6)
    names = {"context": ("correct", "in the context"), "weights": ("weights", "in the weights"),
             "other": ("other", "in the weights, another question's")}
    for name, (colour, label) in names.items():
        y = numbers["curves"][name]
        band(curves, range(len(y)), y, COLOURS[colour], label)
    predicted = [mean for mean, _, _ in numbers["curves"]["predicted"]]
    curves.plot(predicted, "k--", lw=1.2, label="what is left, as a question")
    losses(curves, title="One trajectory, in the context and in the weights", ylim=(0, 3),
           xlabel="states of the trajectory", ylabel="loss of the answer (nats)")
    n = numbers["largest"]
    for shift, (where, (colour, label)) in zip((-0.2, 0, 0.2), WHERE.items()):
        # Only where it is asked its own question can the context know more.
        asked = ("cut", "whole") if where == "in_context" else LABELS
        mean, low, high = np.transpose([numbers["table"][f"{n}"][kind][where] for kind in asked])
        y = [[*LABELS].index(kind) + shift for kind in asked]
        kinds.errorbar(mean, y, xerr=(mean - low, high - mean), fmt="o", ms=3,
                       color=COLOURS[colour], label=label)
    for style, (name, share) in zip((":", "--"), numbers["lines"][f"{n}"].items()):
        kinds.axvline(share, color="#bbbbbb", lw=0.8, ls=style, zorder=0, label=name)
    kinds.set_yticks(range(len(LABELS)), LABELS.values(), fontsize=7)
    kinds.invert_yaxis()
    kinds.set(title=f"Asked after a trajectory of {n} numbers", xlabel="share of right answers",
              xlim=(0, 1.02))
    kinds.legend(**BESIDE)
    return fig

def show(numbers):
    lines = []
    for n, kinds in numbers["table"].items():
        shares = [f"{kind} {100 * row['theta_prime'][0]:.0f} ({100 * row['theta'][0]:.0f})"
                  for kind, row in kinds.items()]
        lines.append(f"{n} operands, theta' (theta) right in %: {', '.join(shares)}")
    return lines
