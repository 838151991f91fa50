"""Is `</think>` a step of momentum: faster, perhaps to a worse place? (Fig. 5)

It is forced at eleven places along the model's own trajectory, and the answer read there.

Supported if, on average over places before the last result, an answer forced there has a lower loss
than after `<think></think>` (the thinking so far was of use at once), and costs accuracy against
thinking on: 95 % intervals over questions above 0; refuted if one lies below 0; else inconclusive.
Entropy: of the answer's first token. (The answer without any `</think>` would only measure form.)
"""
from typing import NamedTuple

import numpy as np
import torch

from analyze import cell_of, queries
from data import arithmetic, text
from lab.figure import COLOURS, band, panels
from lab.flags import fail
from lab.score import respond
from lab.verdict import bootstrap, decide
from meta import answers

CLAIM = "Fig. 5: the end-of-thinking delimiter acts like momentum, towards a local optimum"
PLACES = np.linspace(0, 1, 11)              # fractions of the trajectory
SIZE = 1024                                 # rows a batch


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    """Arrays (questions, places)."""
    title: str
    loss: np.ndarray                        # L_hat with </think> forced there
    entropy: np.ndarray                     # of the answer's first token there
    forced: np.ndarray                      # is the answer forced there right?
    on: np.ndarray                          # is the answer right when thinking goes on from there?
    early: np.ndarray                       # does the place stand before the last result?


def measure(c, model):
    cell = cell_of(c)
    written = [t for t, _ in respond(model, cell.questions)]
    pairs = [(q, t) for q, t in zip(cell.questions, written) if "=" in t and text.plain(t)]
    if not pairs:
        fail(f"{c.sft}: this model writes no trajectories to cut short")
    rows, early = [], []
    for q, t in pairs:
        for place in PLACES:
            i = round(place * len(t))
            rows.append((q, t[:i]))
            early.append(i < t.rfind("=") + 1)
    questions, thinks = (list(v) for v in zip(*rows))
    loss, entropy = read_there(model, questions, thinks)
    said = answers(model, questions, thinks, where="in_context", size=SIZE)
    forced = [arithmetic.verify(q, a) for q, a in zip(questions, said)]
    on = thinking_on(model, questions, thinks)
    arrays = [np.array(v, dtype=float).reshape(len(pairs), len(PLACES))
              for v in (loss, entropy, forced, on, early)]
    return Raw(cell.title, *arrays)

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
        """Mean over places before the last result, a number a question."""
        return (v * raw.early).sum(1) / raw.early.sum(1)

    verdict, gaps = decide(margins(early(raw.loss), raw.loss[:, 0], early(raw.forced),
                                   early(raw.on)))
    measured = {"loss": raw.loss, "entropy": raw.entropy, "forced": raw.forced, "on": raw.on}
    return verdict, {"gaps": gaps, "title": raw.title,
                     "by place": {name: by_place(v) for name, v in measured.items()}}

def margins(loss, empty, forced, on):
    """A number a question each: L_hat with </think> forced early, L_hat of <think></think>; right
    when cut short, right when going on."""
    return {"L of <think></think> - cut short": empty - loss,
            "accuracy going on - cut short": on - forced}

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
