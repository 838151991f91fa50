"""What does theta' know after it was moved along a trajectory? (Eq. 4, made explicit)

theta' is theta moved along a trajectory by one inner step, and is then asked questions without any.
The trajectory's question is held out; most of what is asked about it is not. Sizes are its operand
counts, as in training.

it carries results: asked another operation on the trajectory's last two results, the two swapped,
    one of them, an operation beyond, or the question itself, theta' of the largest trained size is
    right more often than theta. Asked the question itself, it is so more often than theta' after
    another question's trajectory.
it leaves the rest alone: facts, and unrelated questions as long as the trajectory's, are answered
    at most 3 points worse than by theta.
as the context does: asked the question itself, with the last state missing or not, theta' is at
    most 3 points worse than the trajectory in the context.
the step descends: along theta + s (theta' - theta) the inner loop's own loss, at its temperature,
    is lower at s = 1 than at 0.
two curves coincide: L_q(theta'_i) after i states in the weights and L_hat after i states in the
    context agree question by question, for 1 <= i < n: a rank correlation of at least 0.8 of that
    between the context and the context along another order of the same steps, and a distance of at
    most half of what it is when questions swap partners.

Supported where all 95 % intervals over questions lie above 0, refuted where one lies below, else
inconclusive.
"""
import random
from typing import NamedTuple

import numpy as np
import torch

from analyze import at_states, curves_of, direct_logp, explicit_curves, nll_of
from data import arithmetic, text
from data.tasks import Task, support
from experiments import others_of
from experiments.curve import rank_correlation
from experiments.figure import COLOURS, band, chance_line, panels, whiskers
from lab.score import commonest, held_out, shallow
from lab.verdict import bootstrap, decide, interval, rule, widened
from meta import adapt, moved, outcomes, part_of

CLAIM = "Eq. 4: theta', moved along a trajectory, knows what the trajectory found"
CARRIED = ("sibling", "swapped", "left", "right", "beyond", "cut")
LABELS = {"sibling": "another operation\non both results", "swapped": "results\nswapped",
          "left": "left\nresult", "right": "right\nresult", "beyond": "an operation\nbeyond",
          "cut": "itself, last\nstate missing", "whole": "itself", "fact": "a fact",
          "unrelated": "an unrelated\nquestion", "other": "itself, after\nanother's"}
WHERE = {"theta": ("theta", r"$\theta$"), "theta_prime": ("weights", r"$\theta'$"),
         "in_context": ("correct", "in the context")}
ALONG = np.linspace(0, 1.5, 13)                     # s, on the way from theta to theta' and beyond


class Raw(NamedTuple):
    table: dict                             # {operands: {kind: {where: truths}}}
    lines: dict                             # {operands: share of {commonest, shallow}}
    curves: dict                            # {context, reordered, weights, other: (N, n + 1)}
    along: dict                             # {inner loss, L_support, L_q: (N, len(ALONG))}
    carriers: dict                          # {what of the trajectory is left: truths}


# --------------------------------------------------------------------------------------- measure

