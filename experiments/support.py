"""Do more trajectories a question help, being a larger support set? (Figs. 8, 9)

Fig. 8: distinct trajectories of a question in SFT, at as many samples: 16 beat 1, and 4 beat 1.
Fig. 9: outputs of a group that enter GRPO's gradient, the advantages using all 16: 16 of 16 beat 4
    and 2 of 16 at as many steps.
Fig. 9 at equal gradients: they also do where the others take as many outputs' gradients (4 and 8
    times the steps).

Exact match over seeds and questions: supported where all 95 % intervals are above 0, refuted where
one is below, else inconclusive.
"""
from experiments import methods
from experiments.arms import difference, differences, draw_arms, kept, run_arms, seeds_of
from lab.verdict import decide, spoken

CLAIM = "Figs. 8, 9: more trajectories a question are a larger support set, and better"
POOL = "--steps=400 --domains=sum --operands=4"
SFT = {f"500 questions, {n} each": f"{POOL} --pool=500 --support={n}" for n in (1, 4, 16)}
SFT["2000 questions, 1 each"] = f"{POOL} --pool=2000 --support=1"
GRPO = {
    f"{n} of 16, {steps} steps":
        f"{methods.BASE} | {methods.RL} --warmup=4 --update={n} --steps={steps}"
    for n, steps in ((16, 24), (4, 24), (2, 24), (4, 96), (2, 192))}


def measure(c):
    return {"SFT": run_arms(c, SFT, "sum:4"), "GRPO": run_arms(c, GRPO)}

def judge(raw):
    sft, grpo = raw["SFT"], raw["GRPO"]
    one = "500 questions, 1 each"
    few = difference(sft, "500 questions, 4 each", one)
    many = difference(sft, "500 questions, 16 each", one)
    whole = "16 of 16, 24 steps"
    steps, gradients = {}, {}
    for other in ("4 of 16, 24 steps", "2 of 16, 24 steps"):
        steps |= difference(grpo, whole, other)
    for other in ("4 of 16, 96 steps", "2 of 16, 192 steps"):
        gradients |= difference(grpo, whole, other)
    verdicts, gaps = {}, {}
    parts = {"Fig. 8": many | few, "Fig. 9": steps, "Fig. 9 at equal gradients": gradients}
    for part, margins in parts.items():
        verdicts[part], gaps[part] = decide(margins)
    wider = differences(sft, [("2000 questions, 1 each", one)])
    return spoken(verdicts), {"gaps": gaps, "more questions instead": wider, "SFT": kept(sft),
                              "GRPO": kept(grpo)}

def draw(numbers):
    arms = numbers["SFT"] | numbers["GRPO"]
    return draw_arms(arms, "above: SFT, sum, 4 operands; below: GRPO, expr, 3 and 4 operands; "
                           f"{seeds_of(arms)} seeds", ("exact", "pass", "mg"))
