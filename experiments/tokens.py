"""Do results, and reflection tokens, lower the answer's loss most? (Fig. 6)

Signed one-step falls of L_hat by kind of token, against other tokens in the same fifth of their
trajectory.

results lower it more: they make L_hat fall more than other tokens do. The last result, which is the
    answer itself, is kept apart. Supported where the 95 % bootstrap interval over questions lies
    above 0, refuted where it lies below.
roles differ: the same, two-sided. Supported where the interval lies on either side of 0.
reflection, net: a slip raises L_hat and its correction mends that, so that they count together.
    L_hat before the slip less L_hat after the correction, per token of slip, `W` and correction,
    is more than others' fall. Only where the run was trained on `reflect` trajectories, since other
    models never saw a W.

Beside it the official notebook's ratio |L_{i+1} - L_{i-1}| / L_{i-1}, which spans two steps and is
held against an average over one.
"""
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analyze import cell_of, curves_of
from data import arithmetic
from lab.figure import COLOURS, INK, panels, whisker, zero_line
from lab.run import load
from lab.verdict import decide, interval, spoken

CLAIM = "Fig. 6: results, and reflection tokens, take the largest steps"
FIFTHS = 5
KINDS = {                                   # {kind: (label, colour)}
    "operand": ("operand", COLOURS["filler"]), "operator": ("operator", COLOURS["filler"]),
    "result": ("result", COLOURS["correct"]), "end": ("end of\na step (;)", COLOURS["filler"]),
    "last": ("the\nanswer", COLOURS["theta"]),
    "slip": ("slip", COLOURS["other"]), "W": ("W and its\ncorrection", COLOURS["wrong"]),
    "net": ("net of slip\nand W", COLOURS["weights"])}


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    title: str
    curves: list                            # L_hat, an array (|t| + 1,) a question
    kinds: list                             # the kind of every token, a list a question
    reflects: bool                          # has the model seen a W?


def measure(c, model):
    cell, rng = cell_of(c), random.Random(f"{c.seed}/tokens")
    reflects = "reflect" in load(Path(c.sft) / "ckpt.pt")["config"]["style"]
    style = "reflect" if reflects else "long"
    thinks = [arithmetic.trajectory(q, rng, style) for q in cell.questions]
    curves = curves_of(model, cell.questions, thinks)
    return Raw(cell.title, curves, [kinds_of(t) for t in thinks], reflects)

def kinds_of(think):
    """The kind of every token of a trajectory, as text: a key of KINDS each."""
    kinds = []
    for step in think.split(";"):
        tries = step.split("W")
        for k, part in enumerate(tries):
            left, equals, right = part.partition("=")
            slips = k + 1 < len(tries)
            if k:                           # behind a W: its correction
                kinds += ["W"] * len(part)
            else:
                kinds += ["operand" if c in arithmetic.DIGITS else "operator" for c in left]
                kinds += ["operator"] * len(equals) + ["slip" if slips else "result"] * len(right)
            kinds += ["W"] * slips
        kinds.append("end")
    kinds, digits = kinds[:-1], len(think.rpartition("=")[2])
    if kinds[-1] == "result":               # else the correction of a slip
        kinds[-digits:] = ["last"] * digits
    return kinds


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    falls = falls_by_kind(raw.curves, raw.kinds)
    beyond = {kind: beyond_others(raw.curves, raw.kinds, kind) for kind in falls}
    part, differ = "results lower it more", "inconclusive"
    verdict, margins = decide({"result": beyond["result"]})
    verdicts, gaps = {part: verdict}, {part: margins}
    if verdict in ("supported", "refuted"):
        differ = "supported"                # the interval lies on a side of 0
    verdicts["roles differ"] = differ

    part = "reflection, net"
    if raw.reflects:
        kinds = [together(names) for names in raw.kinds]
        falls["net"] = falls_by_kind(raw.curves, kinds)["net"]
        beyond["net"] = beyond_others(raw.curves, kinds, "net")
        verdicts[part], gaps[part] = decide({"slip, W and correction": beyond["net"]})
    else:
        verdicts[part] = "not tested (no `W` in this run's training)"
    return spoken(verdicts), {
        "gaps": gaps, "title": raw.title,
        "beyond others": {kind: interval(v) for kind, v in beyond.items() if len(v)},
        "falls": {kind: interval(v) for kind, v in falls.items()},
        "tokens": {kind: len(v) for kind, v in falls.items()},
        "notebook's ratio": notebook(raw.curves, raw.kinds)}

