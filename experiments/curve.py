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
inconclusive. Shown without a verdict: the last state swapped for another question's; a detour back
to a longer state.
"""
import random
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from analyze import at_states, curves_of, direct_logp, nll_of
from data import arithmetic, text
from experiments import cell_of, others_of
from experiments.figure import COLOURS, band, chance_line, panels
from lab.flags import fail
from lab.score import held_out, respond
from lab.verdict import decide, decide_all, interval

CLAIM = "C1, C2: the answer's loss falls along a correct trajectory only, and step by step"
LEFT = (5, 4, 3)                    # operands left, where the law is tested
SHOWN = 20                          # single questions drawn
LEAST = 0.5                         # nats: a fall that has a shape
KINDS = {"correct": "right", "wrong": "with a mistake", "other": "another question's",
         "filler": "dots"}


class Raw(NamedTuple):
    """Numbers per question; states: (N, 6), after 0 to 5 whole states."""
    title: str
    states: dict                            # {kind: L_hat at states}
    sampled: dict                           # {right, wrong: fall along the model's own outputs}
    predicted: np.ndarray                   # L_q of what is left, asked alone
    law: dict                               # {operands left: (L_hat, L_q of what is left)}
    says: dict                              # {intervention: truths}
    detour: np.ndarray                      # rise of L_hat on the way back
    example: dict                           # one question, token by token


# --------------------------------------------------------------------------------------- measure

def measure(c, runs):
    model, rng = runs.sft(), random.Random(c.seed)
    questions, title = cell_of(c)
    if questions[0].operands <= max(LEFT):
        fail(f"--cells={c.cells}: curve wants questions of more than {max(LEFT)} operands")
    steps = [arithmetic.steps(q, rng)[0] for q in questions]
    wrong = [arithmetic.corrupt(q, rng) or (t, q.answer) for q, t in zip(questions, steps)]
    trajectories = {"correct": steps, "wrong": [t for t, _ in wrong],
                    "other": others_of(questions, steps, rng),
                    "filler": [["." * len(s) for s in t] for t in steps]}
    states, tokens = {}, {}
    for kind, ts in trajectories.items():
        thinks = [";".join(t) for t in ts]
        tokens[kind] = curves_of(model, questions, thinks)
        states[kind] = np.stack([at_states(y, t) for y, t in zip(tokens[kind], thinks)])
    predicted = [states["correct"][:, 0]]
    for i in range(states["correct"].shape[1] - 2):
        predicted.append(alone(model, questions, [t[i] for t in steps]))
    example = {"text": f"{questions[0].text} = {questions[0].answer}",
               "tokens": ";".join(steps[0]), "L_hat": tokens["correct"][0].round(4).tolist()}
    many = held_out(questions[0].domain, questions[0].operands, 3 * c.questions)
    law = {n: law_at(model, many, n, rng) for n in LEFT}
    return Raw(title, states, own_outputs(c, model, questions), np.stack(predicted, 1), law,
               *interventions(model, questions, steps, rng), example)

def alone(model, questions, left):
    """L_q of what is left of questions, asked without any trajectory."""
    asked = [arithmetic.question(q.domain, state) for q, state in zip(questions, left)]
    return nll_of(direct_logp(model, asked), asked)

def law_at(model, questions, n, rng):
    """-> (L_hat where n operands are left, L_q of what is left), of questions and states that are
    both held out."""
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
    """Falls of L_hat along trajectories that the model wrote itself, by whether it then was
    right."""
    generator = torch.Generator(model.device).manual_seed(c.seed)
    asked = questions[:len(questions) // 2] * 4
    outputs = respond(model, asked, temperature=1.0, generator=generator)
    falls = {"right": [], "wrong": []}
    known = [(q, t, a) for q, (t, a) in zip(asked, outputs) if t and text.plain(t)]
    curves = curves_of(model, [q for q, _, _ in known], [t for _, t, _ in known])
    for (q, _, a), y in zip(known, curves):
        falls["right" if arithmetic.verify(q, a) else "wrong"].append(y[0] - y[-1])
    return {kind: np.array(v) for kind, v in falls.items()}

def interventions(model, questions, steps, rng):
    """With two operands left -> ({intervention: does the model then say so? a truth per question},
    rise of L_hat where a detour leads back to five operands)."""
    shown = [t[:-1] for t in steps]
    other = others_of(questions, list(zip(questions, shown)), rng)
    swapped = [[*t[:-1], theirs[-1]] for t, (_, theirs) in zip(shown, other)]
    answers = [q.answer for q in questions]

    def says(trajectories, wanted):
        logp = direct_logp(model, questions, thinks=[";".join(t) for t in trajectories])
        said = logp.argmax(-1).tolist()
        return np.array([str(digit) == answer for digit, answer in zip(said, wanted)])

    detours = [[*t, t[0]] for t in shown]
    before, after = (
        nll_of(direct_logp(model, questions, thinks=list(map(";".join, ts))), questions)
        for ts in (shown, detours))
    return {"all states: the answer": says(shown, answers),
            "last state alone: the answer": says([t[-1:] for t in shown], answers),
            "last state swapped: the other's answer": says(swapped, [o.answer for o, _ in other]),
            "last state swapped: its own answer": says(swapped, answers)}, after - before


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    correct = raw.states["correct"]
    fall = {kind: y[:, 0] - y[:, -1] for kind, y in raw.states.items()}
    shaped = fall["correct"] > LEAST
    largest, effective = shape(correct[shaped])
    margins = {
        "direction": {"falls": fall["correct"]} | {
            f"further than along {KINDS[kind]}": fall["correct"] - fall[kind]
            for kind in ("wrong", "other", "filler")},
        "the mean slides": sliding(correct),
        "states replace one another": {
            "last state alone - 0.9 of all": raw.says["last state alone: the answer"]
            - 0.9 * raw.says["all states: the answer"]},
        "own outputs": {                            # a good model may write too few wrong ones
            "right ones: falls": raw.sampled["right"], "wrong ones: rises": -raw.sampled["wrong"]}}
    verdicts, gaps = decide_all(margins)
    steps = {"2/3 - largest step": 2 / 3 - largest, "effective steps - 2": effective - 2}
    verdicts["progressive"], gaps["progressive"] = decide(steps, np.median)
    verdicts["the law"], gaps["the law"], numbers = judge_law(raw)
    hit, numbers["always the commonest place"] = jumps(raw)
    numbers["largest step where predicted"] = interval(hit)
    verdicts["the jump's place"], gaps["the jump's place"] = decide(
        {"largest step where predicted - 0.8": hit - 0.8})
    return verdicts, numbers | {
        "gaps": gaps, "title": raw.title, "questions": len(correct),
        "means": {kind: [interval(column) for column in y.T] for kind, y in raw.states.items()},
        "predicted": [interval(column) for column in raw.predicted.T],
        "singles": correct[:SHOWN].round(3).tolist(),
        "largest step": interval(largest, np.median),
        "effective steps": interval(effective, np.median),
        "says": {name: interval(truths) for name, truths in raw.says.items()},
        "rise on a detour": interval(raw.detour),
        "example": raw.example,
        "scatter": {n: np.round(pair, 2).tolist() for n, pair in raw.law.items()}}

def shape(states):
    """Loss at states (N, S) -> (share of the fall that the largest step makes, effective steps),
    one per question."""
    d = -np.diff(states, axis=1)
    whole = d.sum(1)
    return d.max(1) / whole, whole**2 / (d**2).sum(1)

def sliding(states):
    """Falls of the loss from state to state, as long as the mean before is above 0.1 nats."""
    means = states.mean(0)
    return {f"state {i + 1}": states[:, i] - states[:, i + 1]
            for i in range(len(means) - 1) if means[i] > 0.1}

def rank_correlation(pairs, axis):
    """Spearman's, over pairs (..., N, 2). Ties, which a bootstrap draws, keep their order."""
    r = pairs.argsort(axis).argsort(axis).astype(float)
    r = r - r.mean(axis, keepdims=True)
    return (r[..., 0] * r[..., 1]).sum(axis) / np.sqrt((r**2).sum(axis).prod(-1))

