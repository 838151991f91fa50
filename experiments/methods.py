"""SFT, GRPO, SFT then GRPO, SFT then DPO from one base: which inner loop is best? (Tables 1, 2, 3)

The base knows how to calculate and has as many habits that do not help. The steps are chosen for
equal time by the cost of a step; what it came to, base included, stands beside the scores: steps
times the median step, of the quickest seed.

Table 2: SFT has the higher exact match and mG-Pass@8 than GRPO from the same base.
Table 3: SFT, then GRPO beats GRPO alone.
Table 3, stronger: it also beats SFT alone, which the paper does not compare.
Table 3, from a pool: SFT's data is perfect and unlimited here, which favours it. On a fixed pool of
    300 questions with a trajectory each, GRPO on the same questions, after SFT on them, beats going
    on with SFT.

Differences over seeds and questions: supported where all 95 % intervals are above 0, refuted where
one is below, else inconclusive.
"""
from experiments.arms import difference, differences, draw_arms, kept, run_arms, seeds_of
from lab.verdict import decide, spoken

CLAIM = ("Tables 2, 3: SFT gives a better inner loop than RL from a weak base, and RL is better "
         "after SFT")
BASE = "--steps=500 --domains=expr --style=long,short,filler"
RL = "--method=grpo --domains=expr --operands=3,4"
DPO = "--method=dpo --domains=expr --operands=3,4"
SFT = "--domains=expr --steps"
POOL = "--domains=expr --operands=3,4 --harder=1 --pool=300 --steps"
ARMS = {
    "base": BASE,
    "SFT": f"{BASE} | {SFT}=600",
    "GRPO": f"{BASE} | {RL} --steps=80",
    "SFT, then GRPO": f"{BASE} | {SFT}=300 | {RL} --steps=40",
    "SFT, then DPO": f"{BASE} | {SFT}=300 | {DPO} --steps=80",
    "pool: SFT": f"{BASE} | {POOL}=300",
    "pool: SFT, longer": f"{BASE} | {POOL}=300 | {POOL}=300",
    "pool: SFT, then GRPO": f"{BASE} | {POOL}=300 | {RL} --pool=300 --steps=40"}


def measure(c):
    return run_arms(c, ARMS)

def judge(arms):
    pairs = {"Table 2": ("SFT", "GRPO"), "Table 3": ("SFT, then GRPO", "GRPO"),
             "Table 3, stronger": ("SFT, then GRPO", "SFT"),
             "Table 3, from a pool": ("pool: SFT, then GRPO", "pool: SFT, longer")}
    verdicts, gaps = {}, {}
    for part, (a, b) in pairs.items():
        margins = difference(arms, a, b, "exact") | difference(arms, a, b, "mg")
        verdicts[part], gaps[part] = decide(margins)
    gains = differences(arms, [(name, "base") for name in arms if name != "base"])
    gains |= differences(arms, [("pool: SFT, longer", "pool: SFT")])
    return spoken(verdicts), {"gaps": gaps, "gains": gains, "arms": kept(arms)}

def draw(numbers):
    arms = numbers["arms"]
    timed = {f"{name} ({arm['seconds']:.0f} s)": arm for name, arm in arms.items()}
    return draw_arms(timed, f"expr, 3 and 4 operands, {seeds_of(arms)} seeds")