def together(names):
    """The kinds of a trajectory's tokens, slips and all that mends them being one kind, 'net'."""
    return ["net" if name in ("slip", "W") else name for name in names]

def falls_by_kind(curves, kinds):
    """{kind: L_hat's fall at every token of it}"""
    falls = {}
    for y, names in zip(curves, kinds):
        for i, kind in enumerate(names):
            falls.setdefault(kind, []).append(y[i] - y[i + 1])
    return falls

def beyond_others(curves, kinds, kind):
    """How much more L_hat falls at tokens of a kind than at others in the same fifth of their
    trajectory -> a number a question that has both"""
    rows = []                               # (question, fifth, kind, fall)
    for j, (y, names) in enumerate(zip(curves, kinds)):
        for i, name in enumerate(names):
            rows.append((j, i * FIFTHS // len(names), name, y[i] - y[i + 1]))
    level = {}
    for fifth in range(FIFTHS):
        others = [fall for _, at, name, fall in rows if at == fifth and name != kind]
        level[fifth] = np.mean(others) if others else None
    differences = {}
    for j, fifth, name, fall in rows:
        if name == kind and level[fifth] is not None:
            differences.setdefault(j, []).append(fall - level[fifth])
    return np.array([np.mean(v) for v in differences.values()])

def notebook(curves, kinds):
    """The official notebook's ratio by kind of token, spanning one step and two."""
    one, two = {}, {}
    for y, names in zip(curves, kinds):
        for i in range(1, len(names)):
            now, after = one.setdefault(names[i], []), two.setdefault(names[i], [])
            now.append(abs(y[i + 1] - y[i]) / max(y[i], 1e-6))
            after.append(abs(y[i + 1] - y[i - 1]) / max(y[i - 1], 1e-6))
    average = np.mean(sum(one.values(), []))
    return {kind: {"one step": float(np.median(one[kind])),
                   "two steps": float(np.median(two[kind])),
                   "mean, two steps / all, one step": float(np.mean(two[kind]) / average)}
            for kind in one}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((beyond, ratio),) = panels(1, 2, width=5.4, heights=[3.6])
    shown, ratios = numbers["beyond others"], numbers["notebook's ratio"]
    kinds = [kind for kind in KINDS if kind in shown]
    for i, kind in enumerate(kinds):
        whisker(beyond, i, shown[kind], KINDS[kind][1])
    zero_line(beyond)
    beyond.set(ylabel=r"fall of $\hat{L}$ beyond that of others there (nats)",
               title=numbers["title"])

    kinds_alone = [kind for kind in kinds if kind in ratios]
    spans = {"one step": COLOURS["light"], "two steps": INK}
    for j, (span, colour) in enumerate(spans.items()):
        places = np.arange(len(kinds_alone)) + 0.36 * (j - 0.5)
        ratio.bar(places, [ratios[kind][span] for kind in kinds_alone], 0.34, color=colour,
                  label=span)
    ratio.set(ylabel=r"median $|\Delta\hat{L}| / \hat{L}$",
              title="the notebook's ratio, spanning one step or two")
    ratio.legend()
    for ax, names in ((beyond, kinds), (ratio, kinds_alone)):
        ax.set_xticks(range(len(names)), [KINDS[kind][0] for kind in names], fontsize=7.5)
    return fig
