"""Do dots help? (the paper's claim that tokens are inner steps, at its emptiest)

L_hat after 0, 4, ..., 32 dots in place of a trajectory. Supported where 32 dots lower the answer's
loss against none: the 95 % interval over questions lies above 0; refuted where it lies below. The
default model never saw a dot; `train.py --style=states,filler` makes one that did.
"""
from analyze import curves_of
from experiments.figure import COLOURS, band, losses, panels
from lab.score import held_out
from lab.verdict import decide_all, interval

CLAIM = "tokens without content are inner steps too"
DOTS = range(0, 33, 4)


def measure(c, runs):
    """-> {n: L_hat after n dots, one per question}."""
    questions = held_out("expr", 4, c.questions)
    curves = curves_of(runs.sft(), questions, ["." * max(DOTS)] * len(questions))
    return {n: [curve[n] for curve in curves] for n in DOTS}

def judge(loss):
    falls = [none - dots for none, dots in zip(loss[0], loss[32])]
    verdicts, gaps = decide_all({"dots help": {"none - 32 dots": falls}})
    return verdicts, {"gaps": gaps, "L_hat": [interval(loss[n]) for n in DOTS]}

def draw(numbers):
    fig, ax = panels()
    band(ax, DOTS, numbers["L_hat"], COLOURS["filler"], "mean of all questions", "o-")
    losses(ax, title="The loss of the answer after dots", xlabel="dots read",
           ylabel=r"$\hat{L}$ (nats)")
    return fig
