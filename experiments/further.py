"""Does theta' calculate, or could anything else have given its answers? (Eqs. 4 and 8)

Meta-training from SFT, both of the arm's seed. A question goes an operation beyond the trajectory
that the inner loop reads, as in `explicit`.

reasons on: theta' is right more often than theta, trained for as long to answer the same questions
    without an inner loop, and than its own theta.
without </think>: the inner loss leaves out the token behind a trajectory, and takes longer to
    learn. theta' is right more often than its own theta, and so it is where the last result of the
    question's own trajectory is cut off.
modulo 97: theta' is right more often than its own theta, which hardly ever is without a trajectory.

Differences over seeds and questions: supported where all 95 % intervals are above 0, refuted where
one is below, else inconclusive.
"""
from experiments.arms import METRICS, draw_arms, kept, run_arms, seeds_of
from lab.verdict import decide, spoken

CLAIM = "Eqs. 4, 8: weights moved along a trajectory carry its results and calculate with them"
META = "--steps=1500 | meta.py"
ARMS = {
    "inner loop": META,
    "inner loop, without </think>": f"{META} --unclosed --steps=2000",
    "no inner loop": f"{META} --algo=none --steps=1500"}
MODSUM = {"inner loop, modulo 97": f"{META} --domain=modsum"}
SHOWN = ("further", "copied", "further, theta", "weights, cut")


def measure(c):
    return run_arms(c, ARMS, n=8), run_arms(c, MODSUM, "modsum:3,4", n=8)

def judge(raw):
    expr, modsum = raw
    with_loop, unclosed, bare = (expr[name].scores for name in ARMS)
    modulo = modsum["inner loop, modulo 97"].scores
    parts = {
        "reasons on": {
            "theta' - theta without an inner loop": with_loop["further"] - bare["further, theta"],
            "theta' - its theta": with_loop["further"] - with_loop["further, theta"]},
        "without </think>": {
            "theta' - its theta": unclosed["further"] - unclosed["further, theta"],
            "theta' - its theta, last result cut": unclosed["weights, cut"] - unclosed["theta"]},
        "modulo 97": {"theta' - its theta": modulo["further"] - modulo["further, theta"]}}
    verdicts, gaps = {}, {}
    for part, margins in parts.items():
        verdicts[part], gaps[part] = decide(margins)
    return spoken(verdicts), {"gaps": gaps, "arms": kept(expr | modsum)}

def draw(numbers):
    arms = numbers["arms"]
    timed = {f"{name} ({arm['seconds']:.0f} s)": arm for name, arm in arms.items()}
    metrics = [m for m in METRICS if m in SHOWN]
    return draw_arms(timed, f"3 and 4 operands, {seeds_of(arms)} seeds", metrics)
