"""Has a long trajectory a short equivalent? (Fig. 11)

The answer is read after trajectories whose last state, which is the answer, is left out. What leaks
all the same: every state holds the answer's question, only easier. So the last state that is left,
such as `6-7`, is also read alone.

short equivalent: a `short` trajectory (two operations per state) is at most 5 points worse than a
    long one (one per state), and better than the long one's first states, enough of them to have as
    many tokens (budget forcing).
slips can be spared: a long one is at most 5 points worse than the same with two slips (`reflect`).
least fall beats random: without two states, each time that at which |fall of L_hat| is least, more
    answers are right than without two random ones.

Supported where all 95 % intervals over questions lie above 0, refuted where one lies below, else
inconclusive. A model of all three styles: `train.py --style=states,short,reflect`.
"""
import random
import re
from pathlib import Path

import numpy as np

from analyze import at_states, curves_of, direct_logp
from data.arithmetic import trajectory
from experiments import cell_of
from experiments.figure import INK, bars, panels
from lab.run import load
from lab.score import commonest
from lab.verdict import decide, interval

CLAIM = "C11: a long trajectory has a short equivalent"
COUNT = 2                           # slips in a trajectory, and states that are deleted


def measure(c, runs):
    """-> styles of training, {way: (tokens, truths)}, share right of the commonest digit."""
    model, rng, slips, read = runs.sft(), random.Random(f"{c.seed}/prune"), [], {}
    styles = load(Path(c.sft) / "ckpt.pt")["config"]["style"].split(",")
    questions, _ = cell_of(c)
    while len(slips) < len(questions):
        q = questions[len(slips)]
        t = trajectory(q, rng, "reflect")
        if t.count("W") == min(COUNT, q.operands - 2) and t[-2] == ";":
            slips.append(t[:-2])                                # without its last state
    long = [re.sub("[^;W]+W", "", t) for t in slips]
    short = [trajectory(q, rng, "short")[:-2] for q in questions]
    ways = {"nothing left out": [f"{t};{q.answer}" for t, q in zip(long, questions)],
            "long": long, "long, with slips": slips, "short": short,
            "budget forcing": [t[:f"{t};".index(";", len(s))] for t, s in zip(long, short)],
            "least falls deleted": deleted(model, questions, long, np.argmin),
            "two random deleted": deleted(model, questions, long, lambda y: rng.randrange(len(y))),
            "last state alone": [t.rpartition(";")[2] for t in long]}
    for way, thinks in ways.items():
        digits = direct_logp(model, questions, thinks=thinks).argmax(-1).tolist()
        right = [str(digit) == q.answer for digit, q in zip(digits, questions)]
        read[way] = float(np.mean(list(map(len, thinks)))), np.array(right)
    return styles, read, commonest(questions)

def deleted(model, questions, thinks, which):
    """Deletes state after state; which(|falls of L_hat|) chooses one."""
    for _ in range(COUNT):
        falls = [np.abs(np.diff(at_states(y, t)))
                 for y, t in zip(curves_of(model, questions, thinks), thinks)]
        states = [t.split(";") for t in thinks]
        gone = [which(y) for y in falls]
        thinks = [";".join(t[:i] + t[i + 1:]) for t, i in zip(states, gone)]
    return thinks

def judge(raw):
    styles, read, line = raw
    r = {way: right.astype(float) for way, (_, right) in read.items()}
    short = {"short - long + 0.05": r["short"] - r["long"] + 0.05,
             "short - budget forcing": r["short"] - r["budget forcing"]}
    slips = {"long - with slips + 0.05": r["long"] - r["long, with slips"] + 0.05}
    least = {"least - random": r["least falls deleted"] - r["two random deleted"]}
    parts = {"short equivalent": ("short", short), "slips can be spared": ("reflect", slips),
             "least fall beats random": ("states", least)}
    verdicts, gaps = {}, {}
    for part, (style, margin) in parts.items():
        untested = f"not testable here (never saw `{style}`)", {}
        verdicts[part], gaps[part] = decide(margin) if style in styles else untested
    rows = {way: {"tokens": n, "mean": interval(right)} for way, (n, right) in read.items()}
    return verdicts, {"gaps": gaps, "ways": rows, "commonest": line}

def draw(numbers):
    fig, ((ax,),) = panels(1, 1, width=6.5, heights=[3.2])
    rows = {f"{way}: {row['tokens']:.0f} tokens": row for way, row in numbers["ways"].items()}
    bars(ax, rows, title="The answer read after parts of a trajectory",
         xlabel="share right (dotted: always the commonest digit)")
    ax.axvline(numbers["commonest"], color=INK, ls=":", lw=0.8)
    return fig