def measure(c, runs):
    model, inner, config = runs.meta()
    largest, table, lines = max(config.counts), {}, {}
    for n in (largest, largest + 1):
        questions = held_out("expr", n, c.questions)
        lines[n] = {"commonest": commonest(questions),
                    "shallow": float(np.mean(shallow(questions)))}
        table[n] = {}
        for kind in LABELS:
            row, _ = outcomes(model, inner, questions, kind, config.style, c.seed)
            table[n][kind] = {where: np.array(ok) for where, ok in row.items()}
    questions = held_out("expr", largest, c.questions // 2)
    rng = random.Random(f"{c.seed}/explicit")
    return Raw(table, lines, both_curves(model, inner, questions, config.style, rng),
               *along_the_step(model, inner, questions, config.style, rng))

def both_curves(model, inner, questions, style, rng):
    """Losses of questions after 0, 1, ... steps of their own trajectory, in the context and in the
    weights."""
    steps = [arithmetic.steps(q, rng, style)[0] for q in questions]
    orders = [arithmetic.steps(q, rng, style)[0] for q in questions]

    def in_context(trajectories):
        thinks = [";".join(t) for t in trajectories]
        curves = curves_of(model, questions, thinks)
        return np.stack([at_states(y, t) for y, t in zip(curves, thinks)])
    theirs = others_of(questions, list(zip(questions, steps)), rng)
    other = explicit_curves(model, inner, questions, [t for _, t in theirs],
                            [o for o, _ in theirs])
    return {"context": in_context(steps), "reordered": in_context(orders),
            "weights": np.stack(explicit_curves(model, inner, questions, steps)),
            "other": np.stack(other)}

def along_the_step(model, inner, questions, style, rng, along=ALONG):
    """One trajectory per question, its last state missing, asked another operation on its results
    -> ({inner loss, L_support at temperature 1, L_q: along the step}, {what of the trajectory the
    step is made of: truths})"""
    steps = [arithmetic.steps(q, rng, style)[0][:-1] for q in questions]
    asked = [arithmetic.relatives(q)["sibling"] for q in questions]
    rows = support([Task(q, t, [a], False) for q, t, a in zip(questions, steps, asked)],
                   model.device)
    updates = adapt(model, inner, rows, order=1).updates
    n_targets, losses = (rows.inner >= 0).sum(1), {"inner": [], "L_support": [], "L_q": []}
    for s in along:
        hook = moved(inner, scaled(updates, float(s)), len(questions))
        with torch.no_grad():
            h = model(**rows.inputs(), hook=hook)
        for name, tau in (("inner", inner.tau), ("L_support", 1.0)):
            nll = model.score(h, inner.asked(rows), tau).detach()
            losses[name].append((nll.sum(1) / n_targets).cpu().numpy())
        losses["L_q"].append(nll_of(direct_logp(model, asked, hook), asked))

    parts = {"the whole trajectory": None, "</think> alone": "closing",
             "all but </think>": "unclosed", "the last state and </think>": "last",
             "all but those": "earlier"}
    carriers = {}
    for name, what in parts.items():
        part = rows
        if what:
            kept = part_of(rows, what)
            part = rows._replace(inner=rows.inner.masked_fill(~kept, text.IGNORE))
        logp = direct_logp(model, asked, adapt(model, inner, part, order=1).hook)
        carriers[name] = np.array([str(d) == q.answer
                                   for d, q in zip(logp.argmax(-1).tolist(), asked)])
    return {name: np.stack(y, 1) for name, y in losses.items()}, carriers

def scaled(updates, s):
    """The same update, s times as far."""
    return [{name: (X, s * D) for name, (X, D) in update.items()} for update in updates]


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    sizes = list(raw.table)
    largest = raw.table[sizes[0]]
    def gap(kind, a, b, bonus=0.0):
        return largest[kind][a].astype(float) - largest[kind][b] + bonus
    margins = {
        "it carries results":
            {f"{kind}: theta' - theta": gap(kind, "theta_prime", "theta") for kind in CARRIED}
            | {"cut: theta' - after another's": largest["cut"]["theta_prime"].astype(float)
               - largest["other"]["theta_prime"]},
        "it leaves the rest alone":
            {f"{kind}: theta' - theta + 3 points": gap(kind, "theta_prime", "theta", 0.03)
             for kind in ("fact", "unrelated")},
        "as the context does":
            {f"{kind}: theta' - context + 3 points": gap(kind, "theta_prime", "in_context", 0.03)
             for kind in ("cut", "whole")},
        "the step descends":
            {"inner loss before - after":
             raw.along["inner"][:, 0] - raw.along["inner"][:, list(ALONG).index(1.0)]}}
    verdicts, gaps = {}, {}
    for part, row in margins.items():
        verdicts[part], gaps[part] = decide(row)
    verdicts["two curves coincide"], gaps["two curves coincide"], found = coincide(raw.curves)
    return verdicts, found | {
        "gaps": gaps, "largest": sizes[0], "lines": raw.lines,
        "table": {n: {kind: {where: interval(ok) for where, ok in row.items()}
                      for kind, row in kinds.items()} for n, kinds in raw.table.items()},
        "curves": {name: [interval(column) for column in y.T] for name, y in raw.curves.items()},
        "along": {name: [interval(column) for column in y.T] for name, y in raw.along.items()},
        "carriers": {name: interval(ok) for name, ok in raw.carriers.items()}}

def coincide(curves):
    """Compares two curves question by question, at every number of states but none and all."""
    plain, wide, found = {}, {}, {"rank correlation": {}, "ceiling": {}}
    inside = range(1, curves["context"].shape[1] - 1)
    level = widened(2 * len(inside))
    for i in inside:
        w, h, again = (curves[name][:, i] for name in ("weights", "context", "reordered"))
        closer = 0.5 * np.abs(w - np.roll(h, len(h) // 2)) - np.abs(w - h)
        for level_of, into in ((0.95, plain), (level, wide)):
            into[f"{i} states: rank correlation - 0.8 of the ceiling"] = bootstrap(
                np.stack((w, h, again), 1), below_ceiling, level=level_of)
            into[f"{i} states: half of swapped - distance"] = bootstrap(closer, level=level_of)
        for name, pair in (("rank correlation", (w, h)), ("ceiling", (h, again))):
            found[name][i] = round(float(rank_correlation(np.stack(pair, 1), 0)), 3)
    gaps = {name: [round(float(x), 4) for x in row] for name, row in plain.items()}
    return rule(plain, wide), gaps, found


def below_ceiling(triples, axis):
    """(weights, context, context again), (..., N, 3) -> the first two's rank correlation less 0.8
    of the last two's."""
    return (rank_correlation(triples[..., :2], axis)
            - 0.8 * rank_correlation(triples[..., 1:], axis))


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((kinds, curves), (along, carriers)) = panels(2, 2, width=5.0, heights=[3.2, 3.0])
    n = str(numbers["largest"])
    table, lines = ({str(k): v for k, v in numbers[key].items()}[n] for key in ("table", "lines"))
    for shift, (where, (colour, label)) in zip((-0.2, 0, 0.2), WHERE.items()):
        rows = [(i, table[kind][where]) for i, kind in enumerate(LABELS) if where in table[kind]]
        whiskers(kinds, [i + shift for i, _ in rows], [row for _, row in rows], COLOURS[colour],
                 fmt="o", label=label)
    for (name, share), va in zip(lines.items(), ("top", "bottom")):
        kinds.axhline(share, color="#bbbbbb", lw=0.8, ls=":", zorder=0)
        kinds.text(-0.7, share, name, fontsize=6, color="#777777", va=va)
    kinds.set_xticks(range(len(LABELS)), LABELS.values(), fontsize=6, rotation=60)
    kinds.set(title=f"What theta' answers after a trajectory of {n} operands", ylabel="right",
              ylim=(0, 1.2), xlim=(-0.8, len(LABELS) - 0.5))
    kinds.legend(fontsize=7, ncols=3, loc="upper center")

    names = {"context": ("correct", "in the context"), "weights": ("weights", "in the weights"),
             "other": ("other", "in the weights, another question's")}
    for name, (colour, label) in names.items():
        y = numbers["curves"][name]
        band(curves, range(len(y)), y, COLOURS[colour], label)
    curves.set(title="The same trajectory, in the context and in the weights",
               xlabel="states of the trajectory", ylabel="loss of the answer (nats)",
               ylim=(0, 2.5))
    for name, colour, label in (("inner", "other", "inner loss (at its temperature), per token"),
                                ("L_support", "filler", "of the trajectory, per token"),
                                ("L_q", "weights", "of the answer")):
        band(along, ALONG, numbers["along"][name], COLOURS[colour], label)
    along.axvline(1, color="#cccccc", lw=0.8, zorder=0)
    along.set(title="On the way from theta (0) to theta' (1)", xlabel="s", ylabel="loss (nats)",
              ylim=(0, 4.2))
    for ax in (curves, along):
        chance_line(ax)
        ax.legend(fontsize=7)
    for i, (name, (mean, low, high)) in enumerate(numbers["carriers"].items()):
        carriers.barh(i, mean, 0.7, color=COLOURS["weights"])
        carriers.errorbar(mean, i, xerr=[[mean - low], [high - mean]], ecolor="k", lw=0.8)
    carriers.set_yticks(range(len(numbers["carriers"])), numbers["carriers"])
    carriers.invert_yaxis()
    carriers.set(title="What the inner step is taken on", xlim=(0, 1.03),
                 xlabel="right, another operation on both results")
    return fig

def show(numbers):
    lines = []
    for n, kinds in numbers["table"].items():
        shares = [f"{kind} {100 * row['theta_prime'][0]:.0f} ({100 * row['theta'][0]:.0f})"
                  for kind, row in kinds.items() if row]
        lines.append(f"{n} operands, theta' (theta) right in %: {', '.join(shares)}")
    return lines
