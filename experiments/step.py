"""What does one inner step do, and what of the trajectory does it? (Eq. 4)

A trajectory of the largest trained size, its last state missing, moves theta to theta', which is
asked another operation on the trajectory's last two results. The way from theta to theta', and on
beyond it, is theta + s (theta' - theta): a real path, where the paper's Figure 2 draws one that is
none.

the step descends: at s = 1 the inner loop's own loss, at its temperature, is lower than at 0.
the answer comes with it: so is the loss of the answer.

Supported where the 95 % interval over questions lies above 0, refuted where it lies below, else
inconclusive. Shown beside it: theta' moved by a part of the trajectory's tokens alone; whose the
update is, as shares of |theta' - theta|^2, cross terms halved; and its cosine with the exact patch
(`patch`), the change of the same layer that does what reading does at `</think>`.
"""
import random

import numpy as np
import torch

from analyze import cosines, direct_logp, nll_of
from data import arithmetic, text
from data.tasks import Task, support
from experiments import others_of
from experiments.figure import COLOURS, band, bars, losses, panels
from lab.flags import fail
from lab.score import held_out
from lab.verdict import decide_all, interval
from meta import adapt, moved, part_of

CLAIM = "Eq. 4: one step down the trajectory's loss lowers the answer's"
ALONG = np.linspace(0, 1.5, 13)                     # s
PARTS = {"the whole trajectory": None, "</think> alone": "closing", "all but </think>": "unclosed",
         "the last state and </think>": "last", "all but those": "earlier"}


def measure(c, runs):
    """-> ({inner, L_support, L_q: (N, len(ALONG))}, {part of the trajectory: truths}, {kind
    of token: share of the update}, {whose trajectory is read: cosine per question})."""
    model, inner, config = runs.meta()
    if inner.update != "gradient":
        fail(f"--meta={c.meta}: an inner step by a gradient is expected")
    questions, rng = held_out("expr", max(config.counts), c.questions // 2), random.Random(c.seed)
    rows, asked = trials(model, questions, config.style, random.Random(f"{c.seed}/step"))
    own = [arithmetic.steps(q, rng, config.style)[0] for q in questions]
    read = {"the same trajectory": own, "another question's": others_of(questions, own, rng)}
    with_patch = {whose: sum(cosines(model, inner, list(zip(questions, own, ts))).values(), [])
                  for whose, ts in read.items()}
    return (along_the_step(model, inner, rows, asked), carriers(model, inner, rows, asked),
            shares(inner, rows, adapt(model, inner, rows, order=1).updates[0]), with_patch)

def trials(model, questions, style, rng):
    """A trajectory per question, its last state missing -> (support rows, the Questions asked)."""
    steps = [arithmetic.steps(q, rng, style)[0][:-1] for q in questions]
    asked = [arithmetic.relatives(q)["sibling"] for q in questions]
    tasks = [Task(q, t, [a], False) for q, t, a in zip(questions, steps, asked)]
    return support(tasks, model.device), asked

def along_the_step(model, inner, rows, asked, along=ALONG):
    """The inner loss, the trajectory's own loss at temperature 1, both per token, and the answer's,
    on the way from theta to theta' -> {name: (N, len(along))}."""
    updates = adapt(model, inner, rows, order=1).updates
    n_targets, losses = (rows.inner >= 0).sum(1), {"inner": [], "L_support": [], "L_q": []}
    for s in along:
        part = [{name: (X, float(s) * D) for name, (X, D) in update.items()} for update in updates]
        hook = moved(inner, part, len(asked))
        with torch.no_grad():
            h = model(**rows.inputs(), hook=hook)
        for name, targets, tau in (("inner", inner.asked(rows), inner.tau),
                                   ("L_support", rows.inner, 1.0)):
            nll = model.score(h, targets, tau).detach()
            losses[name].append((nll.sum(1) / n_targets).cpu().numpy())
        losses["L_q"].append(nll_of(direct_logp(model, asked, hook), asked))
    return {name: np.stack(y, 1) for name, y in losses.items()}

def carriers(model, inner, rows, asked):
    """Is theta' right that was moved by a part of the tokens? -> {part: truths}."""
    found = {}
    for name, what in PARTS.items():
        kept = part_of(rows, what) if what else rows.inner >= 0
        part = rows._replace(inner=rows.inner.masked_fill(~kept, text.IGNORE))
        said = direct_logp(model, asked, adapt(model, inner, part, order=1).hook).argmax(-1)
        found[name] = np.array([str(d) == q.answer for d, q in zip(said.tolist(), asked)])
    return found

def shares(inner, rows, update):
    """Of |theta' - theta|^2 = sum over tokens i, j of (x_i x_j)(d_i d_j), what each kind of token
    makes -> {kind: share}."""
    by_token = 0
    for name, (X, D) in update.items():
        products = (X @ X.mT) * (D @ D.mT)                              # (N, P, P)
        by_token = by_token + (inner.rate(name, 0) ** 2 * products.sum(2)).detach()
    following, inside = rows.inner, rows.inner >= 0
    digit, separator = following < 10, following == text.SEPARATOR
    closing = part_of(rows, "closing")
    kinds = {"the question": ~inside, "before a digit": inside & digit,
             "before ;": separator, "before </think>": closing,
             "before ( ) + - *": inside & ~digit & ~separator & ~closing}
    return {name: float(by_token[there].sum() / by_token.sum()) for name, there in kinds.items()}

def judge(raw):
    along, carried, parts, with_patch = raw
    one = list(ALONG).index(1.0)
    fall = {name: {"loss before - after": y[:, 0] - y[:, one]} for name, y in along.items()}
    verdicts, gaps = decide_all({"the step descends": fall["inner"],
                                 "the answer comes with it": fall["L_q"]})
    return verdicts, {
        "gaps": gaps, "shares": parts,
        "along": {name: [interval(column) for column in y.T] for name, y in along.items()},
        "carriers": {name: interval(ok) for name, ok in carried.items()},
        "cosine with the patch": {whose: interval(v) for whose, v in with_patch.items() if v}}

def draw(numbers):
    fig, along, right, tokens = panels(3, 4.2, 3)
    for name, colour, label in (("inner", "other", "inner loss (at its temperature), per token"),
                                ("L_support", "filler", "of the trajectory, per token"),
                                ("L_q", "weights", "of the answer")):
        band(along, ALONG, numbers["along"][name], COLOURS[colour], label)
    along.axvline(1, color="#cccccc", lw=0.8, zorder=0)
    losses(along, title="On the way from theta (0) to theta' (1)", xlabel="s", ylim=(0, 4.2),
           ylabel="loss (nats)")
    bars(right, {part: {"mean": row} for part, row in numbers["carriers"].items()},
         title="After a step on these tokens alone", xlim=(0, 1),
         xlabel="right: another last operation")
    bars(tokens, {kind: {"mean": [share] * 3} for kind, share in numbers["shares"].items()},
         title="Which tokens move the weights", xlabel="share of the squared update")
    return fig

def show(numbers):
    return [f"cosine with the exact patch of {whose}: {mean:.3f} [{low:.3f}, {high:.3f}]"
            for whose, (mean, low, high) in numbers["cosine with the patch"].items()]
