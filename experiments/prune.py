"""Has a long trajectory a short equivalent? (Fig. 11)

Steps of the model's own trajectory are deleted until none is left: the step with the least |change
of L_hat|, measured again after every deletion; a random one; the last (budget forcing). Beside them
the oracle's `short` trajectory. Each also with its last result cut off, as a control for the
answer's standing there.

Supported if the short one is as good as the whole (within 5 points), and deletion by the least
change (to half the steps) beats random deletion, with and without the last result: 95 % intervals
over questions above 0; refuted if one lies below 0; else inconclusive.
"""
import random
from typing import NamedTuple

import numpy as np
import torch

from analyze import cell_of, curves_of, queries, row_loss
from data import arithmetic, text
from data.tasks import without_results
from lab.figure import COLOURS, panels, whiskers
from lab.flags import fail
from lab.score import respond
from lab.verdict import decide, interval
from meta import answers

CLAIM = "Fig. 11: a long trajectory has a short equivalent"
WAYS = {                                    # {way: (label, colour)}
    "least change": ("least change deleted", COLOURS["weights"]),
    "random": ("a random one deleted", COLOURS["other"]),
    "truncated": ("the last deleted", COLOURS["wrong"]),
    "own": ("whole, the model's own", COLOURS["correct"]),
    "oracle short": ("the oracle's short one", COLOURS["theta"])}


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    """{(way, steps left): ...}, ', cut' behind a way whose last result is cut off."""
    title: str
    steps: int                              # of a whole trajectory
    right: dict                             # is the answer right? a question
    loss: dict                              # its NLL, a question
    length: dict                            # tokens of a trajectory, mean


def measure(c, model):
    cell, rng = cell_of(c, "sum:5"), random.Random(f"{c.seed}/prune")
    written = [t for t, _ in respond(model, cell.questions)]
    pairs = [(q, t.split(";")) for q, t in zip(cell.questions, written) if one_a_step(q, t)]
    if not pairs:
        fail(f"{c.sft}: this model writes no trajectories of an operation a step to shorten")
    qs, trajectories = [q for q, _ in pairs], [steps for _, steps in pairs]
    size = len(trajectories[0])
    ways = shortened(model, qs, trajectories, rng)
    ways["own", size] = [";".join(steps) for steps in trajectories]
    ways["oracle short", 0] = [arithmetic.trajectory(q, rng, "short") for q in qs]

    raw = Raw(cell.title, size, {}, {}, {})
    for (way, left), thinks in ways.items():
        for cut in (False, True):
            if cut and not all("=" in t for t in thinks):
                continue
            key = way + ", cut" * cut, left
            shown = [without_results(t, 1) if cut else t for t in thinks]
            said = answers(model, qs, shown, where="in_context", size=1024)
            right = [arithmetic.verify(q, a) for q, a in zip(qs, said)]
            raw.right[key] = np.array(right, dtype=float)
            with torch.no_grad():
                loss = row_loss(model, *queries(model, qs, shown))
            raw.loss[key] = loss.cpu().numpy()
            raw.length[key] = float(np.mean([len(t) for t in shown]))
    return raw

def one_a_step(q, t):
    """Is it a trajectory of one operation a step, so that every step can be deleted?"""
    return text.plain(t) and t.count("=") == q.operands - 1 == t.count(";") + 1

def shortened(model, questions, trajectories, rng):
    """-> {(way, steps left): trajectories as text}"""
    size, ways = len(trajectories[0]), {}
    kept = {way: [list(steps) for steps in trajectories]
            for way in ("least change", "random", "truncated")}
    for left in range(size, -1, -1):
        for way, rows in kept.items():
            ways[way, left] = [";".join(steps) for steps in rows]
        if left:
            curves = curves_of(model, questions, ways["least change", left])
            for steps, y in zip(kept["least change"], curves):
                del steps[int(np.argmin(changes(steps, y)))]
            for steps in kept["random"]:
                del steps[rng.randrange(left)]
            for steps in kept["truncated"]:
                del steps[-1]
    return ways

def changes(steps, y):
    """|Change of L_hat| over every step of a trajectory, its `;` included."""
    ends = np.cumsum([0] + [len(step) + 1 for step in steps])
    ends[-1] -= 1                           # no `;` behind the last
    return [abs(y[b] - y[a]) for a, b in zip(ends, ends[1:])]


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    half = raw.steps // 2
    right = {"own": raw.right["own", raw.steps], "oracle short": raw.right["oracle short", 0]}
    for way in ("least change", "random", "least change, cut", "random, cut"):
        right[way] = raw.right[way, half]
    verdict, gaps = decide(margins(right))
    points = [{"way": way, "steps": left, "tokens": round(raw.length[way, left], 1),
               "right": interval(v.astype(bool)), "L_hat": interval(raw.loss[way, left])}
              for (way, left), v in raw.right.items()]
    return verdict, {"gaps": gaps, "title": raw.title, "questions": len(right["own"]),
                     "points": points}

def margins(right):
    """{way: right or not, a question} -> margins"""
    return {
        "short - own + 0.05": right["oracle short"] - right["own"] + 0.05,
        "least change - random": right["least change"] - right["random"],
        "least change - random, last result cut":
            right["least change, cut"] - right["random, cut"]}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((right, cut, loss),) = panels(1, 3, width=4, heights=[3.5])
    for ax, key, suffix in ((right, "right", ""), (cut, "right", ", cut"), (loss, "L_hat", "")):
        for way, (label, colour) in WAYS.items():
            rows = [p for p in numbers["points"] if p["way"] == way + suffix]
            rows.sort(key=steps_left)
            if rows:
                size = 6 if len(rows) == 1 else 3
                whiskers(ax, [p["tokens"] for p in rows], [p[key] for p in rows], colour,
                         label=label, ms=size)
        ax.set(xlabel="tokens of the trajectory", xlim=(-1.5, None))
    right.set(ylabel="share right", ylim=(-0.03, 1.05), title=numbers["title"])
    cut.set(ylabel="share right", ylim=(-0.03, 1.05), title="last result cut off")
    loss.set(ylabel=r"$\hat{L}$, answer's NLL (nats a token)", title="loss, nothing cut off")
    right.legend(fontsize=8)
    return fig

def steps_left(point):
    return point["steps"]
