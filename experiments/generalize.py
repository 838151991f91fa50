"""Do trajectories generalise within and across domains? (Fig. 7)

The runs of `methods` and one trained to answer directly, on held-out questions of the sizes that
they were trained on, on more operands, and on a domain never seen. (Two operands are no test: the
operation that a held-out question asks is a step of training trajectories.)

A group of cells is supported if SFT with trajectories beats both the base and direct answers there:
exact match over seeds and questions, 95 % intervals above 0; refuted if one lies below 0; else
inconclusive. Where no arm is right in a tenth, it is not testable here.
"""
from dataclasses import replace

from experiments import methods
from experiments.arms import difference, kept, run_arms
from lab.figure import bars, panels
from lab.verdict import decide, spoken

CLAIM = "Fig. 7: trajectories generalise within and across domains"
ARMS = {"direct answers": f"{methods.SFT}=1100 --direct=1 --cut=0"}
ARMS |= {name: methods.ARMS[name] for name in ("base", "SFT", "GRPO")}
GROUPS = {"trained sizes": "expr:3,4", "more operands": "expr:5,6", "new domain": "diff:3,4"}
FLOOR = 0.1


def measure(c):
    return {group: run_arms(replace(c, cells=cells), ARMS, n=8) for group, cells in GROUPS.items()}

def judge(groups):
    verdicts, numbers = {}, {}
    for group, arms in groups.items():
        margins = difference(arms, "SFT", "base") | difference(arms, "SFT", "direct answers")
        verdicts[group], gaps = decide(margins)
        if max(arm.scores["exact"].mean() for arm in arms.values()) < FLOOR:
            verdicts[group] = "not testable here"
        numbers[group] = {"gaps": gaps, "arms": kept(arms)}
    return spoken(verdicts), numbers

def draw(numbers):
    fig, (axes,) = panels(1, len(numbers), width=3.6, heights=[2.8])
    for i, (ax, (group, row)) in enumerate(zip(axes, numbers.items())):
        rows = {name: arm["scores"]["exact"] for name, arm in row["arms"].items()}
        bars(ax, rows, title=f"{group} ({GROUPS[group]})", xlabel="exact match", xlim=(0, 1))
        if i:
            ax.set_yticklabels([])
    return fig
