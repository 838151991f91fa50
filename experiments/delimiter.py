"""Is `</think>` a step of momentum: faster, perhaps to a worse place? (Fig. 5)

It is forced at ten places along the model's own trajectory, and the answer read there.

momentum: not testable here. It takes the same place with the delimiter and without it, and an
    answer without `</think>` has a form that the model never saw: its loss would measure form.
of use at once: forced after the thinking so far, an answer has a lower loss than after
    `<think></think>`.
early costs accuracy: thinking on from there would be right more often.

The last two on average over the places behind the first and before the last result: supported if
the 95 % interval over questions lies above 0, refuted if it lies below, else inconclusive.
Entropy: of the answer's first token.
"""
from typing import NamedTuple

import numpy as np
import torch

from analyze import cell_of, queries
from data import arithmetic, text
from lab.figure import COLOURS, band, panels
from lab.flags import fail
from lab.score import respond
from lab.verdict import bootstrap, decide, spoken
from meta import answers

CLAIM = "Fig. 5: the end-of-thinking delimiter acts like momentum, towards a local optimum"
PLACES = np.linspace(0, 1, 11)              # fractions of the trajectory, 0: <think></think>
SIZE = 1024                                 # rows a batch


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    """Arrays (questions, places)."""
    title: str
    loss: np.ndarray                        # L_hat with </think> forced there
    entropy: np.ndarray                     # of the answer's first token there
    forced: np.ndarray                      # is the answer forced there right?
    on: np.ndarray                          # is the answer right when thinking goes on from there?
    early: np.ndarray                       # is the place behind 0 and before the last result?


def measure(c, model):
    cell = cell_of(c)
    written = [t for t, _ in respond(model, cell.questions)]
    pairs = [(q, t) for q, t in zip(cell.questions, written) if text.plain(t) and any(early_in(t))]
    if not pairs:
        fail(f"{c.sft}: this model writes no trajectories to cut short")
    questions = [q for q, _ in pairs for _ in PLACES]
    thinks = [t[:i] for _, t in pairs for i in places_in(t)]
    early = [early_in(t) for _, t in pairs]
    loss, entropy = read_there(model, questions, thinks)
    said = answers(model, questions, thinks, where="in_context", size=SIZE)
    forced = [arithmetic.verify(q, a) for q, a in zip(questions, said)]
    on = thinking_on(model, questions, thinks)
    arrays = [np.array(v, dtype=float).reshape(len(pairs), len(PLACES))
              for v in (loss, entropy, forced, on, early)]
    return Raw(cell.title, *arrays)

def places_in(t):
    """How many tokens of a trajectory stand before every place."""
    return [round(place * len(t)) for place in PLACES]

def early_in(t):
    return [0 < i <= t.rfind("=") for i in places_in(t)]

@torch.no_grad()
def read_there(model, questions, thinks):
    """-> (the answer's loss behind every prefix and </think>, entropy of its first token)"""
    loss, entropy = [], []
    for i in range(0, len(questions), SIZE):
        ids, targets = queries(model, questions[i:i + SIZE], thinks[i:i + SIZE])
        h = model(ids)
        loss += (model.score(h, targets).sum(1) / (targets >= 0).sum(1)).tolist()
        first = (targets >= 0).int().argmax(1)      # where the answer's first token is predicted
        logp = model.logits(h[torch.arange(len(h)), first]).log_softmax(-1)
        entropy += (-(logp.exp() * logp).sum(-1)).tolist()
    return loss, entropy

def thinking_on(model, questions, thinks):
    """Is the answer right when the model goes on from every prefix itself?"""
    right = []
    for i in range(0, len(questions), SIZE):
        qs = questions[i:i + SIZE]
        heads = [text.prompt(q.text) + text.encode(t) for q, t in zip(qs, thinks[i:i + SIZE])]
        for q, row in zip(qs, model.generate(heads, text.EOS, 64, pad=text.PAD)):
            ends = text.END_THINK in row
            answer = text.decode(row[row.index(text.END_THINK) + 1:]) if ends else ""
            right.append(arithmetic.verify(q, answer))
    return right


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    def early(v):
        """Mean over early places, a number a question."""
        return (v * raw.early).sum(1) / raw.early.sum(1)

    found = margins(early(raw.loss), raw.loss[:, 0], early(raw.forced), early(raw.on))
    verdicts, gaps = {"momentum": "not testable here"}, {}
    for part, margin in found.items():
        verdicts[part], gaps[part] = decide(margin)
    measured = {"loss": raw.loss, "entropy": raw.entropy, "forced": raw.forced, "on": raw.on}
    return spoken(verdicts), {"gaps": gaps, "title": raw.title,
                              "by place": {name: by_place(v) for name, v in measured.items()}}

def margins(loss, empty, forced, on):
    """A number a question each: L_hat with </think> forced early, L_hat of <think></think>; right
    when cut short, right when going on -> {part of the claim: margins}"""
    return {"of use at once": {"L of <think></think> - cut short": empty - loss},
            "early costs accuracy": {"accuracy going on - cut short": on - forced}}

def by_place(v):
    mean, low, high = (np.round(x, 4).tolist() for x in bootstrap(v, draws=500))
    return {"mean": mean, "low": low, "high": high}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((loss, right, entropy),) = panels(1, 3, width=4, heights=[3.4])
    rows, forced = numbers["by place"], "</think> forced here"
    band(loss, rows["loss"], COLOURS["wrong"], forced, "o-", PLACES)
    loss.axhline(rows["loss"]["mean"][0], color=COLOURS["theta"], ls="--", lw=1,
                 label="<think></think>")
    loss.set(ylabel=r"$\hat{L}$, answer's NLL (nats a token)", title=numbers["title"])
    band(right, rows["forced"], COLOURS["wrong"], forced, "o-", PLACES)
    band(right, rows["on"], COLOURS["correct"], "thinking on from here", "o-", PLACES)
    right.set(ylabel="share right")
    band(entropy, rows["entropy"], COLOURS["wrong"], forced, "o-", PLACES)
    entropy.set(ylabel="entropy of the answer's first token (nats)")
    for ax in (loss, right, entropy):
        ax.set(xlabel="fraction of the model's own trajectory", ylim=(0, None))
    right.set(ylim=(0, 1.15))
    loss.legend()
    right.legend(loc="center left")
    return fig
