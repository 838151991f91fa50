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
    """A question, its support trajectories as text, and whether they run to the end."""
    question: arithmetic.Question
    thinks: list
    whole: bool = True


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
    """The tasks of a meta-step: a pure function of (seed, step). A curriculum: whole trajectories
    at first, then more and more without their last results, or cut off anywhere."""
    rng = random.Random(f"meta/{c.seed}/{step}")
    ramp = (step / c.steps - c.cut_from) / max(1e-9, c.cut_full - c.cut_from)
    share = c.cut * min(1, max(0, ramp))
    missing, tasks = [float(w) for w in c.missing.split(",")], []
    for _ in range(c.batch):
        q, thinks = question_at(rng, c)
        whole = rng.random() >= share
        if not whole:
            n = rng.choices((1, 2, 3), missing)[0]
            anywhere = rng.random() < ANYWHERE
            for i, t in enumerate(thinks):
                cut = t[:rng.randrange(1, len(t))] if anywhere else None
                thinks[i] = cut or without_results(t, min(n, t.count("=")))
        tasks.append(Task(q, thinks, whole))
    return tasks


def question_at(rng, c):
    """A question and c.support distinct trajectories of it. ValueError if one question after the
    other has too few."""
    last = 400 // c.support
    for attempt in range(last + 1):
        q = arithmetic.draw(rng, c.domain, rng.choice(c.counts))
        try:
            return q, [";".join(steps) for steps in arithmetic.distinct(q, rng, c.support)]
        except ValueError:                          # such as (6-(3-3))*8, which has one
            if attempt == last:
                raise


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
        head, answer = text.prompt(task.question.text), text.answer(task.question.answer)
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
    answers = [len(t.question.answer) + 1 for t in tasks]
    joint = [len(think) + n + t.whole for t, n in zip(tasks, answers) for think in t.thinks]
    return Sizes(len(tasks), sum(answers), sum(joint))
