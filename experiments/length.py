"""Are longer trajectories better, being more inner steps? (Table 2)

long: an operation a step; short: two. padded short: dots up to long's length.

Supported if long beats short at as many questions and at as many tokens, and padded short does not
beat short by as much as long does: differences in exact match over seeds and questions, 95 %
intervals above 0; refuted where one is below; else inconclusive.
"""
from experiments.arms import difference, differences, draw_arms, kept, run_arms, seeds_of
from lab.verdict import decide

CLAIM = "Table 2: longer trajectories are more inner steps, and better"
SFT = "--domains=expr --operands=3,4"
ARMS = {
    "short": f"--steps=300 {SFT} --style=short",
    "long": f"--steps=300 {SFT}",
    "padded short": f"--steps=300 {SFT} --style=padded",
    "short, as many tokens": f"--steps=368 {SFT} --style=short"}


def measure(c):
    return run_arms(c, ARMS)

def judge(arms):
    margins = {}
    for other in ("short", "short, as many tokens", "padded short"):
        margins |= difference(arms, "long", other)
    verdict, gaps = decide(margins)
    return verdict, {"gaps": gaps, "padding": differences(arms, [("padded short", "short")]),
                     "arms": kept(arms)}

def draw(numbers):
    arms = numbers["arms"]
    return draw_arms(arms, f"expr, 3 and 4 operands, {seeds_of(arms)} seeds")
