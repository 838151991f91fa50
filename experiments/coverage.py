"""Are the intervals of `compare` true? Thirty seeds of one arm, held against one another.

3, 5 and 10 of the seeds are held against as many others, drawn a thousand times over. An arm does
not differ from itself, so

zero is held: the 95 % interval of the difference holds zero in 93 to 97 % of the draws.
an effect is seen: below some size a difference goes unseen, says `compare` of a draw. It is added
    to the next draw, and seen there in more than 80 %: the interval lies above zero.
"""
from dataclasses import replace

import numpy as np

from experiments.arms import run_arms
from experiments.figure import bars, panels
from lab.verdict import interval, over_seeds, unseen

CLAIM = "intervals over seeds hold what they say, and what should be seen is seen"
TRAINS = True
ARM = "--layers=2 --heads=2 --width=48 --domains=expr --operands=2,3 --steps=150"
SEEDS, DRAWS = 30, 1000


def measure(c, runs):
    """-> the share right of every seed."""
    arm = run_arms(replace(c, seeds=SEEDS), {"a small model": ARM}, c.cells or "expr:3")
    return arm["a small model"].scores["exact"].mean(1)

def judge(shares):
    rng, verdicts, rates = np.random.default_rng(0), {}, {}
    for n in (3, 5, 10):
        drawn = [rng.permutation(shares) for _ in range(DRAWS)]
        _, low, high = np.transpose([over_seeds(x[:n] - x[n:2 * n]) for x in drawn])
        held, seen = (low <= 0) & (high >= 0), low[1:] + unseen(low, high)[:-1] > 0
        fine = {"zero is held": 0.93 <= held.mean() <= 0.97, "an effect is seen": seen.mean() > 0.8}
        for part, truths in zip(fine, (held, seen)):
            rates[f"{n} seeds, {part}"] = {"mean": interval(truths)}
            verdicts[f"{n} seeds, {part}"] = "supported" if fine[part] else "refuted"
    return verdicts, {"gaps": {}, "rates": rates, "shares": sorted(shares.round(4).tolist())}

def show(numbers) -> list:
    return [f"{part}: in {row['mean'][0]:.1%}" for part, row in numbers["rates"].items()]

def draw(numbers):
    fig, ax = panels(1, 6)
    bars(ax, numbers["rates"], xlim=(0.6, 1), xlabel="share of a thousand draws")
    return fig
