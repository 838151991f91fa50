"""One question, token by token: the moving picture to show a class.

The model writes the trajectory of a question. Before it and after every state it is asked for the
answer in two ways. In the context: it reads question and states, and has the loss L_hat. In the
weights: theta' is theta after the inner step on the states so far, reads the question alone, and
has the loss L_q(theta'). Both begin at one theta, that of --meta. In the middle of a state nobody
is asked, as in training. Then both are asked a question that goes on, an operation beyond.

Which question: the first held-out one of six operands that theta answers right after a trajectory
of its own and wrong without, of which theta' is sure (90 %), and beyond which theta' is right and
theta wrong; both answers are other than 0, the commonest. So this shows what can be seen; how often
it is seen is measured by `explicit`. --ask="(3+5)*2-7" walks along yours, of 3 to 6 operands.
"""
import random

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure

from analyze import CHANCE, DIGITS, at_states, direct_logp, explicit_logp, prefix_logp
from data import arithmetic
from data.tasks import Task
from experiments.figure import COLOURS, INK
from lab.flags import fail
from lab.score import held_out, respond

CLAIM = "one question, token by token, in the context and in the weights"
SURE = 0.9
WAYS = {"context": ("correct", r"In the context: $\theta$", "reads the question and the states"),
        "weights": ("weights", r"In the weights: $\theta'$", "reads the question; states moved it")}
GREY, PALE = "#777777", "#d5d5d5"


def measure(c, runs):
    """-> what `walked` says of the question of --ask, or of the first that fits."""
    questions = [question_of(c.ask)] if c.ask else held_out("expr", 6, c.questions)
    model, inner, _ = runs.meta()
    for k, q in enumerate(questions, 1):
        numbers = walked(model, inner, q)
        if c.ask or fits(numbers):
            which = "your question" if c.ask else f"test question {k}, the first that fits"
            return numbers | {"which": which}
    fail(f"none of {len(questions)} questions fits the rule: choose one yourself, with --ask")

def question_of(ask: str):
    """Reads --ask -> a Question of `expr`, since meta-training shows no flat ones."""
    try:
        q = arithmetic.parse(ask)
    except ValueError as e:
        fail(f"--ask={ask}: {e}")
    if not 3 <= q.operands <= 6:
        fail(f"--ask={ask}: 3 to 6 operands are expected, these are {q.operands}")
    return arithmetic.question("expr", arithmetic.show(arithmetic.tree(q.text)))

def walked(model, inner, q):
    """Walks along one question -> what is drawn and shown. logp: {way: of the ten digits after 0,
    1, ... states (n + 1, 10)}."""
    rng, think = random.Random(q.text), respond(model, [q])[0][0]
    own = bool(think) and all(arithmetic.check(q, think))
    think = think if own else arithmetic.trajectory(q, rng)
    further, states = arithmetic.beyond(q, rng), think.split(";")
    while further.answer == q.answer:               # as after +0: nothing would be seen
        further = arithmetic.beyond(q, rng)
    tasks = [Task(q, states[:i], [q]) for i in range(1, len(states) + 1)]
    tasks.append(Task(q, states, [further]))
    theta, moved = direct_logp(model, [q, further]), explicit_logp(model, inner, tasks)
    context = at_states(prefix_logp(model, [q], [think])[0], think)
    return {"question": q.text, "answer": int(q.answer), "think": think, "own": own,
            "logp": {"context": context.tolist(),
                     "weights": torch.cat((theta[:1], moved[:-1])).tolist()},
            "beyond": {"question": further.text, "answer": int(further.answer),
                       "theta": int(theta[1].argmax()), "theta_prime": int(moved[-1].argmax())}}

def fits(numbers):
    answer, beyond, weights = numbers["answer"], numbers["beyond"], numbers["logp"]["weights"]
    return (numbers["own"] and np.argmax(weights[0]) != answer != 0
            and np.exp(weights[-1][answer]) > SURE
            and beyond["theta"] != beyond["answer"] == beyond["theta_prime"] != 0)

def judge(numbers):
    return {"walk": "shown"}, numbers


def draw(numbers):
    """The last frame, which tells it all."""
    fig = Figure(figsize=(11, 6))
    frame(fig, numbers, len(numbers["think"]), "answered")
    return fig

def frames_of(think):
    """-> [(tokens shown, what of the question beyond)]; a frame that stays is there often."""
    frames = []
    for shown in range(len(think) + 1):
        pause = 4 if think[shown - 1:shown] in ("", ";") or shown == len(think) else 1
        frames += [(shown, "")] * pause
    return frames + [(len(think), "asked")] * 8 + [(len(think), "answered")] * 30

