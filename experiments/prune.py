"""Has a long trajectory a short equivalent? (Fig. 11)

Trajectories are given to the model in the context, and the answer is read behind them:

    whole     an operation a step; where the run was trained on `reflect`, two of the steps with a
              slip before them, `a=1Wa=2`, so that there is something to spare
    long      the same without its slips
    short     the oracle's: up to two operations a step

and whole ones from which part after part is deleted, a part being a step or a slip: that with the
least |change of L_hat|, measured again after every deletion; a random one; the last (budget
forcing). At the end of whole, long and short ones stands the answer, and may be copied: so each is
also read with its last result cut off.

short equivalent: short is as good as long, within 5 points. Only where the run saw short ones.
slips can be spared: long is as good as whole, within 5 points. Only where it saw `reflect`.
least change finds slips: of as many deleted parts as there are slips, more are slips than of random
    ones. Only where it saw `reflect`.
least change beats random: with as many parts deleted (of a trajectory without slips, half), more
    answers are right, and with the last result cut off too.

Each is supported if its 95 % intervals over questions lie above 0, refuted if one lies below 0,
else inconclusive. A model of all three styles: train.py --style=long,short,reflect.
"""
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from analyze import cell_of, curves_of, queries, row_loss
from data import arithmetic
from lab.figure import COLOURS, panels, whiskers
from lab.flags import fail
from lab.run import load
from lab.verdict import decide, interval, spoken
from meta import answers

CLAIM = "Fig. 11: a long trajectory has a short equivalent"
SLIPS = 2
WAYS = {                                    # {way: (label, colour)}
    "least change": ("least change deleted", COLOURS["weights"]),
    "random": ("a random one deleted", COLOURS["other"]),
    "last": ("the last deleted", COLOURS["wrong"]),
    "whole": ("whole, with slips", COLOURS["filler"]),
    "long": ("long, no slips", COLOURS["correct"]),
    "short": ("short", COLOURS["theta"])}
NEEDED = {                                  # {part of the claim: the style it needs}
    "short equivalent": "short", "slips can be spared": "reflect",
    "least change finds slips": "reflect"}


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    """{(way, parts left): ...}, ', cut' behind a way whose last result is cut off."""
    title: str
    styles: list                            # that the run was trained on
    size: int                               # parts of a whole trajectory
    slips: int                              # how many of them are slips
    right: dict                             # is the answer right? a question
    loss: dict                              # its NLL, a question
    spared: dict                            # how many slips are deleted, a question
    length: dict                            # tokens of a trajectory, mean


def measure(c, model):
    styles = load(Path(c.sft) / "ckpt.pt")["config"]["style"].split(",")
    if not {"long", "reflect"} & set(styles):
        fail(f"{c.sft}: this model saw no trajectories of an operation a step to shorten")
    cell, rng = cell_of(c, "sum:5"), random.Random(f"{c.seed}/prune")
    qs = cell.questions
    slips = min(SLIPS, qs[0].operands - 1) if "reflect" in styles else 0
    wholes = [parts_of(with_slips(q, rng, slips)) for q in qs]
    size, ways = len(wholes[0]), shortened(model, qs, wholes, rng)
    ways["whole", size] = [joined(parts) for parts in wholes]
    ways["long", size - slips] = [joined([p for p in parts if p[-1] != "W"]) for parts in wholes]
    ways["short", 0] = [arithmetic.trajectory(q, rng, "short") for q in qs]

    raw = Raw(cell.title, styles, size, slips, {}, {}, {}, {})
    for (way, left), thinks in ways.items():
        read(raw, (way, left), model, qs, thinks)
        if all("=" in t for t in thinks):
            read(raw, (f"{way}, cut", left), model, qs, [t[:t.rfind("=") + 1] for t in thinks])
    return raw

def read(raw, key, model, questions, thinks):
    """Puts down what the model answers behind trajectories."""
    said = answers(model, questions, thinks, where="in_context", size=1024)
    right = [arithmetic.verify(q, a) for q, a in zip(questions, said)]
    raw.right[key] = np.array(right, dtype=float)
    with torch.no_grad():
        raw.loss[key] = row_loss(model, *queries(model, questions, thinks)).cpu().numpy()
    raw.spared[key] = np.array([raw.slips - t.count("W") for t in thinks])
    raw.length[key] = float(np.mean([len(t) for t in thinks]))

def with_slips(q, rng, n):
    """A random trajectory, n steps of which are wrong at first."""
    while True:
        t = arithmetic.trajectory(q, rng, "reflect" if n else "long")
        if t.count("W") == n:
            return t

