"""Does the order of the outer gradient matter? (Eq. 8, which the paper does not run)

MAML, FOMAML, Reptile, ANIL and no inner loop, from an SFT of the arm's own seed, for about equal
time by the cost of a step; what it came to stands beside the scores, as in `methods`. Inner rate,
temperature and outer rate of each arm are those of a few that did best on validation questions
after all of its steps, with one seed (`tried`); MAML's are meta.py's, two points below its best.

in the weights: asked an operation beyond the trajectory, MAML's theta' beats FOMAML's, Reptile's,
    and the theta that was trained as long to answer without an inner loop.
in context: the gradient through the trajectory's keys and values beats the one detached from them,
    at equal steps, where the last result is missing.

Differences over seeds and questions: supported where all 95 % intervals are above 0, refuted where
one is below, else inconclusive.
"""
from experiments.arms import METRICS, draw_arms, kept, run_arms, seeds_of
from experiments.further import ARMS as FURTHER, META
from lab.verdict import crossed, decide, spoken

CLAIM = "Eq. 8: the second-order path from the answer through the trajectory's update matters"
ARMS = {
    "MAML": FURTHER["inner loop"],
    "ANIL": f"{META} --algo=anil --tau=30 --steps=1200",
    "FOMAML": f"{META} --algo=fomaml --tau=30 --steps=1150",
    "Reptile": f"{META} --algo=reptile --alpha=0.1 --tau=30 --steps=1050",
    "no inner loop": FURTHER["no inner loop"],
    "no inner loop, detached": f"{FURTHER['no inner loop']} --context_grad=detached"}


def measure(c):
    return run_arms(c, ARMS, n=8)

def judge(arms):
    further = {name: an_operation_beyond(arm) for name, arm in arms.items()}
    context = {name: arm.scores["context, cut"] for name, arm in arms.items()}
    bare, detached = "no inner loop", "no inner loop, detached"
    weights = {f"MAML - {name}": further["MAML"] - further[name]
               for name in ("FOMAML", "Reptile", bare)}
    full = {f"{bare} - detached": context[bare] - context[detached]}
    verdicts, gaps = {}, {}
    for part, margins in {"in the weights": weights, "in context": full}.items():
        verdicts[part], gaps[part] = decide(margins)
    carried = {name: crossed(further[name] - arm.scores["further, theta"])
               for name, arm in arms.items() if "further" in arm.scores}
    return spoken(verdicts), {"gaps": gaps, "theta' - its own theta": carried,
                              "ANIL - MAML": crossed(further["ANIL"] - further["MAML"]),
                              "arms": kept(arms)}

def an_operation_beyond(arm):
    """What theta' answers then, or theta where there is no inner loop."""
    return arm.scores.get("further", arm.scores["further, theta"])

def draw(numbers):
    arms = numbers["arms"]
    timed = {f"{name} ({arm['seconds']:.0f} s)": arm for name, arm in arms.items()}
    shown = ("further", "further, theta", "weights, cut", "context, cut")
    return draw_arms(timed, f"expr, 3 and 4 operands, {seeds_of(arms)} seeds",
                     [m for m in METRICS if m in shown])
