"""Does a trajectory descend, or is it written down? (Eq. 4)

One inner step is trained again with other things to descend on: the targets of its loss permuted by
one fixed permutation of the vocabulary, all the same, or digits at random; and with no gradient at
all, learned matrices in its place. If a step down the trajectory's own loss is what helps, none of
these can do it. Nor can a register: one learned vector, read off the trajectory's end and added to
every token of the question. Two arms have no inner loop: theta is trained as long to answer the
same questions, without the trajectory and with it in the context. Asked is another operation on the
trajectory's last two results, of six operands.

descent: the trajectory's own targets beat permuted, constant and random ones, and the write, by 20
    points or more, and the step lowers the trajectory's own loss at temperature 1.
a learned write: they beat none of these by 20 points.
an inner loop: theta' beats theta that was trained as long without one.
as good as the context: theta' is at most 3 points worse than theta that was trained as long with
    the trajectory in the context.

Intervals are over seeds: supported where all lie above 0, refuted where one lies below, else
inconclusive. Arms take about the same time each. Layers and rates are those of the true targets;
only for the write and the register a few others were tried first, with one seed: see `tried`.
"""
import random

import numpy as np

from experiments import step
from experiments.arms import kept, run_arms, train_arms
from experiments.figure import bars, panels
from experiments.trainings import META
from lab.run import device_of, read_log
from lab.score import commonest, held_out
from lab.verdict import decide_all
from meta import load_meta

CLAIM = "Eq. 4: a trajectory's update is a descent, not something written down"
TRAINS = True
OWN = "own targets"
ARMS = {
    OWN: f"{META}=2400",
    **{f"{name} targets": f"{META}=2400 --targets={name}"
       for name in ("permuted", "constant", "random")},
    "a learned write": f"{META}=1500 --update=write --fast=*.up,*.down --alpha=1",
    "a register": f"{META}=2400 --update=register --fast=1.down --alpha=1",
    "no inner loop": f"{META}=3200 --algo=none",
    "in the context": f"{META}=2000 --algo=context"}
RIVALS = [*ARMS][1:5]
WINDOW = 100                        # meta-steps that a point of a training curve averages


def measure(c, runs):
    """-> ({arm: Arm}, {arm: L_q of meta-training (seeds, points)}, {arm: the trajectory's own loss
    per token before and after the step (seeds, 2)}, share of the commonest digit)."""
    arms, chains = run_arms(c, ARMS, "expr:6"), train_arms(c, ARMS)
    curves, own_loss = {}, {}
    questions = held_out("expr", 6, c.questions)
    for name, seeds in chains.items():
        logs = [[line["L_q"] for line in read_log(chain[-1].folder)] for chain in seeds]
        curves[name] = np.array(logs).reshape(len(seeds), -1, WINDOW).mean(2)
        for chain in seeds if name in (OWN, *RIVALS) else []:
            model, inner, _ = load_meta(chain[-1].folder / "ckpt.pt", device_of(c))
            rows, asked = step.trials(model, questions, "states", random.Random("descent"))
            losses = step.along_the_step(model, inner, rows, asked, (0, 1))["L_support"]
            own_loss.setdefault(name, []).append(losses.mean(0))
    return arms, curves, own_loss, commonest(questions)

def judge(raw):
    arms, curves, own_loss, chance = raw
    score = {name: arm.scores["sibling"] for name, arm in arms.items()}
    lead = {name: score[OWN] - score[name] for name in RIVALS}
    fall = -np.diff(own_loss[OWN], axis=1)
    verdicts, gaps = decide_all({
        "descent":
            {f"own - {name} - 20 points": gap - 0.2 for name, gap in lead.items()}
            | {"own loss before - after": np.repeat(fall, len(score[OWN][0]), 1)},
        "a learned write":
            {f"20 points - (own - {name})": 0.2 - gap for name, gap in lead.items()},
        "an inner loop": {"own - no inner loop": score[OWN] - score["no inner loop"]},
        "as good as the context":
            {"own - in the context + 3 points": score[OWN] - score["in the context"] + 0.03}})
    return verdicts, {
        "gaps": gaps, "arms": kept(arms), "commonest": round(chance, 4),
        "curves": {name: y.round(4).tolist() for name, y in curves.items()},
        "own loss": {name: np.round(y, 4).tolist() for name, y in own_loss.items()}}

def draw(numbers):
    fig, curves, right = panels(2, 4.8, 3.4)
    for i, (name, y) in enumerate(numbers["curves"].items()):
        seconds = numbers["arms"][name]["seconds"]
        x = (np.arange(len(y[0])) + 1) / len(y[0]) * seconds
        curves.plot(x, np.mean(y, 0), color=f"C{i}", lw=1.8, label=name)
        curves.plot(x, np.transpose(y), color=f"C{i}", lw=0.5, alpha=0.5)
    curves.set(title="Meta-training: mean of each arm, thin its seeds", ylim=(0, None),
               xlabel="seconds of one thread", ylabel="$L_q$, loss of the queries' answers (nats)")
    curves.legend()
    bars(right, {name: arm["scores"]["sibling"] for name, arm in numbers["arms"].items()},
         xlim=(0, 1), xlabel="right: another last operation",
         title="Six operands (dotted: commonest digit)")
    right.axvline(numbers["commonest"], color="#999999", lw=0.8, ls=":")
    return fig

def show(numbers):
    lines = []
    for name, arm in numbers["arms"].items():
        shares = [f"{kind} {100 * row['mean'][0]:.0f}" for kind, row in arm["scores"].items()
                  if "," not in kind and kind not in ("exact", "direct")]
        before, after = np.mean(numbers["own loss"].get(name, [[np.nan] * 2]), 0)
        falls = "" if np.isnan(before) else f"; its own loss {before:.2f}, then {after:.2f}"
        lines.append(f"{name}, {arm['seconds']:.0f} s, right in %: {', '.join(shares)}{falls}")
    return lines
