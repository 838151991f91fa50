"""Comparisons of trainings: a table of arms, and of the pairs that decide each part of a claim.

A new one is an entry of TABLE. Steps are chosen so that the arms that are held against each other
take about the same time; what they took stands beside their shares.
"""
from experiments import cells_of
from experiments.arms import kept, run_arms
from experiments.figure import COLOURS, INK, panels
from lab.flags import fail
from lab.score import commonest, held_out
from lab.verdict import decide

FLOOR = 0.1                         # above always saying the commonest digit
RULE = """

All differences are between shares right on the same held-out questions, greedy answers where
nothing else is said, and intervals are over seeds. Supported where all 95 % intervals lie above 0,
refuted where one lies below, else inconclusive; not testable where no arm of a part is right in a
tenth more than who always says the commonest digit."""


def asked_for(metric: str) -> str:
    known = {"exact": "right", "direct": "right in the head", "pass": "Pass@8", "mg": "mG-Pass@8"}
    return known.get(metric, f"asked {metric}")

def draw_arms(numbers):
    """Differences around a line at zero, a dot per seed, below the part that they decide."""
    rows, names = sum(len(part) + 1 for part in numbers["gaps"].values()), []
    fig, ax = panels(1, 7, 0.28 * rows + 0.8)
    for part, gaps in numbers["gaps"].items():
        names.append(f"{part}:")
        for name, (mean, low, high) in gaps.items():
            y, seeds = len(names), numbers["dots"][part][name]
            if low is not None:
                ax.plot([low, high], [y, y], color=COLOURS["light"], lw=5)
            ax.plot(mean, y, "|", color=COLOURS["correct"], ms=10, mew=2)
            ax.plot(seeds, [y] * len(seeds), ".", color=INK, ms=3)
            names.append(name)
    ax.axvline(0, color=INK, lw=0.8, zorder=0)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.tick_params(axis="y", length=0)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="difference, 95 % interval, a dot per seed")
    return fig

def show_arms(numbers) -> list:
    """A table per question and way of asking: an arm's share right, and what a seed cost."""
    lines = []
    for cells, metric in numbers["shown"]:
        asked = numbers["asked"][cells]
        width = max(map(len, asked["arms"]))
        lines.append(f"{asked_for(metric)}, {cells}; the commonest digit is right in "
                     f"{asked['commonest']:.0%}")
        for name, arm in asked["arms"].items():
            mean, low, high = (100 * x for x in arm["scores"][metric]["mean"])
            lines.append(f"  {name:{width}}  {mean:5.1f} % [{low:.1f}, {high:.1f}], "
                         f"{arm['seconds']} s and {arm['tokens']} tokens a seed")
    return lines


class Comparison:
    """One entry, which has what an experiment's file has. Its docstring is question and criterion.

    asked: {cells: {name of an arm: its flags}}; parts: {part of the claim: pairs}, a pair being (a,
    b, metric, cells), and the claim that a is better than b."""
    TRAINS, draw, show = True, staticmethod(draw_arms), staticmethod(show_arms)

    def __init__(self, text: str, claim: str, asked: dict, parts: dict):
        self.__doc__, self.CLAIM = text.strip() + RULE, claim
        self.asked, self.parts = asked, parts
        self.pairs = [pair for pairs in parts.values() for pair in pairs]

    def measure(self, c, runs) -> dict:
        """-> {cells: ({name: Arm}, share of the commonest digit)}."""
        if c.cells and c.cells not in self.asked:
            fail(f"--cells={c.cells}: this comparison asks {' and '.join(self.asked)}")
        raw = {}
        for cells, arms in self.asked.items():
            metrics = {metric for _, _, metric, where in self.pairs if where == cells}
            found = run_arms(c, arms, cells, 32 * bool(metrics & {"pass", "mg"}))
            questions = [q for cell in cells_of(cells) for q in held_out(*cell, c.questions)]
            raw[cells] = found, commonest(questions)
        return raw

    def judge(self, raw):
        verdicts, gaps, dots = {}, {}, {}
        for part, pairs in self.parts.items():
            margins, levels = {}, []
            for a, b, metric, cells in pairs:
                arms, chance = raw[cells]
                gap = arms[a].scores[metric] - arms[b].scores[metric]
                how = "" if metric == "exact" else f"{asked_for(metric)}, "
                margins[f"{a} - {b}, {how}{cells}"] = gap
                level = "exact" if metric == "mg" else metric
                levels += [arms[name].scores[level].mean() - chance for name in (a, b)]
            verdicts[part], gaps[part] = decide(margins)
            if max(levels) < FLOOR:
                verdicts[part] = "not testable here"
            dots[part] = {name: gap.mean(1).round(4).tolist() for name, gap in margins.items()}
        shown = dict.fromkeys((cells, metric) for _, _, metric, cells in self.pairs)
        asked = {cells: {"arms": kept(arms), "commonest": round(chance, 4)}
                 for cells, (arms, chance) in raw.items()}
        return verdicts, {"gaps": gaps, "dots": dots, "shown": list(shown), "asked": asked}


