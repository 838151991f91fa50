"""Does the order of the outer gradient matter? (Eq. 8, which the paper does not run)

MAML, FOMAML, Reptile, ANIL and no inner loop, from the model in --sft. The steps are chosen for
equal time by the cost of a step; what it came to stands beside the scores, as in `methods`.

in the weights: after trajectories without their last result, MAML's theta' beats FOMAML's,
    Reptile's, and the theta that was trained as long to answer without an inner loop.
in context: the gradient through the trajectory's keys and values beats the one detached from them,
    at equal time and at equal steps.

Differences over seeds and questions: supported where all 95 % intervals are above 0, refuted where
one is below, else inconclusive.
"""
from experiments.arms import METRICS, draw_arms, kept, run_arms, seeds_of
from lab.verdict import crossed, decide, spoken

CLAIM = "Eq. 8: the second-order path from the answer through the trajectory's update matters"
ARMS = {
    "MAML": "--steps=100",
    "ANIL": "--algo=anil --steps=167",
    "FOMAML": "--algo=fomaml --steps=143",
    "Reptile": "--algo=reptile --alpha=0.1 --steps=130",
    "no inner loop": "--algo=none --steps=186",
    "no inner loop, as many steps": "--algo=none --steps=117",
    "no inner loop, detached": "--algo=none --context_grad=detached --steps=117"}


def measure(c, model):
    """The model is not looked at here: every arm starts from its checkpoint."""
    arms = {name: f"meta.py --init={c.sft}/ckpt.pt {words}" for name, words in ARMS.items()}
    return run_arms(c, arms, n=8)

def judge(arms):
    cut = {name: last_result_cut(arm) for name, arm in arms.items()}
    context = {name: arm.scores["context, cut"] for name, arm in arms.items()}
    bare, detached = "no inner loop", "no inner loop, detached"
    weights = {f"MAML - {name}": cut["MAML"] - cut[name] for name in ("FOMAML", "Reptile", bare)}
    full = {f"{name} - detached": context[name] - context[detached]
            for name in (bare, f"{bare}, as many steps")}
    verdicts, gaps = {}, {}
    for part, margins in {"in the weights": weights, "in context": full}.items():
        verdicts[part], gaps[part] = decide(margins)
    return spoken(verdicts), {"gaps": gaps, "ANIL - MAML": crossed(cut["ANIL"] - cut["MAML"]),
                              "arms": kept(arms)}

def last_result_cut(arm):
    """What theta' answers after such a trajectory, or theta where there is no inner loop."""
    return arm.scores.get("weights, cut", arm.scores["theta"])

def draw(numbers):
    arms = numbers["arms"]
    timed = {f"{name} ({arm['seconds']:.0f} s)": arm for name, arm in arms.items()}
    metrics = [m for m in METRICS if m in ("weights", "weights, cut", "theta", "context, cut")]
    return draw_arms(timed, f"expr, 3 and 4 operands, {seeds_of(arms)} seeds", metrics)
