"""Are longer trajectories better, being more inner steps? (Table 2)

long: an operation a step; short: two. padded short: as many tokens as long, by dots in front of a
result of two operations, where a model could use them to find it.

finer steps: long beats short at as many questions and at as many tokens.
a token is a step: padding gives short at least half of what long has over it.

Differences in exact match over seeds and questions, 95 % intervals: supported where all are above
0; refuted where one is below; else inconclusive.
"""
from experiments.arms import difference, differences, draw_arms, kept, run_arms, seeds_of
from lab.verdict import decide, spoken

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
    finer = difference(arms, "long", "short") | difference(arms, "long", "short, as many tokens")
    long, short, padded = (arms[name].scores["exact"] for name in ("long", "short", "padded short"))
    tokens = {"(padded short - short) - (long - short) / 2": (padded - short) - (long - short) / 2}
    verdicts, gaps = {}, {}
    for part, margins in {"finer steps": finer, "a token is a step": tokens}.items():
        verdicts[part], gaps[part] = decide(margins)
    return spoken(verdicts), {
        "gaps": gaps, "padding": differences(arms, [("padded short", "short")]),
        "arms": kept(arms)}

def draw(numbers):
    arms = numbers["arms"]
    return draw_arms(arms, f"expr, 3 and 4 operands, {seeds_of(arms)} seeds")