# ------------------------------------------------------------------------------------- the table

BASE = "--steps=500 --domains=expr --style=states,short,filler"
SFT, POOL = "--domains=expr --steps", "--domains=expr --operands=5 --pool=300 --steps"
GRPO = "--method=grpo --domains=expr --operands=5 --warmup=4"
DPO = GRPO.replace("grpo", "dpo")
METHODS = {
    "base": BASE,
    "SFT": f"{BASE} | {SFT}=300",
    "GRPO": f"{BASE} | {GRPO} --steps=24",
    "SFT, then GRPO": f"{BASE} | {SFT}=150 | {GRPO} --steps=12",
    "SFT, then DPO": f"{BASE} | {SFT}=150 | {DPO} --steps=18",
    "pool: SFT, longer": f"{BASE} | {POOL}=150 | {POOL}=150",
    "pool: SFT, then GRPO": f"{BASE} | {POOL}=150 | {GRPO} --pool=300 --steps=12"}
LENGTH = {
    "states": f"{SFT}=450",
    "short": f"{SFT}=450 --style=short",
    "short, as many tokens": f"{SFT}=700 --style=short"}
GENERALIZE = {
    "direct answers": "--steps=1240 --style=direct",
    "steps": "--steps=660 --style=steps",
    "states": "--steps=600"}
GROUPS = {"trained sizes": "expr:5,6", "more operands": "expr:7,8", "new domain": "chain:4,5"}
SUM = ("--steps=300 --domains=sum --style=orders --operands=2,3,4 | "
       "--steps=250 --domains=sum --style=orders --operands=5")
EACH = {f"{questions} questions, {n} each": f"{SUM} --pool={questions} --support={n}"
        for questions, n in ((500, 1), (500, 4), (500, 12), (2000, 1), (167, 12))}
UPDATE = {f"{n} of 16, {steps} steps": f"{BASE} | {GRPO} --update={n} --steps={steps}"
          for steps in (24, 96) for n in (16, 4, 2)}
META = "--steps=700 | meta.py --steps"
ORDER = {
    "MAML": f"{META}=2400",
    "FOMAML": f"{META}=2800 --algo=fomaml",
    "ANIL": f"{META}=2600 --fast=3.up,3.down",
    "no inner loop": f"{META}=3200 --algo=none"}

PART = {
    "the whole trajectory": f"{META}=2400",
    "</think> alone": f"{META}=2400 --targets=closing",
    "all but </think>": f"{META}=2400 --targets=unclosed",
    "the last state": f"{META}=2400 --targets=last",
    "all but the last state": f"{META}=2400 --targets=earlier",
    "state after state": f"{META}=2400 --update=recursive",
    "what was done": "--steps=700 --style=steps | meta.py --steps=2400 --style=steps",
    "its own question never asked": f"{META}=2400 --itself=no",
    "no inner loop": f"{META}=3200 --algo=none"}

def against(better, worse, metrics=("exact",), cells=("expr:6",)) -> list:
    """Pairs of arms, every one with every other, in all metrics and cells."""
    return [(a, b, metric, where) for a in better for b in worse
            for metric in metrics for where in cells]

def updates(metric: str) -> list:
    return [pair for steps in (24, 96) for pair in against(
        [f"16 of 16, {steps} steps"], [f"{n} of 16, {steps} steps" for n in (4, 2)], [metric],
        ["expr:5"])]