def parts_of(t):
    """`3+5=9W3+5=8;8*2=16` -> its slips and steps [`3+5=9W`, `3+5=8;`, `8*2=16`]"""
    return re.findall("[^W;]+[W;]?", t)

def joined(parts):
    """The inverse; no `;` is left at the end."""
    return "".join(parts).rstrip(";")

def shortened(model, questions, wholes, rng):
    """-> {(way, parts left): trajectories as text}"""
    size, ways = len(wholes[0]), {}
    kept = {way: [list(parts) for parts in wholes] for way in ("least change", "random", "last")}
    for left in range(size, -1, -1):
        for way, rows in kept.items():
            ways[way, left] = [joined(parts) for parts in rows]
        if left:
            curves = curves_of(model, questions, ways["least change", left])
            for parts, y in zip(kept["least change"], curves):
                del parts[int(np.argmin(changes(parts, y)))]
            for parts in kept["random"]:
                del parts[rng.randrange(left)]
            for parts in kept["last"]:
                del parts[-1]
    return ways

def changes(parts, y):
    """|Change of L_hat| over every part of a trajectory."""
    ends = np.cumsum([0, *map(len, parts)])
    ends[-1] = len(y) - 1                   # no `;` behind the last
    return np.abs(np.diff(y[ends]))


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    verdicts, gaps = {}, {}
    for part, found in margins(raw).items():
        style = NEEDED.get(part)
        if style and style not in raw.styles:
            verdicts[part] = f"not testable here (never saw `{style}`)"
        else:
            verdicts[part], gaps[part] = decide(found)
    points = [{"way": way, "parts": left, "tokens": round(raw.length[way, left], 1),
               "right": interval(v.astype(bool)), "L_hat": interval(raw.loss[way, left]),
               "slips deleted": interval(raw.spared[way, left] / max(1, raw.slips))}
              for (way, left), v in raw.right.items()]
    return spoken(verdicts), {"gaps": gaps, "title": raw.title, "size": raw.size,
                              "slips": raw.slips, "points": points}

def margins(raw):
    """-> {part of the claim: margins}"""
    right, whole = raw.right, raw.size
    long, short = right["long", whole - raw.slips], right["short", 0]
    left = whole - (raw.slips or whole // 2)
    gaps = {}
    for cut in ("", ", cut"):
        least, other = right[f"least change{cut}", left], right[f"random{cut}", left]
        gaps[f"least change - random{cut}"] = least - other
    found = raw.spared["least change", left] - raw.spared["random", left]
    return {"short equivalent": {"short - long + 0.05": short - long + 0.05},
            "slips can be spared": {"long - whole + 0.05": long - right["whole", whole] + 0.05},
            "least change finds slips": {"slips, least change - random": found},
            "least change beats random": gaps}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    slips = numbers["slips"]
    fig, (axes,) = panels(1, 3 + bool(slips), width=4, heights=[3.5])
    right, cut, loss = axes[:3]
    shown = [way for way in WAYS if slips or way != "whole"]        # else it is the long one
    for way in shown:
        draw_way(right, numbers["points"], way, "tokens", "right")
        draw_way(cut, numbers["points"], way, "tokens", "right", ", cut")
        draw_way(loss, numbers["points"], way, "tokens", "L_hat")
    for ax in (right, cut, loss):
        ax.set(xlabel="tokens of the trajectory", xlim=(-1.5, None))
    right.set(ylabel="share right", ylim=(-0.03, 1.05), title=numbers["title"])
    cut.set(ylabel="share right", ylim=(-0.03, 1.05), title="last result cut off")
    loss.set(ylabel=r"$\hat{L}$, answer's NLL (nats a token)", title="loss, nothing cut off")
    cut.legend(fontsize=8, loc="upper left")
    if slips:
        for way in ("least change", "random", "last"):
            draw_way(axes[3], numbers["points"], way, "parts", "slips deleted")
        axes[3].set(xlabel=f"parts left of {numbers['size']}, {slips} of them slips",
                    ylabel="share of the slips deleted", title="does deletion find the slips?")
        axes[3].invert_xaxis()
    return fig

def draw_way(ax, points, way, x, y, suffix=""):
    """The points of one way in order, a single one large."""
    rows = [p for p in points if p["way"] == way + suffix]
    rows.sort(key=parts_left)
    if rows:
        label, colour = WAYS[way]
        whiskers(ax, [p[x] for p in rows], [p[y] for p in rows], colour, label=label,
                 ms=6 if len(rows) == 1 else 3)

def parts_left(point):
    return point["parts"]
