"""Do more trajectories a question help, being a larger support set? (Figs. 8, 9)

Fig. 8: distinct trajectories of a question in SFT, at as many samples: 16 beat 1, and 4 beat 1.
Fig. 8 at as many trajectories: 2,000 of them are worth more as 4 or 16 each of fewer questions than
    as one each of 2,000.
Fig. 9: outputs of a group that enter GRPO's gradient, the advantages using all 16, at as many
    rollouts: 16 beat 4 and 2, after 24 steps and after 96.
Fig. 9, mG-Pass@8: the same for samples in place of greedy answers.

Exact match, but for the last, over seeds and questions: supported where all 95 % intervals are
above 0, refuted where one is below, else inconclusive.
"""
from experiments import methods
from experiments.arms import difference, draw_arms, kept, run_arms, seeds_of
from lab.verdict import decide, spoken

CLAIM = "Figs. 8, 9: more trajectories a question are a larger support set, and better"
POOL = "--steps=400 --domains=sum --operands=4"
SFT = {f"{questions} questions, {n} each": f"{POOL} --pool={questions} --support={n}"
       for questions, n in ((500, 1), (500, 4), (500, 16), (2000, 1), (125, 16))}
GRPO = {
    f"{n} of 16, {steps} steps":
        f"{methods.BASE} | {methods.RL} --warmup=4 --update={n} --steps={steps}"
    for steps in (24, 96) for n in (16, 4, 2)}
ARMS = SFT | GRPO


def measure(c):
    return {"SFT": run_arms(c, SFT, "sum:4"), "GRPO": run_arms(c, GRPO)}

def judge(raw):
    sft, grpo = raw["SFT"], raw["GRPO"]
    each, one, rollouts, sampled = {}, {}, {}, {}
    for n in (4, 16):
        each |= difference(sft, f"500 questions, {n} each", "500 questions, 1 each")
    for fewer in ("500 questions, 4 each", "125 questions, 16 each"):
        one |= difference(sft, fewer, "2000 questions, 1 each")
    for steps in (24, 96):
        for n in (4, 2):
            pair = f"16 of 16, {steps} steps", f"{n} of 16, {steps} steps"
            rollouts |= difference(grpo, *pair)
            sampled |= difference(grpo, *pair, "mg")
    verdicts, gaps = {}, {}
    parts = {"Fig. 8": each, "Fig. 8 at as many trajectories": one, "Fig. 9": rollouts,
             "Fig. 9, mG-Pass@8": sampled}
    for part, margins in parts.items():
        verdicts[part], gaps[part] = decide(margins)
    return spoken(verdicts), {"gaps": gaps, "SFT": kept(sft), "GRPO": kept(grpo)}

def draw(numbers):
    arms = numbers["SFT"] | numbers["GRPO"]
    return draw_arms(arms, "above: SFT, sum, 4 operands; below: GRPO, expr, 3 and 4 operands; "
                           f"{seeds_of(arms)} seeds", ("exact", "pass", "mg"))