TABLE = {
    "methods": Comparison("""
SFT, GRPO, SFT then GRPO, SFT then DPO from one base: which inner loop is best? (Tables 1, 2, 3)

The base calculates, and has as many habits that do not help: two operations at once, dots.

Table 2: SFT has the higher exact match and mG-Pass@8 than GRPO from the same base.
Table 3: SFT, then GRPO beats GRPO alone in both.
Table 3, stronger: it also beats SFT alone, which the paper does not compare.
Table 3, from a pool: SFT's data is perfect and unlimited here, which favours it. On 300 questions
    with a trajectory each, GRPO on the same questions after SFT beats going on with SFT.""",
        "Tables 2, 3: SFT gives a better inner loop than RL, and RL is better after SFT",
        {"expr:5": METHODS},
        {part: against([a], [b], ["exact", "mg"], ["expr:5"]) for part, a, b in (
            ("Table 2", "SFT", "GRPO"), ("Table 3", "SFT, then GRPO", "GRPO"),
            ("Table 3, stronger", "SFT, then GRPO", "SFT"),
            ("Table 3, from a pool", "pool: SFT, then GRPO", "pool: SFT, longer"))}),
    "length": Comparison("""
Are longer trajectories better, being more inner steps? (Table 2)

finer steps: states after every operation beat states after every other one, at as many questions
    and at as many tokens.""",
        "Table 2: longer trajectories are more inner steps, and better", {"expr:5,6": LENGTH},
        {"finer steps": against(["states"], [*LENGTH][1:], cells=["expr:5,6"])}),
    "generalize": Comparison("""
Do trajectories generalise within and across domains? (Fig. 7)

Trained sizes, more operands, a new domain: a model of states beats one that answers directly, and
    took as long to train, in its own way of answering.
what is left, not what was done: in all three it beats a model of the style `steps`.""",
        "Fig. 7: trajectories generalise within and across domains",
        dict.fromkeys(GROUPS.values(), GENERALIZE),
        {group: against(["states"], ["direct answers"], cells=[cells])
         for group, cells in GROUPS.items()} |
        {"what is left, not what was done": against(["states"], ["steps"],
                                                    cells=GROUPS.values())}),
    "support": Comparison("""
Do more trajectories per question help, being a larger support set? (Figs. 8, 9)

Fig. 8: distinct trajectories per question in SFT, at as many samples: 12 beat 1, and 4 beat 1.
    (Five addends have no more that hold no test question.)
Fig. 8, at as many trajectories: 2,000 of them are worth more as 4 or 12 each of fewer questions.
Fig. 9: outputs of a group that enter GRPO's gradient, the advantages using all 16, at as many
    rollouts: 16 beat 4 and 2, after 24 steps and after 96.
Fig. 9, mG-Pass@8: the same for samples in place of greedy answers.""",
        "Figs. 8, 9: more trajectories per question are a larger support set, and better",
        {"sum:5": EACH, "expr:5": UPDATE},
        {"Fig. 8": against([*EACH][1:3], [*EACH][:1], cells=["sum:5"]),
         "Fig. 8, at as many trajectories": against([[*EACH][1], [*EACH][4]], [[*EACH][3]],
                                                    cells=["sum:5"]),
         "Fig. 9": updates("exact"), "Fig. 9, mG-Pass@8": updates("mg")}),
    "order": Comparison("""
Does the order of the outer gradient matter? (Eq. 8, which the paper does not run)

MAML, FOMAML (constant inner gradients), ANIL (the last layers move) and no inner loop from the same
SFT, for equal time. (Reptile, 1803.02999, is the latter: with one inner step it goes down the loss
of the tasks at theta.) Rates are meta.py's, chosen for MAML; for FOMAML and ANIL inner rates of 1
and 10 were tried, with one seed, and are as good or worse. Asked are a sibling of the trajectory's
question and an operation beyond it: of theta', or of theta where there is no inner loop.

an inner loop: MAML beats none.
the second order: MAML beats FOMAML.
before the last block: MAML, whose inner loop moves the block before it, beats ANIL, whose inner
    loop moves the last one.""",
        "Eq. 8: the second-order path from the answer through the trajectory's update matters",
        {"expr:6": ORDER},
        {part: against(["MAML"], [other], ["sibling", "beyond"])
         for part, other in (("an inner loop", "no inner loop"), ("the second order", "FOMAML"),
                             ("before the last block", "ANIL"))}),
    "parts": Comparison("""
What of a trajectory must an inner step learn from, for theta' to know it? (Eq. 4)

Meta-training anew, with an inner loss on a part of the trajectory; state after state, as Eq. 4 is
written: every state moves what the one before left, and is read without it (three times as long);
and with trajectories that say what was done, `3+5=8;8*2=6`, whose results stand in several places.
All have as many meta-steps, and as much time but for the recursion. Asked of theta': another
operation on the trajectory's last two results, and an operation beyond.

every part: the whole trajectory beats each of its parts.
at once: one step on all states beats the recursion.
it adds up: after what was done theta' beats theta that was trained as long without an inner
    loop.
trained in: asked the trajectory's own question, its last state missing, theta' does better where
    meta-training asked that as well.""",
        "Eq. 4: a trajectory's steps add up, each being an update of its own",
        {"expr:6": PART},
        {"every part": against([*PART][:1], [*PART][1:5], ["sibling"]),
         "at once": against([*PART][:1], ["state after state"], ["sibling", "beyond"]),
         "it adds up": against(["what was done"], ["no inner loop"], ["sibling", "beyond"]),
         "trained in": against([*PART][:1], ["its own question never asked"], ["cut"])})}
