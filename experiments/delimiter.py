"""Is `</think>` a step of momentum: faster, perhaps to a worse place? (Fig. 5)

The model writes a trajectory of its own. Then `</think>` is forced after its first k states, and
the answer is read there. A greedy model that thinks on from there ends as the whole trajectory
does.

momentum: not testable here. It would compare one place with `</think>` and without, and an answer
    without it has a form that the model never saw: its loss would measure form.
of use at once: forced early, the answer has a lower loss than after `<think></think>`.
to a worse place: thinking on would be right more often, and have a lower loss.

The last two on average over the places after the first state and before the last. Supported where
all 95 % intervals over questions lie above 0, refuted where one lies below, else inconclusive.
Training asks for the answer after every state, so that an early `</think>` is nothing new to the
model: `train.py --asides=no` makes one to which it is.
"""
from typing import NamedTuple

import numpy as np

from analyze import at_states, prefix_logp
from data import text
from experiments import cell_of
from experiments.figure import COLOURS, band, chance_line, panels
from lab.flags import fail
from lab.score import commonest, respond
from lab.verdict import decide, interval

CLAIM = "C7: the end-of-thinking delimiter acts like momentum, towards a local optimum"


class Raw(NamedTuple):
    """Arrays (questions, 1 + states): `</think>` forced after k = 0, 1, ... states."""
    title: str
    commonest: float                        # share right for always the commonest digit
    left_out: int                           # questions with another number of states
    loss: np.ndarray                        # L_hat there
    entropy: np.ndarray                     # of the answer's digit there
    right: np.ndarray                       # is the likeliest digit the answer?

def measure(c, runs):
    model = runs.sft()
    questions, title = cell_of(c)
    written = [(q, t) for q, (t, _) in zip(questions, respond(model, questions))
               if text.plain(t) and t.count(";") == q.operands - 2]
    if questions[0].operands < 3 or not written:
        fail(f"{c.sft} writes no trajectories of states here that could be cut short")
    logps = prefix_logp(model, *map(list, zip(*written)))
    logps = np.stack([at_states(logp, t) for logp, (_, t) in zip(logps, written)])
    answers = np.array([int(q.answer) for q, _ in written])
    loss = -logps[np.arange(len(answers)), :, answers]
    entropy = -(np.exp(logps) * logps).sum(-1)
    right = logps.argmax(-1) == answers[:, None]
    return Raw(title, commonest(questions), len(questions) - len(written), loss, entropy, right)

def judge(raw):
    cut, right = raw.loss[:, 1:-1].mean(1), raw.right.astype(float)
    margins = {"of use at once": {"L of <think></think> - cut short": raw.loss[:, 0] - cut},
               "to a worse place": {
                   "accuracy going on - cut short": right[:, -1] - right[:, 1:-1].mean(1),
                   "L cut short - going on": cut - raw.loss[:, -1]}}
    verdicts, gaps = {"momentum": "not testable here"}, {}
    for part, margin in margins.items():
        verdicts[part], gaps[part] = decide(margin)
    places = {name: [interval(column) for column in getattr(raw, name).T]
              for name in ("loss", "entropy", "right")}
    return verdicts, {"gaps": gaps, "title": raw.title, "left out": raw.left_out,
                      "commonest": raw.commonest, "places": places}

def draw(numbers):
    fig, ((loss, right, entropy),) = panels(1, 3, width=4, heights=[3.2])
    labels = {loss: ("loss", r"$\hat{L}$ (nats)", "The loss that is left"),
              right: ("right", "share right", "Right answers (grey: always the commonest digit)"),
              entropy: ("entropy", "nats", "How unsure the answer is: its entropy")}
    for ax, (name, ylabel, title) in labels.items():
        rows = numbers["places"][name]
        band(ax, range(len(rows)), rows, COLOURS["wrong"], "</think> forced here", "o-")
        ax.axhline(rows[0][0], color=COLOURS["theta"], ls=":", label="<think></think>")
        ax.axhline(rows[-1][0], color=COLOURS["correct"], ls="--", label="thinking on")
        if ax is not right:
            chance_line(ax)
        ax.set(xlabel="states of the model's own trajectory", ylabel=ylabel, title=title)
        ax.set(ylim=(0, None))
    right.axhline(numbers["commonest"], color=COLOURS["filler"], ls=":", lw=1)
    entropy.legend(fontsize=8)
    return fig
