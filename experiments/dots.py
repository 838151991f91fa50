"""Do dots help? (the paper's claim that tokens are inner steps, at its emptiest)

L_hat after n dots instead of a trajectory, n = 0, 4, ..., 32. Supported if 32 dots lower the
answer's NLL against none: 95 % bootstrap interval over questions above 0; refuted if below.
"""
import numpy as np

from analyze import curves_of
from lab.figure import COLOURS, panels
from lab.verdict import bootstrap, decide
from lab.score import held_out

CLAIM = "tokens without content are inner steps too"
DOTS = range(0, 33, 4)


def measure(c, model):
    """-> {n: L_hat after n dots, one a question}."""
    questions = held_out("expr", 4, c.questions)
    curves = curves_of(model, questions, ["." * max(DOTS)] * len(questions))
    return {n: np.array([y[n] for y in curves]) for n in DOTS}

def judge(loss):
    verdict, gaps = decide({"none - 32 dots": loss[0] - loss[32]})
    bands = {n: [round(float(x), 4) for x in bootstrap(y)] for n, y in loss.items()}
    return verdict, {"gaps": gaps, "L_hat": bands}

def draw(numbers):
    fig, ((ax,),) = panels(1, 1)
    mean, low, high = zip(*numbers["L_hat"].values())
    ax.plot(DOTS, mean, "o-", color=COLOURS["filler"])
    ax.fill_between(DOTS, low, high, color=COLOURS["filler"], alpha=0.2, lw=0)
    ax.set(xlabel="dots read", ylabel=r"$\hat{L}$ (nats a token)", ylim=(0, None))
    return fig