def judge_law(raw):
    margins = {}
    found = {"rank correlation": {}, "distance": {}, "distance, partners swapped": {}}
    for n, (h, d) in raw.law.items():
        pairs, swapped = np.stack((h, d), 1), np.abs(h - np.roll(d, len(d) // 2))
        margins[f"{n} left: rank correlation - 0.7"] = (
            pairs, lambda pairs, axis: rank_correlation(pairs, axis) - 0.7)
        margins[f"{n} left: half of swapped - distance"] = 0.5 * swapped - np.abs(h - d)
        found["rank correlation"][n] = round(float(rank_correlation(pairs, 0)), 3)
        found["distance"][n] = interval(np.abs(h - d))
        found["distance, partners swapped"][n] = interval(swapped)
    return *decide(margins), found

def jumps(raw):
    """-> (does the largest step stand where the law puts it? a truth per question that falls; what
    always naming the commonest place would get)"""
    jumped, foretold = (-np.diff(y, axis=1) for y in (raw.states["correct"][:, :-1], raw.predicted))
    falls = jumped.sum(1) > LEAST
    at = jumped[falls].argmax(1)
    commonest = np.bincount(at, minlength=1).max() / max(1, len(at))
    return at == foretold[falls].argmax(1), round(float(commonest), 3)


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((front, kinds), (law, single)) = panels(2, 2, width=4.6, heights=[3.1, 3.1])
    x = np.arange(len(numbers["means"]["correct"]))
    for y in numbers["singles"]:
        front.plot(x, y, color="#bbbbbb", lw=0.8)
    front.plot([], [], color="#bbbbbb", lw=0.8, label=f"{SHOWN} single questions")
    band(front, x, numbers["means"]["correct"], COLOURS["correct"], "mean of all")
    predicted = [mean for mean, _, _ in numbers["predicted"]]
    front.plot(x[:-1], predicted, "k--", lw=1.2, label="predicted: what is left, asked alone")
    front.set(title="Each question jumps, the average slides")
    colours = {"correct": "correct", "wrong": "wrong", "other": "other", "filler": "filler"}
    for kind, colour in colours.items():
        band(kinds, x, numbers["means"][kind], COLOURS[colour], KINDS[kind])
    kinds.set(title="Only the right trajectory helps")
    for ax in (front, kinds):
        chance_line(ax)
        ax.set(xlabel="states read", ylabel=r"$\hat{L}$, loss of the answer (nats)", ylim=(0, None))
        ax.legend(fontsize=7)
    for (n, (h, d)), colour in zip(numbers["scatter"].items(), ("theta", "other", "correct")):
        rho = numbers["rank correlation"][n]
        law.plot(d, h, ".", color=COLOURS[colour], ms=3,
                 label=f"{n} operands left, rank correlation {rho:.2f}")
    top = max(law.get_xlim()[1], law.get_ylim()[1])
    law.plot([0, top], [0, top], color="#cccccc", lw=0.8, zorder=0)
    law.set(xlabel="what is left, asked alone (nats)", ylabel=r"$\hat{L}$ (nats)",
            title="The loss is that of the question that is left")
    law.legend(fontsize=7)
    draw_single(single, numbers["example"])
    return fig

def draw_single(ax, example):
    """One question token by token; dots where a state is whole, the only places where training
    asked; and the moving average under which the paper's Figures 2 and 3 show theirs."""
    y, tokens = np.array(example["L_hat"]), example["tokens"]
    ends = [0, *(i for i, token in enumerate(tokens) if token == ";"), len(tokens)]
    ax.plot(y, color="#bbbbbb", lw=0.8, label="after every token")
    ax.plot(ends, y[ends], "o-", color=COLOURS["correct"], ms=4, label="after whole states")
    averaged = [*accumulate(y, lambda mean, loss: 0.99 * mean + 0.01 * loss)]
    ax.plot(averaged, "--", color=COLOURS["wrong"], lw=1.2, label="moving average of 0.99")
    chance_line(ax)
    ax.set_xticks(range(len(tokens) + 1), ["·", *tokens], fontsize=5, family="monospace")
    ax.set(ylabel=r"$\hat{L}$ (nats)", title=f"One question: {example['text']}", ylim=(0, None))
    ax.legend(fontsize=7)

def show(numbers):
    says = [f"{name} in {100 * share:.0f} %" for name, (share, _, _) in numbers["says"].items()]
    means = ", ".join(f"{mean:.2f}" for mean, _, _ in numbers["means"]["correct"])
    return [f"mean loss after 0, 1, ... states: {means} nats (chance 2.30)",
            f"largest step of the median question, of its fall: {numbers['largest step']}",
            f"rank correlation with the prediction: {numbers['rank correlation']}", *says]
