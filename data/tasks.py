"""A question as a task of meta-learning: its trajectories are the support set, its answer the query
set.

`tasks_at` draws the tasks of a meta-step, `tensors` writes them as the rows that meta.py learns
from.
"""
import random
from typing import NamedTuple

import torch

from data import arithmetic, text


# Of the trajectories that are cut, the share that ends at any token.
ANYWHERE = 0.15


class Task(NamedTuple):
    """A question, support trajectories as text, whether they run to their end, and the question
    that they solve (None: the same)."""
    question: arithmetic.Question
    thinks: list
    whole: bool = True
    solved: arithmetic.Question = None

    @property
    def behind(self):
        """The question that stands before the trajectories."""
        return self.solved or self.question


def without_results(think, n):
    """A trajectory's text up to the '=' of its n-th last result: `3+5=8;8*2=16` with n=1 ->
    `3+5=8;8*2=`. n=0: all of it."""
    steps = think.split(";")
    if not 0 <= n <= len(steps):
        raise ValueError(f"a trajectory of {len(steps)} steps has no {n} results to cut")
    if n == 0:
        return think
    return ";".join([*steps[:-n], steps[-n].split("=")[0] + "="])

def tasks_at(step, c):
    """The tasks of a meta-step: a pure function of (seed, step)."""
    rng = random.Random(f"meta/{c.seed}/{step}")
    return [task_at(rng, c) for _ in range(c.batch)]

def task_at(rng, c):
    """A task that copying seldom solves: what is asked is an operation beyond what the trajectories
    solve, or their own last result, which they miss. (A few are whole, or cut off anywhere.)"""
    further = rng.random() < c.further
    q, solved, thinks = question_at(rng, c, further)
    whole = further or rng.random() >= c.cut
    if not whole:
        anywhere = rng.random() < ANYWHERE
        for i, t in enumerate(thinks):
            thinks[i] = t[:rng.randrange(1, len(t))] if anywhere else without_results(t, 1)
    return Task(q, thinks, whole, solved)

def question_at(rng, c, further):
    """-> (a question, the one that its trajectories solve: itself, or itself less an operation,
    c.support of them). ValueError if one question after the other has not so many."""
    for _ in range(max(2, 400 // c.support)):
        q = arithmetic.draw(rng, c.domain, rng.choice(c.counts))
        solved = arithmetic.part(q) if further else q
        try:
            distinct = arithmetic.distinct(solved, rng, c.support) if solved else []
        except ValueError:                          # such as (6-(3-3))*8, which has one
            distinct = []
        if distinct:
            return q, solved, [";".join(steps) for steps in distinct]
    raise ValueError(f"questions of {c.operands} operands have fewer than --support={c.support} "
                     "distinct trajectories" + " less an operation" * further)


# --------------------------------------------------------------------------------------- tensors

class Support(NamedTuple):
    """Rows `<bos> q <think> t </think> a <eos>` of N trajectories each of G questions, all
    (G * N, S) of int64."""
    ids: torch.Tensor
    inner: torch.Tensor             # targets of the inner loss: t </think>, never the answer
    joint: torch.Tensor             # ... of the in-context loss: t a <eos>, </think> if t is whole
    step: torch.Tensor              # which arithmetic step a token of t </think> belongs to
    section: torch.Tensor           # what a token belongs to: 0 question, 1 t, 2 what is behind it

class Query(NamedTuple):
    """`<bos> q <think></think> a <eos>` of G questions, (G, T)."""
    ids: torch.Tensor
    targets: torch.Tensor           # a <eos>


def tensors(tasks, device="cpu"):
    """Tasks -> (Support, Query); targets are IGNORE where there is nothing to learn. ValueError for
    an empty trajectory."""
    rows, inner, joint, step, section = [], [], [], [], []
    for task in tasks:
        head, answer = text.prompt(task.behind.text), text.answer(task.behind.answer)
        for think in task.thinks:
            if not think:
                raise ValueError(f"{task.question.text}: an empty trajectory is no support set")
            t = text.encode(think)
            end = text.END_THINK if task.whole else text.IGNORE
            steps = [think[:i].count(";") for i in range(len(t) + 1)]
            nothing, later = [text.IGNORE] * len(head), [text.IGNORE] * len(answer)
            rows.append([*head, *t, text.END_THINK, *answer])
            inner.append([*nothing, *t, text.END_THINK, *later])
            joint.append([*nothing, *t, end, *answer])
            step.append([0] * len(head) + steps + [0] * len(answer))
            section.append([0] * len(head) + [1] * len(t) + [2] * (1 + len(answer)))
    support = Support(
        text.padded(rows, text.PAD, device)[:, :-1],
        text.padded(inner, text.IGNORE, device)[:, 1:],
        text.padded(joint, text.IGNORE, device)[:, 1:],
        text.padded(step, 0, device)[:, 1:],
        text.padded(section, 2, device)[:, :-1])
    prompts = [text.prompt(task.question.text, "") for task in tasks]
    answers = [text.answer(task.question.answer) for task in tasks]
    return support, Query(*text.shifted(prompts, answers, device))


class Sizes(NamedTuple):
    """What sums over tasks are divided by to be means over a whole batch."""
    questions: int
    answer_tokens: int
    joint_targets: int

def sizes_of(tasks):
    answers = sum(len(t.question.answer) + 1 for t in tasks)
    joint = sum(len(think) + t.whole + len(t.behind.answer) + 1
                for t in tasks for think in t.thinks)
    return Sizes(len(tasks), answers, joint)
