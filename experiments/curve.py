"""Does the answer's loss fall along a trajectory, how, and can the fall be predicted? (Figs. 2, 3)

L_hat is the NLL of the answer's digit after a part of a trajectory (Algorithm 3). Questions are
held out and have six operands.

direction: L_hat falls along a correct trajectory, and further than along one with a mistake in it,
    than along another question's, and than along as many dots.
progressive: the median question's largest step is less than 2/3 of its whole fall, and the median
    question falls in two effective steps or more, (sum d)^2 / sum d^2 of its falls d from state to
    state. (A question that falls by less than 0.5 nats says nothing and is left out.)
the mean slides: the mean of all questions falls at every state, until it is below 0.1 nats.
the law: after some states L_hat is the loss of the question that is left, asked alone. No number is
    fitted. With 5, 4 and 3 operands left the rank correlation of the two over questions is above
    0.7, and their distance is less than half of what it is when questions swap partners. Only
    states that are themselves held out count.
the jump's place: the largest step of a question stands where the law puts it in at least 80 %.
states replace one another: with two operands left, the last state alone (all earlier ones left out)
    gives the right answer at least 0.9 times as often as the whole trajectory does.
own outputs: along what the model itself writes, sampled at temperature 1, L_hat falls where the
    output ends right, and rises where it ends wrong.

Supported where all 95 % intervals over questions lie above 0, refuted where one lies below, else
inconclusive. Shown without a verdict: the last state swapped for another question's.
"""
import random
from itertools import accumulate

import numpy as np
import torch

from analyze import at_states, curves_of, direct_logp, nll_of
from data import arithmetic, text
from experiments import cell_of, others_of
from experiments.figure import COLOURS, band, losses, panels
from lab.flags import fail
from lab.score import held_out, respond
from lab.verdict import decide_all, interval

CLAIM = "C1, C2: the answer's loss falls along a correct trajectory only, and step by step"
LEFT = (5, 4, 3)                    # operands left, where the law is tested
SHOWN = 20                          # single questions drawn
LEAST = 0.5                         # nats: a fall that has a shape
KINDS = {"correct": "right", "wrong": "with a mistake", "other": "another question's",
         "filler": "dots"}


def measure(c, runs):
    """-> ({kind: L_hat after 0 to 5 states (N, 6)}, {right, wrong: falls along the model's own
    outputs}, L_q of what is left (N, 5), {operands left: (L_hat, L_q of what is left)},
    {intervention: truths}, one question token by token)."""
    model, rng = runs.sft(), random.Random(c.seed)
    questions, _ = cell_of(c)
    if questions[0].operands <= max(LEFT):
        fail(f"--cells={c.cells}: curve wants questions of more than {max(LEFT)} operands")
    steps = [arithmetic.steps(q, rng)[0] for q in questions]
    wrong = [arithmetic.corrupt(q, rng) or (t, q.answer) for q, t in zip(questions, steps)]
    trajectories = {"correct": steps, "wrong": [t for t, _ in wrong],
                    "other": others_of(questions, steps, rng),
                    "filler": [["." * len(s) for s in t] for t in steps]}
    states = {kind: in_context(model, questions, ts) for kind, ts in trajectories.items()}
    think = ";".join(steps[0])
    example = {"text": f"{questions[0].text} = {questions[0].answer}", "tokens": think,
               "L_hat": curves_of(model, questions[:1], [think])[0].round(4).tolist()}
    many = held_out(questions[0].domain, questions[0].operands, 3 * c.questions)
    law = {n: law_at(model, many, n, rng) for n in LEFT}
    return (states, own_outputs(c, model, questions), foretold(model, questions, steps), law,
            interventions(model, questions, steps, rng), example)

def in_context(model, questions, trajectories):
    """L_hat after 0, 1, ... whole states of trajectories -> (N, states)."""
    thinks = [";".join(t) for t in trajectories]
    curves = curves_of(model, questions, thinks)
    return np.stack([at_states(y, t) for y, t in zip(curves, thinks)])

def foretold(model, questions, steps):
    """L_q of what is left after 0, 1, ... states, but for the answer, asked alone."""
    lefts = [[q.text for q in questions], *list(zip(*steps))[:-1]]
    return np.stack([alone(model, questions, left) for left in lefts], 1)

