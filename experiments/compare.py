"""Any arms against each other on the same held-out questions.

    python analyze.py compare --arm="--steps=300" --arm="--steps=300 --style=short" --seeds=5

No claim: measured. Differences are paired by seed and question, each arm against the first; 95 %
intervals resample seeds and questions. An arm's flags are those of train.py, or of another script
that it names first; `|` stands between stages that start from each other.
"""
from experiments.arms import METRICS, differences, draw_arms, kept, run_arms, seeds_of

CLAIM = "a comparison"


def measure(c):
    return run_arms(c, {arm: arm for arm in c.arm})

def judge(arms):
    first, *others = arms
    return "measured", {"gaps": differences(arms, [(arm, first) for arm in others]),
                        "arms": kept(arms)}

def show(numbers):
    """Every arm's scores as text."""
    for name, arm in numbers["arms"].items():
        print(name)
        for metric, row in arm["scores"].items():
            mean, low, high = row["mean"]
            print(f"    {METRICS[metric]:28} {mean:.3f} [{low:.3f}, {high:.3f}]")
        for key in ("reward", "preferred"):
            if key in arm:
                pairs = ", ".join(f"{a:.2f} to {b:.2f}" for a, b in arm[key])
                print(f"    {key}, first and last ten steps of every seed: {pairs}")
        print(f"    {arm['seconds']} s")

def draw(numbers):
    arms = numbers["arms"]
    return draw_arms(arms, f"{seeds_of(arms)} seeds")