def film(numbers, path):
    fig, writer = draw(numbers), PillowWriter(fps=5)
    with writer.saving(fig, path, dpi=90):
        for shown, beyond in frames_of(numbers["think"]):
            frame(fig, numbers, shown, beyond)
            writer.grab_frame()

def frame(fig, numbers, shown, beyond):
    """Draws one frame, after so many tokens; beyond: '', 'asked' or 'answered'."""
    fig.clear()
    fig.set_layout_engine("none")                   # places are fixed, or frames would jump
    answer, think, logp = (numbers[key] for key in ("answer", "think", "logp"))
    done = think[:shown].count(";") + (shown == len(think))             # whole states

    def write(x, y, words, size=14, colour=INK, **options):
        fig.text(x, y, words, size=size, color=colour, va="baseline", **options)
    write(0.03, 0.91, f"{numbers['question']} = ?", 25, family="monospace")
    write(0.97, 0.91, f"The answer is {answer} (last digits only)", ha="right")
    write(0.03, 0.82, "The trajectory says what is left")
    for i, state in enumerate(think[:shown].split(";")):
        write(0.03, 0.745 - 0.075 * i, state, 18, INK if i < done else GREY, family="monospace")

    ax = fig.add_axes((0.37, 0.35, 0.27, 0.4))
    write(0.37, 0.82, "Loss of the right answer")
    write(0.37, 0.78, f"dotted: guessing, ln 10 = {CHANCE:.1f}", 11, GREY)
    ax.axhline(CHANCE, color="#999999", lw=1.2, ls=":")
    for k, (way, (colour, name, reads)) in enumerate(WAYS.items()):
        loss, shares = -np.array(logp[way])[:, answer], np.exp(logp[way])
        ax.plot(loss[:done + 1], "o-", color=COLOURS[colour], lw=2.5, ms=7, clip_on=False)
        write(0.7, 0.82 - 0.3 * k, name, colour=COLOURS[colour])
        write(0.7, 0.78 - 0.3 * k, reads, 11, GREY)
        bars = fig.add_axes((0.7, 0.61 - 0.3 * k, 0.27, 0.15))
        bars.bar(range(DIGITS), shares[done], color=[COLOURS[colour] if digit == answer else PALE
                                                     for digit in range(DIGITS)])
        bars.stairs(shares[0], np.arange(DIGITS + 1) - 0.5, color=GREY, lw=1)
        bars.set(ylim=(0, 1), yticks=(), xticks=range(DIGITS))
        bars.tick_params(labelsize=12, length=0)
    write(0.97, 0.245, "line: before the first state", 11, GREY, ha="right")
    top = -np.array([*logp.values()])[:, :, answer].min()
    n = think.count(";") + 1
    ax.set(xlim=(0, n), ylim=(0, max(2.7, top + 0.1)), xticks=range(n + 1))
    ax.set_xlabel("states written", size=13)
    ax.tick_params(labelsize=12)
    if not beyond:
        return
    further = numbers["beyond"]
    write(0.03, 0.165, "Then a question that goes on, asked without the states")
    write(0.03, 0.07, f"{further['question']} = ?", 20, family="monospace")
    if beyond == "answered":
        for x, key, name, colour in ((0.6, "theta", r"$\theta$", "theta"),
                                     (0.79, "theta_prime", r"$\theta'$", "weights")):
            mark = "\u2713" if further[key] == further["answer"] else "\u2717"
            write(x, 0.07, f"{name} says {further[key]} {mark}", 20, COLOURS[colour])

def show(numbers):
    answer, further = numbers["answer"], numbers["beyond"]
    left = [numbers["question"], *numbers["think"].split(";")]
    width = max(map(len, left))
    own = "" if numbers["own"] else "; theta's own trajectory had a mistake, this one has none"
    lines = [numbers["which"] + own, f"{'what is left':{width}}   L_hat  L_q(theta')  theta' says"]
    for state, context, weights in zip(left, *numbers["logp"].values()):
        lines.append(f"{state:{width}}   {-context[answer]:5.2f}  {-weights[answer]:11.2f}  "
                     f"{np.argmax(weights)}")
    return [*lines, f"right is {answer}; guessing has a loss of ln 10 = {CHANCE:.2f}",
            f"beyond: {further['question']} is {further['answer']}; without the states theta says "
            f"{further['theta']}, theta' {further['theta_prime']}"]
