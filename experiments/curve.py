"""Does the answer's loss fall along a correct trajectory, and along no other? (Figs. 2, 3, 16)

L_hat[i] is the answer's mean NLL after the first i tokens of a trajectory (Algorithm 3,
`analyze.prefix_nll`). It is read along four trajectories of every held-out question:

    correct   every step right, in a random order
    wrong     one result wrong, everything after it consistent with that
    other     a correct trajectory of another question
    filler    as many dots

direction: L_hat falls along `correct`, and further than along each of the others.
progressive: it falls by arithmetic steps rather than at the last. Of L_hat before the trajectory
    and at the end of every step, the Spearman correlation with position is below -0.5, and the
    largest single step makes less than 2/3 of the fall (medians): of three steps, halfway between
    an even slope, 1/3, and a cliff, 1. (A curve that only wavers before its last step meets the
    first at half of the questions by chance; the second tells it from a slope.) `modsum` is
    measured and kept apart: a partial sum modulo 97 says nothing of the answer, so that its curve
    is a cliff by design.

Supported where every 95 % bootstrap interval over questions has the claim's side, refuted where
one has the other side, else inconclusive; of several domains the worst counts. How training cut
its trajectories shapes these curves too: experiments/cuts.py.
"""
import random
from typing import NamedTuple

import numpy as np

from analyze import cells_of, curves_of, questions_of
from data import arithmetic
from lab.figure import COLOURS, band, panels, whiskers, written_under
from lab.flags import fail
from lab.verdict import banded, cliff, decide, interval, spearman, spoken, worst
from meta import another

CLAIM = ("Figs. 2, 3, 16: the answer's loss falls along a correct trajectory only, and "
         "progressively")
CELLS = "expr:4 sum:4 modsum:4"             # domain:operands
KINDS = ("correct", "wrong", "other", "filler")
APART = "modsum"                            # a cliff by design


# --------------------------------------------------------------------------------------- measure

class Cell(NamedTuple):
    """One domain's measurements: lists with an entry a question."""
    operands: int
    questions: list
    thinks: list                            # the correct trajectories, as text
    curves: dict                            # {name: [L_hat, an array (|t| + 1,)]}


def measure(c, model):
    """-> {cell: Cell}"""
    cells = cells_of(c.cells or CELLS)
    return {f"{domain} {k}": measure_cell(c, model, domain, k) for domain, k in cells}

def measure_cell(c, model, domain, operands):
    questions, thinks = trials(c, domain, operands)
    curves = {kind: curves_of(model, questions, thinks[kind]) for kind in KINDS}

    # A wrong trajectory's own conclusion: its loss along that trajectory ...
    implied = [t.rpartition("=")[2] for t in thinks["wrong"]]
    curves["implied"] = curves_of(model, questions, thinks["wrong"], implied)
    # ... and, along the correct one, how much worse it does than the right answer.
    against = curves_of(model, questions, thinks["correct"], implied)
    curves["margin"] = [a - b for a, b in zip(against, curves["correct"])]
    return Cell(operands, questions, thinks["correct"], curves)

def trials(c, domain, operands):
    """Held-out questions that have all four trajectories -> (questions, {kind: [text]})"""
    rng, questions = random.Random(f"{c.seed}/{domain}"), questions_of(c, domain, operands)
    rows = [(q, four_trajectories(q, questions, rng)) for q in questions]
    rows = [(q, thinks) for q, thinks in rows if "wrong" in thinks]
    if not rows:
        fail(f"no wrong trajectory was found for {domain}")
    return [q for q, _ in rows], {kind: [t[kind] for _, t in rows] for kind in KINDS}

def four_trajectories(q, questions, rng):
    """Four trajectories of a question -> {kind: text}, without 'wrong' where no slip changes the
    answer."""
    correct = arithmetic.trajectory(q, rng)
    slip = arithmetic.corrupt(q, rng)
    other = arithmetic.trajectory(another(q, questions, rng), rng)
    thinks = {"correct": correct, "other": other, "filler": "." * len(correct)}
    if slip:
        thinks["wrong"] = ";".join(slip[0])
    return thinks


# ----------------------------------------------------------------------------------------- judge

def judge(cells):
    """{cell: Cell} -> (verdict, {cell: what the JSON keeps})"""
    numbers = {name: judge_cell(cell) for name, cell in cells.items()}
    direction = [n["direction"]["verdict"] for n in numbers.values()]
    progressive = [n["progressive"]["verdict"] for n in numbers.values() if "progressive" in n]
    verdicts = {"direction": worst(direction),
                "progressive": worst(progressive) if progressive else f"not tested ({APART} alone)"}
    return spoken(verdicts), numbers

