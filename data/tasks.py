"""The tasks of meta-training: what meta.py learns from.

A task is a question with its trajectory, which is the support set, and several questions, the query
set, that are asked of one theta' without any trajectory. A query set of one could not tell whether
theta' knows the question or only what to say.
"""
import random
from typing import NamedTuple


from data import arithmetic, text

# Shares of the tasks: relatives of the question, an operation beyond it; the rest, the question
# itself after any of its states, is left out by --itself=no.
RELATIVES, BEYOND = 0.6, 0.3


class Task(NamedTuple):
    """A trajectory and what is asked after it."""
    solved: arithmetic.Question     # the question that the trajectory belongs to
    steps: list                     # the trajectory, as far as it is shown
    queries: list                   # Questions
    whole: bool = True              # does the trajectory run to its end?


def tasks_at(step: int, c) -> list:
    """Draws the tasks of a meta-step: a pure function of (seed, step)."""
    rng = random.Random(f"meta/{c.seed}/{step}")
    return [task_at(rng, c) for _ in range(c.batch)]

def task_at(rng: random.Random, c) -> Task:
    """Draws one task with c.queries queries, the last of them unrelated to the trajectory.

    No held-out question stands in it, neither as a state nor as a query."""
    while True:
        q, steps = arithmetic.lesson(rng, "expr", rng.choice(c.counts), c.style)
        kind, whole, asked = rng.random(), False, [q]
        if c.itself == "no":
            kind, asked = kind * (RELATIVES + BEYOND), []
        if kind < RELATIVES:
            steps = steps[:-1]
            asked += arithmetic.relatives(q).values()
        elif kind < RELATIVES + BEYOND:
            asked, whole = [arithmetic.beyond(q, rng) for _ in range(c.queries)], True
        else:
            shown = rng.randint(1, len(steps))
            steps, whole = steps[:shown], shown == len(steps)
        asked = rng.sample(asked, min(len(asked), c.queries - 1))
        while len(asked) < c.queries:
            asked.append(arithmetic.draw(rng, "expr", rng.randint(2, max(6, *c.counts))))
        if steps and not arithmetic.leaks(*(q.text for q in asked)):
            return Task(q, steps, asked, whole)


def support(tasks: list, device="cpu") -> text.Batch:
    """Writes the support set: a training row per trajectory, asides and all (G, P)."""
    return text.batch([text.row(t.solved.text, t.steps, t.solved.answer, whole=t.whole)
                       for t in tasks], device)

def query(tasks: list, device="cpu", shown: bool = False) -> text.Batch:
    """Writes the query set: `<bos> q <think></think> a <eos>` of every query, the tasks' one after
    the other (G * Q, T). Asides ask for the value of every bracket as well.

    shown: the task's trajectory stands between `<think>` and `</think>`, and is not learned."""
    rows = [text.row(q.text, task.steps if shown else [], q.answer, asides=False, brackets=True)
            for task in tasks for q in task.queries]
    for row in rows if shown else []:
        row.trunk[:] = [token._replace(target=text.IGNORE) if token.inner >= 0 else token
                        for token in row.trunk]
    return text.batch(rows, device)
