"""Which tokens of a trajectory lower the answer's loss most? (Fig. 6)

The fall at a token is L_hat before it less L_hat after it, in nats. It is held against the falls at
other tokens in the same place: in the same state of any question, in the same third of it. What a
`;` does is shown, but no other token is held against it.

digits lower it more: L_hat falls more at digits than at other tokens. The last state, which is the
    answer itself, is kept apart. Supported or refuted, tokens play different roles.
reflection, net: a slip raises L_hat and its correction mends that, so they count together. Per
    token of slip, `W` and correction, L_hat falls more than at tokens of other states.
readable inside a state: L_hat after an operator is below ln 10. Training asks after whole states
    only. Where this is refuted, a fall shows how whole a state looks, not what a token is worth.

Supported where the 95 % interval over questions lies above 0, refuted where it lies below, else
inconclusive. Beside it the official notebook's ratio |L_{i+1} - L_{i-1}| / L_{i-1}: it spans two
steps, and the notebook holds it against an average over one.
"""
import random
from pathlib import Path

import numpy as np

from analyze import CHANCE, curves_of
from data import arithmetic
from experiments import cell_of
from experiments.figure import COLOURS, chance_line, panels, whisker, zero_line
from lab.run import load
from lab.verdict import decide, interval

CLAIM = "C6: tokens play different roles; reflection takes the largest steps"
KINDS = ("digit", "operator", "bracket", ";", "answer", "slip", "mended", "net")
KIND_OF = dict.fromkeys("+-*", "operator") | dict.fromkeys("()", "bracket")


def measure(c, runs):
    """Gives a row per token; past: L_hat before the token before it."""
    model, rng, rows = runs.sft(), random.Random(f"{c.seed}/tokens"), []
    reflects = "reflect" in load(Path(c.sft) / "ckpt.pt")["config"]["style"]
    questions, _ = cell_of(c)
    style = "reflect" if reflects else "states"
    steps = [arithmetic.steps(q, rng, style)[0] for q in questions]
    curves = curves_of(model, questions, [";".join(t) for t in steps])
    for j, (t, y) in enumerate(zip(steps, curves)):
        losses = zip([y[0], *y], y, y[1:])
        rows += [(j, *token, *loss) for token, loss in zip(tokens_of(t), losses)]
    return np.rec.fromrecords(rows, names="question,place,kind,past,before,after")

def tokens_of(steps):
    """Gives (place, kind) of every token of a trajectory; a place is a third of a state."""
    tokens = []
    for s, step in enumerate(steps[:-1]):
        slip, W, state = step.rpartition("W")
        kinds = ["mended" if W else KIND_OF.get(c, "digit") for c in W + state]
        kinds = ["slip"] * len(slip) + kinds + [";"]
        tokens += [(3 * s + 3 * i // len(kinds), kind) for i, kind in enumerate(kinds)]
    return tokens + [(3 * len(steps), "answer")] * len(steps[-1])

def judge(raw):
    present = [kind for kind in KINDS if kind in raw.kind]
    beyond = {kind: beyond_others(raw, [kind]) for kind in present}
    readable = by_question(raw, CHANCE - raw.after, raw.kind == "operator")
    found = {"digits lower it more": beyond["digit"], "readable inside a state": readable}
    verdicts, gaps = {"reflection, net": "not tested (this run never saw a `W`)"}, {}
    if "slip" in present:
        found["reflection, net"] = beyond["net"] = beyond_others(raw, ["slip", "mended"])
    for part, margin in found.items():
        verdicts[part], gaps[part] = decide({"nats": margin})

    def table(values, statistic=np.mean):
        return {kind: interval(by_question(raw, values, raw.kind == kind), statistic)
                for kind in present}
    return verdicts, {
        "gaps": gaps, "beyond others": {k: interval(v) for k, v in beyond.items() if len(v)},
        "fall": table(raw.before - raw.after), "L_hat after": table(raw.after),
        "one step": table(np.abs(raw.after - raw.before) / raw.before, np.median),
        "two steps": table(np.abs(raw.after - raw.past) / raw.past, np.median)}

def beyond_others(raw, kinds):
    """How much more L_hat falls at some kinds of token than at others in the same place -> a number
    per question."""
    fall, own = raw.before - raw.after, np.isin(raw.kind, kinds)
    others, level = ~own & (raw.kind != ";"), np.full(len(fall), np.nan)
    for place in np.unique(raw.place[others]):
        level[raw.place == place] = fall[others & (raw.place == place)].mean()
    return by_question(raw, fall - level, own & ~np.isnan(level))

def by_question(raw, values, rows):
    """Averages values over some rows of every question."""
    values, question = values[rows], raw.question[rows]
    return np.array([values[question == j].mean() for j in np.unique(question)])

def draw(numbers):
    fig, ((beyond, after, ratio),) = panels(1, 3, width=4.2, heights=[3.2])
    for ax, name in ((beyond, "beyond others"), (after, "L_hat after"), (ratio, "two steps")):
        for i, row in enumerate(numbers[name].values()):
            whisker(ax, i, row, COLOURS["filler" if ax is ratio else "correct"])
        ax.set_xticks(range(len(numbers[name])), numbers[name], fontsize=7.5)
    ratio.plot([row[0] for row in numbers["one step"].values()], "o", color=COLOURS["theta"])
    zero_line(beyond)
    chance_line(after)
    beyond.set(title="How far the loss falls at a token, beyond others there", ylabel="nats")
    after.set(title="The loss once a token is read", ylabel=r"$\hat{L}$ (nats)")
    ratio.set(title="The notebook's ratio, over two steps (dots: one)", ylabel="median question")
    return fig