def judge_cell(cell):
    fall = {kind: np.array([y[0] - y[-1] for y in cell.curves[kind]]) for kind in KINDS}
    steps = [after_steps(t, y) for t, y in zip(cell.thinks, cell.curves["correct"])]
    rho, share = shape(steps)
    apart = cell.questions[0].domain == APART
    return {
        "direction": verdict_of(direction(fall)),
        "progressive, kept apart" if apart else "progressive":
            verdict_of(progressive(rho, share), np.median),
        "operands": cell.operands, "questions": len(cell.questions),
        "spearman_median": interval(rho, np.median),
        "largest_step_median": interval(share, np.median),
        "L_hat_after_steps": [interval(v) for v in np.transpose(steps)],
        "L_hat_end": {kind: interval([y[-1] for y in ys]) for kind, ys in cell.curves.items()},
        "curves": {kind: banded(ys) for kind, ys in cell.curves.items()},
        "example": first(cell)}

def verdict_of(margins, statistic=np.mean):
    verdict, intervals = decide(margins, statistic)
    return {"verdict": verdict, "margins": intervals}

def first(cell):
    """The first question's curve, to be drawn alone."""
    q, think, y = cell.questions[0], cell.thinks[0], cell.curves["correct"][0]
    return {"title": f"{q.text} = {q.answer}", "tokens": think, "L_hat": np.round(y, 4).tolist()}

def after_steps(think, y):
    """L_hat before a trajectory and at the end of each of its arithmetic steps, before the `;`."""
    ends = [i for i, token in enumerate(think) if token == ";"]
    return y[[0, *ends, len(think)]]

def shape(steps):
    """Sequences of `after_steps` -> (Spearman correlation with position, share of the fall that the
    largest step makes), a number a question each"""
    return np.array([spearman(y) for y in steps]), np.array([cliff(y) for y in steps])

def direction(fall):
    """{kind: L_hat[0] - L_hat[|t|], one a question} -> margins"""
    others = {f"more than {kind}": fall["correct"] - v
              for kind, v in fall.items() if kind != "correct"}
    return {"falls": fall["correct"], **others}

def progressive(rho, share):
    return {"spearman below -0.5": -0.5 - rho, "largest step below 2/3": 2 / 3 - share}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    """A column a cell: L_hat by kind; after whole steps; the margin over a wrong answer; one
    trajectory."""
    fig, axes = panels(4, len(numbers), heights=[2.7, 2.3, 2.3, 2.3])
    for (kinds, steps, margin, one), (name, cell) in zip(axes.T, numbers.items()):
        draw_kinds(kinds, cell["curves"])
        kinds.set(title=f"{name} operands, {cell['questions']} questions", ylim=(0, None),
                  xlabel="fraction of the trajectory read")
        draw_steps(steps, cell)
        draw_margin(margin, cell["curves"])
        example = cell["example"]
        written_under(one, example["tokens"], example["L_hat"], COLOURS["correct"])
        one.set(title=example["title"], xlabel="token of the trajectory", ylim=(0, None))
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\hat{L}$ (nats a token)")
    axes[0, 0].legend(fontsize=7)
    return fig

def draw_kinds(ax, curves):
    for kind in KINDS:
        band(ax, curves[kind], COLOURS[kind], kind)
    band(ax, curves["implied"], COLOURS["wrong"], "wrong: the answer it implies", "--")

def draw_steps(ax, cell):
    """Along the correct trajectory, at the end of every arithmetic step."""
    rows = cell["L_hat_after_steps"]
    whiskers(ax, range(len(rows)), rows, COLOURS["correct"])
    rho, share = cell["spearman_median"][0], cell["largest_step_median"][0]
    ax.set(title=f"after whole steps: Spearman {rho:.2f},\nlargest step {share:.0%} of the fall",
           xticks=range(len(rows)), xlabel="steps of the correct trajectory", ylim=(0, None))

def draw_margin(ax, curves):
    """How much less a wrong answer is believed than the right one."""
    band(ax, curves["margin"], COLOURS["correct"])
    lowest = min(0, *curves["margin"]["mean"])
    ax.set(ylim=(lowest, None), title=r"$\hat{L}$ of a wrong answer - the right one's",
           xlabel="fraction of the trajectory read")
