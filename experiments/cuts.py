"""Does the loss fall step by step only where training cut its trajectories short? (Figs. 2, 3)

--cut is the share of training samples whose trajectory stops anywhere, with the answer behind it.
Without any, an answer behind half a trajectory is a form that the model never saw; with many, the
model learns to guess there. Each arm trains with another share; then L_hat is read after whole
steps of a correct trajectory, as experiments/curve.py does.

Supported in an arm if more than half of its questions have a Spearman correlation below -0.5, and
more than half a largest step below 2/3 of the fall, which says that the medians are: 95 % intervals
over seeds and questions above 0; refuted where one lies below 0; else inconclusive.
"""
from typing import NamedTuple

import numpy as np

from analyze import cell_of, curves_of
from experiments.arms import seeds_of, train_arms
from experiments.curve import after_steps, shape
from lab import machine
from lab.figure import COLOURS, bars, panels, whiskers
from lab.run import checksum
from lab.score import right
from lab.verdict import crossed, decide, spoken
from train import load_model

CLAIM = "Figs. 2, 3: the answer's loss falls step by step, however training cut its trajectories"
SFT = "--steps=600 --domains=expr"
ARMS = {f"--cut={share}": f"{SFT} --cut={share}" for share in (0, 0.05, 0.5)}
SHADES = (COLOURS["filler"], COLOURS["light"], COLOURS["correct"])


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    """One arm's measurements."""
    steps: np.ndarray                       # L_hat after whole steps (seeds, questions, steps + 1)
    right: np.ndarray                       # is the model's own answer right? (seeds, questions)
    checksums: list                         # of the weights, one a seed


def measure(c):
    """-> (title, {arm: Raw})"""
    cell, folders = cell_of(c), train_arms(c, ARMS)
    return cell.title, {name: measure_arm(c, cell, folders[name]) for name in ARMS}

def measure_arm(c, cell, folders):
    steps, correct = [], []
    for folder in folders:
        model, _ = load_model(folder / "ckpt.pt", machine.device_of(c))
        curves = curves_of(model, cell.questions, cell.thinks)
        steps.append([after_steps(t, y) for t, y in zip(cell.thinks, curves)])
        correct.append(right(model, cell.questions))
    checksums = [checksum(folder / "ckpt.pt") for folder in folders]
    return Raw(np.array(steps), np.array(correct, dtype=float), checksums)


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    title, arms = raw
    verdicts, numbers = {}, {}
    for name, arm in arms.items():
        rho, share = (np.array(v) for v in zip(*(shape(steps) for steps in arm.steps)))
        verdicts[name], gaps = decide(margins(rho, share))
        numbers[name] = {
            "gaps": gaps, "flags": ARMS[name], "checksums": arm.checksums,
            "L_hat_after_steps": [crossed(v) for v in np.moveaxis(arm.steps, 2, 0)],
            "spearman_medians": np.median(rho, 1).round(4).tolist(),
            "largest_step_medians": np.median(share, 1).round(4).tolist(),
            "exact": {"mean": crossed(arm.right, share=True),
                      "seeds": arm.right.mean(1).round(4).tolist()}}
    return spoken(verdicts), {"title": title, "arms": numbers}

def margins(rho, share):
    """Spearman correlations and largest steps (seeds, questions) -> margins. A median lies below a
    bound where more than half of the numbers do."""
    return {"share with spearman below -0.5, less 1/2": (rho < -0.5) - 0.5,
            "share with largest step below 2/3, less 1/2": (share < 2 / 3) - 0.5}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((steps, exact),) = panels(1, 2, width=4.6, heights=[3.2])
    arms = numbers["arms"]
    for i, (name, arm) in enumerate(arms.items()):
        rows, share = arm["L_hat_after_steps"], np.mean(arm["largest_step_medians"])
        beside = np.arange(len(rows)) + 0.06 * (i - 1)
        whiskers(steps, beside, rows, SHADES[i],
                 label=f"{name}: largest step {share:.0%} of the fall")
    steps.set(title=f"{numbers['title']}, {seeds_of(arms)} seeds", ylim=(0, None),
              xticks=range(len(rows)), xlabel="steps of the correct trajectory",
              ylabel=r"$\hat{L}$ (nats a token)")
    steps.set_ylim(0, 1.5 * steps.get_ylim()[1])            # room for the legend
    steps.legend(fontsize=8, loc="upper left")
    bars(exact, {name: arm["exact"] for name, arm in arms.items()},
         xlabel="exact match, with the model's own trajectory", xlim=(0, 1))
    return fig
