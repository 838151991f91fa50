"""What is the slope of a mean curve made of? (Figs. 2, 3)

Arms differ in their training rows: as ever; without asides, so that the answer is asked at the end
alone; + and - alone, without the products by 0 that end a question early; the style `steps`, whose
trajectories say what was done instead of what is left; a quarter of the samples being questions of
three operands, asked directly, in so many more steps; half and twice the steps. Of each, L_hat is
read after whole states of correct trajectories of six operands, as in `curve`.

slope: when three operands are left, at least a quarter of the mean fall is done. Not testable where
    it all falls by less than half a nat.
more questions of three: they lower L_hat where three operands are left, and more so than after
    fewer states or more: what the curve says after a state is how well what is left is known.

Intervals are over seeds: supported where it lies above 0, refuted where it lies below, else
inconclusive. An arm describes itself: nothing is claimed of all.
"""
import random

import numpy as np

from data import arithmetic
from experiments.arms import share, train_arms
from experiments.curve import LEAST, in_context
from experiments.figure import BESIDE, losses, panels
from lab.run import checksum, device_of
from lab.score import right
from lab.verdict import decide, interval
from train import load_model

CLAIM = "Figs. 2, 3: the mean curve slopes, whatever the training rows were"
TRAINS = True
OF_THREE = "more questions of three"
ARMS = {
    "as ever": "--steps=500",
    "without asides": "--steps=500 --asides=no",
    "+ and - alone": "--steps=500 --ops=+-",
    "style steps": "--steps=500 --style=steps",
    OF_THREE: "--steps=667 --direct=3",
    "half the steps": "--steps=250",
    "twice the steps": "--steps=1000"}


def measure(c, runs):
    """-> {arm: (L_hat after states (seeds, N, 6), own answers right (seeds, N), checksums)}."""
    raw = {}
    for name, seeds in train_arms(c, ARMS).items():
        loaded = [load_model(chain[-1].folder / "ckpt.pt", device_of(c)) for chain in seeds]
        models, config = [model for model, _ in loaded], loaded[0][1]["config"]
        rng = random.Random("cuts")
        questions = [arithmetic.draw(rng, "expr", 6, "test", config["ops"])
                     for _ in range(c.questions)]
        steps = [arithmetic.steps(q, rng, config["style"])[0] for q in questions]
        states = [in_context(model, questions, steps) for model in models]
        truths = [right(model, questions) for model in models]
        raw[name] = np.array(states), np.array(truths, float), list(map(checksum, models))
    return raw

def judge(raw):
    verdicts, gaps, arms = {}, {}, {}
    for name, (states, truths, checksums) in raw.items():
        fall = states[:, :, 0] - states[:, :, -1]
        early = states[:, :, 0] - states[:, :, 3]
        part = f"slope, {name}"
        verdicts[part], gaps[part] = decide({"fall so far - a quarter of all": early - fall / 4})
        if fall.mean() < LEAST:
            verdicts[part] = "not testable here"
        arms[name] = {"flags": ARMS[name], "checksums": checksums, "right": share(truths),
                      "L_hat": [interval(y) for y in np.moveaxis(states, 2, 0)]}
    gain = raw["as ever"][0] - raw[OF_THREE][0]
    verdicts[OF_THREE], gaps[OF_THREE] = decide({"lower, three left": gain[:, :, 3]} | {
        f"more so than after {i} states": gain[:, :, 3] - gain[:, :, i] for i in (0, 1, 2, 4)})
    return verdicts, {"gaps": gaps, "arms": arms}

def draw(numbers):
    fig, ax = panels(1, 6, 3.4)
    for i, (name, arm) in enumerate(numbers["arms"].items()):
        mean, low, high = np.array(arm["L_hat"], float).T
        ax.errorbar(np.arange(6) + 0.05 * (i - 3), mean, [mean - low, high - mean], fmt="o-", ms=3,
                    label=f"{name}: {arm['right']['mean'][0]:.0%} right")
    losses(ax, BESIDE, title="Six operands", xlabel="states of the correct trajectory",
           ylabel=r"$\hat{L}$, loss of the answer (nats)")
    return fig