def alone(model, questions, left):
    """L_q of what is left of questions, asked without any trajectory."""
    asked = [arithmetic.question(q.domain, state) for q, state in zip(questions, left)]
    return nll_of(direct_logp(model, asked), asked)

def law_at(model, questions, n, rng):
    """-> (L_hat where n operands are left, L_q of what is left), where both are held out."""
    asked, steps = [], []
    for q in questions:
        for _ in range(40):
            t = arithmetic.steps(q, rng)[0][:q.operands - n]
            if arithmetic.split(t[-1]) != "train":
                asked.append(q)
                steps.append(t)
                break
    thinks = [";".join(t) for t in steps]
    L_hat = nll_of(direct_logp(model, asked, thinks=thinks), asked)
    return L_hat, alone(model, asked, [t[-1] for t in steps])

def own_outputs(c, model, questions):
    """Falls of L_hat along what the model wrote itself, by whether it then was right."""
    generator = torch.Generator(model.device).manual_seed(c.seed)
    asked = questions[:len(questions) // 2] * 4
    outputs = respond(model, asked, temperature=1.0, generator=generator)
    known = [(q, t, a) for q, (t, a) in zip(asked, outputs) if t and text.plain(t)]
    curves = curves_of(model, [q for q, _, _ in known], [t for _, t, _ in known])
    falls = np.array([y[0] - y[-1] for y in curves])
    right = np.array([arithmetic.verify(q, a) for q, _, a in known], bool)
    return {"right": falls[right], "wrong": falls[~right]}

def interventions(model, questions, steps, rng):
    """With two operands left -> {intervention: does the model say so? a truth per question}."""
    shown = [t[:-1] for t in steps]
    other = others_of(questions, list(zip(questions, shown)), rng)
    swapped = [[*t[:-1], theirs[-1]] for t, (_, theirs) in zip(shown, other)]
    answers = [q.answer for q in questions]

    def says(trajectories, wanted):
        logp = direct_logp(model, questions, thinks=[";".join(t) for t in trajectories])
        said = logp.argmax(-1).tolist()
        return np.array([str(digit) == answer for digit, answer in zip(said, wanted)])
    return {"all states: the answer": says(shown, answers),
            "last state alone: the answer": says([t[-1:] for t in shown], answers),
            "last state swapped: the other's answer": says(swapped, [o.answer for o, _ in other]),
            "last state swapped: its own answer": says(swapped, answers)}


def judge(raw):
    states, own, predicted, law, says, example = raw
    correct = states["correct"]
    fall = {kind: y[:, 0] - y[:, -1] for kind, y in states.items()}
    shaped = fall["correct"] > LEAST
    d = -np.diff(correct[shaped], axis=1)           # falls from state to state
    largest, effective = d.max(1) / d.sum(1), d.sum(1)**2 / (d**2).sum(1)
    hit = jumps(correct, predicted)
    last, whole = (says[f"{seen}: the answer"] for seen in ("last state alone", "all states"))
    verdicts, gaps = decide_all({
        "direction": {"falls": fall["correct"]} | {
            f"further than along {KINDS[kind]}": fall["correct"] - fall[kind]
            for kind in ("wrong", "other", "filler")},
        "the mean slides": {
            f"state {i + 1}": correct[:, i] - correct[:, i + 1]
            for i, mean in enumerate(correct.mean(0)[:-1]) if mean > 0.1},
        "states replace one another": {"last state alone - 0.9 of all": last - 0.9 * whole},
        "own outputs": {                            # a good model may write too few wrong ones
            "right ones: falls": own["right"], "wrong ones: rises": -own["wrong"]},
        "progressive": {"2/3 - largest step": (2 / 3 - largest, np.median),
                        "effective steps - 2": (effective - 2, np.median)},
        "the law": margins_of_law(law),
        "the jump's place": {"largest step where predicted - 0.8": hit - 0.8}})
    return verdicts, {
        "gaps": gaps,
        "means": {kind: [interval(column) for column in y.T] for kind, y in states.items()},
        "predicted": [interval(column) for column in predicted.T],
        "singles": correct[:SHOWN].round(3).tolist(),
        "largest step": interval(largest, np.median),
        "says": {name: interval(truths) for name, truths in says.items()},
        "example": example,
        "rank correlation": {n: round(float(rank_correlation(np.stack(pair, 1), 0)), 3)
                             for n, pair in law.items()},
        "scatter": {n: np.round(pair, 2).tolist() for n, pair in law.items()}}

def rank_correlation(pairs, axis):
    """Spearman's, over pairs (..., N, 2). Ties, which a bootstrap draws, keep their order."""
    r = pairs.argsort(axis).argsort(axis).astype(float)
    r = r - r.mean(axis, keepdims=True)
    return (r[..., 0] * r[..., 1]).sum(axis) / np.sqrt((r**2).sum(axis).prod(-1))

def nearer(a, b):
    """Half the distance of numbers (N,) where questions swap partners, less their distance."""
    return 0.5 * np.abs(a - np.roll(b, len(b) // 2)) - np.abs(a - b)

def margins_of_law(law):
    margins = {}
    for n, (h, d) in law.items():
        margins[f"{n} left: rank correlation - 0.7"] = (
            np.stack((h, d), 1), lambda pairs, axis: rank_correlation(pairs, axis) - 0.7)
        margins[f"{n} left: half of swapped - distance"] = nearer(h, d)
    return margins

def jumps(correct, predicted):
    """Does the largest step stand where the law puts it? -> a truth per question that falls."""
    jumped, foretold = (-np.diff(y, axis=1) for y in (correct[:, :-1], predicted))
    falls = jumped.sum(1) > LEAST
    return jumped[falls].argmax(1) == foretold[falls].argmax(1)


def draw(numbers):
    fig, front, kinds, law, single = panels(2, 4.6, 3.1, rows=2)
    means, grey = numbers["means"], "#bbbbbb"
    x = np.arange(len(means["correct"]))
    thin = front.plot(x, np.transpose(numbers["singles"]), color=grey, lw=0.8)
    thin[0].set_label(f"{SHOWN} single questions")
    band(front, x, means["correct"], COLOURS["correct"], "mean of all")
    predicted = [mean for mean, _, _ in numbers["predicted"]]
    front.plot(x[:-1], predicted, "k--", lw=1.2, label="predicted: what is left, asked alone")
    for kind, label in KINDS.items():
        band(kinds, x, means[kind], COLOURS[kind], label)
    for ax, title in ((front, "Each question jumps, the average slides"),
                      (kinds, "Only the right trajectory helps")):
        losses(ax, title=title, xlabel="states read",
               ylabel=r"$\hat{L}$, loss of the answer (nats)")
    for (n, (h, d)), colour in zip(numbers["scatter"].items(), ("theta", "other", "correct")):
        rho = numbers["rank correlation"][n]
        law.plot(d, h, ".", color=COLOURS[colour], ms=3,
                 label=f"{n} operands left, rank correlation {rho:.2f}")
    top = max(law.get_xlim()[1], law.get_ylim()[1])
    law.plot([0, top], [0, top], color="#cccccc", lw=0.8, zorder=0)
    law.set(xlabel="what is left, asked alone (nats)", ylabel=r"$\hat{L}$ (nats)",
            title="The loss is that of the question that is left")
    law.legend()

    # Token by token. Training asked where a state is whole, and there alone.
    y, tokens = np.array(numbers["example"]["L_hat"]), numbers["example"]["tokens"]
    single.plot(y, color=grey, lw=0.8, label="after every token")
    ends = at_states(np.arange(len(y)), tokens)
    single.plot(ends, y[ends], "o-", color=COLOURS["correct"], ms=4, label="after whole states")
    averaged = [*accumulate(y, lambda mean, loss: 0.99 * mean + 0.01 * loss)]   # as in Figs. 2, 3
    single.plot(averaged, "--", color=COLOURS["wrong"], lw=1.2, label="moving average of 0.99")
    single.set_xticks(range(len(y)), ["·", *tokens], fontsize=5, family="monospace")
    losses(single, ylabel=r"$\hat{L}$ (nats)", title=f"One question: {numbers['example']['text']}")
    return fig

def show(numbers):
    says = [f"{name} in {100 * share:.0f} %" for name, (share, _, _) in numbers["says"].items()]
    means = ", ".join(f"{mean:.2f}" for mean, _, _ in numbers["means"]["correct"])
    return [f"mean loss after 0, 1, ... states: {means} nats (chance 2.30)",
            f"largest step of the median question, of its fall: {numbers['largest step']}",
            f"rank correlation with the prediction: {numbers['rank correlation']}", *says]
