"""Does the answer's loss fall along a correct trajectory, and along no other? (Figs. 2, 3, 16)

L_hat[i] is the answer's mean NLL after the first i tokens of a trajectory (Algorithm 3,
`analyze.prefix_nll`). It is read along four trajectories of every held-out question:

    correct   every step right, in a random order
    wrong     one result wrong, everything after it consistent with that
    other     a correct trajectory of another question
    filler    as many dots

direction: L_hat falls along `correct`, and further than along each of the others.
progressive: half of the questions have a Spearman correlation of L_hat and position below
    -0.5, and a curve whose largest 5 % of steps make less than half of its fall (medians).

Supported where every 95 % bootstrap interval over questions has the claim's side, refuted where
one has the other side, else inconclusive; of several domains the worst counts.
"""
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analyze import cells_of, curves_of, questions_of
from data import arithmetic
from lab.figure import COLOURS, band, panels, written_under
from lab.flags import fail
from lab.verdict import banded, cliff, decide, interval, spearman, spoken, worst
from meta import another
from train import load_model

CLAIM = ("Figs. 2, 3, 16: the answer's loss falls along a correct trajectory only, and "
         "progressively")
CELLS = "expr:4 sum:4 modsum:4"             # domain:operands
KINDS = ("correct", "wrong", "other", "filler")


# --------------------------------------------------------------------------------------- measure

class Cell(NamedTuple):
    """One domain's measurements: lists with an entry a question."""
    operands: int
    questions: list
    thinks: list                            # the correct trajectories, as text
    curves: dict                            # {name: [L_hat, an array (|t| + 1,)]}


def measure(c, model):
    """-> {cell: Cell}"""
    path = Path(c.uncut) / "ckpt.pt"        # a model that never saw a trajectory cut short
    uncut = load_model(path, model.head.weight.device)[0] if path.exists() else None
    cells = cells_of(c.cells or CELLS)
    return {f"{domain} {k}": measure_cell(c, model, uncut, domain, k) for domain, k in cells}

def measure_cell(c, model, uncut, domain, operands):
    questions, thinks = trials(c, domain, operands)
    curves = {kind: curves_of(model, questions, thinks[kind]) for kind in KINDS}

    # A wrong trajectory's own conclusion: its loss along that trajectory ...
    implied = [t.rpartition("=")[2] for t in thinks["wrong"]]
    curves["implied"] = curves_of(model, questions, thinks["wrong"], implied)
    # ... and, along the correct one, how much worse it does than the right answer.
    against = curves_of(model, questions, thinks["correct"], implied)
    curves["margin"] = [a - b for a, b in zip(against, curves["correct"])]

    if uncut:
        curves["uncut"] = curves_of(uncut, questions, thinks["correct"])
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
    parts = ("direction", "progressive")
    verdicts = {part: worst([n[part]["verdict"] for n in numbers.values()]) for part in parts}
    return spoken(verdicts), numbers

def judge_cell(cell):
    fall = {kind: np.array([y[0] - y[-1] for y in cell.curves[kind]]) for kind in KINDS}
    rho, share = shape(cell.curves["correct"])
    numbers = {
        "direction": verdict_of(direction(fall)),
        "progressive": verdict_of(progressive(rho, share), np.median),
        "operands": cell.operands, "questions": len(cell.questions),
        "spearman_median": interval(rho, np.median),
        "cliff_share_median": interval(share, np.median),
        "L_hat_start": interval([y[0] for y in cell.curves["correct"]]),
        "L_hat_end": {kind: interval([y[-1] for y in ys]) for kind, ys in cell.curves.items()},
        "curves": {kind: banded(ys) for kind, ys in cell.curves.items()},
        "example": first(cell)}
    if "uncut" in cell.curves:
        rho, share = shape(cell.curves["uncut"])
        numbers["uncut"] = {"spearman_median": interval(rho, np.median),
                            "cliff_share_median": interval(share, np.median)}
    return numbers

def verdict_of(margins, statistic=np.mean):
    verdict, intervals = decide(margins, statistic)
    return {"verdict": verdict, "margins": intervals}

def first(cell):
    """The first question's curve, to be drawn alone."""
    q, think, y = cell.questions[0], cell.thinks[0], cell.curves["correct"][0]
    return {"title": f"{q.text} = {q.answer}", "tokens": think, "L_hat": np.round(y, 4).tolist()}

def shape(curves):
    """-> (Spearman correlation of every curve, cliff share of every curve that falls)"""
    shares = [cliff(y) for y in curves]
    return np.array([spearman(y) for y in curves]), np.array([s for s in shares if s is not None])

def direction(fall):
    """{kind: L_hat[0] - L_hat[|t|], one a question} -> margins"""
    others = {f"more than {kind}": fall["correct"] - v
              for kind, v in fall.items() if kind != "correct"}
    return {"falls": fall["correct"], **others}

def progressive(rho, share):
    share = share if len(share) else np.ones(1)     # no curve falls: no slope either
    return {"spearman below -0.5": -0.5 - rho, "cliff share below 0.5": 0.5 - share}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    """A column a cell: L_hat by kind; the margin over a wrong answer; one trajectory."""
    uncut = any("uncut" in cell["curves"] for cell in numbers.values())
    fig, axes = panels(3 + uncut, len(numbers), heights=[2.7, 2.3] + [2.3] * uncut + [2.3])
    for column, (name, cell) in zip(axes.T, numbers.items()):
        draw_kinds(column[0], cell["curves"])
        title = f"{name} operands, {cell['questions']} questions"
        column[0].set(title=title, ylim=(0, None))
        draw_margin(column[1], cell["curves"])
        if uncut:
            band(column[2], cell["curves"]["uncut"], COLOURS["light"])
            column[2].set(title=r"trained without truncation: $\hat{L}$, correct", ylim=(0, None),
                          xlabel="fraction of the trajectory read")
        example = cell["example"]
        written_under(column[-1], example["tokens"], example["L_hat"], COLOURS["correct"])
        column[-1].set(title=example["title"], xlabel="token of the trajectory", ylim=(0, None))
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\hat{L}$ (nats a token)")
    axes[0, 0].legend(fontsize=7)
    return fig

def draw_kinds(ax, curves):
    for kind in KINDS:
        band(ax, curves[kind], COLOURS[kind], kind)
    band(ax, curves["implied"], COLOURS["wrong"], "wrong: the answer it implies", "--")

def draw_margin(ax, curves):
    """How much less a wrong answer is believed than the right one."""
    band(ax, curves["margin"], COLOURS["correct"])
    lowest = min(0, *curves["margin"]["mean"])
    ax.set(ylim=(lowest, None), title=r"$\hat{L}$ of a wrong answer - the right one's")
