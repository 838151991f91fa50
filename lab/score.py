"""Held-out questions, a model's answers to them, and what they are worth: exact match, Pass@k
(Eq. 22), mG-Pass@k (Eq. 23), and the lines that a share of right answers must be held against."""
import math
import random
from collections import Counter

import torch

from data import arithmetic, text


def held_out(domain: str, operands: int, n: int, part: str = "test", seed: int = 0) -> list:
    """Draws n held-out Questions of a cell, distinct where it has so many: the same for every
    model. part: 'val' or 'test'."""
    rng, questions = random.Random(f"{seed}/{domain}/{operands}/{part}"), {}
    for _ in range(20 * n):
        q = arithmetic.draw(rng, domain, operands, part)
        questions.setdefault(arithmetic.canonical(q.text), q)
        if len(questions) == n:
            break
    return list(questions.values())

def respond(model, questions, mode="trajectory", size=400, **sampling) -> list:
    """Asks a model Questions -> list of (trajectory text, answer text). mode: 'trajectory' thinks
    first, 'direct' does not."""
    thinks, out = mode == "trajectory", []
    for i in range(0, len(questions), size):
        part = questions[i:i + size]
        prompts = [text.prompt(q.text, None if thinks else "") for q in part]
        room = max(arithmetic.room(q.operands) for q in part) if thinks else 1
        rows = model.generate(prompts, text.EOS, room, **sampling)
        for row in rows:
            t, mark, answer = text.decode(row).partition("</think>")
            out.append((t, answer) if thinks else ("", t))
    return out

def right(model, questions, mode="trajectory") -> list:
    """Tells which greedy answers of a model are right -> a bool per question."""
    answers = respond(model, questions, mode)
    return [arithmetic.verify(q, a) for q, (_, a) in zip(questions, answers)]

def sampled(model, questions, n, seed=0) -> list:
    """Counts the right ones among n outputs per question, sampled at temperature 1."""
    generator = torch.Generator(model.device).manual_seed(seed)
    asked = [q for q in questions for _ in range(n)]
    outputs = respond(model, asked, temperature=1.0, generator=generator)
    verdicts = [arithmetic.verify(q, a) for q, (_, a) in zip(asked, outputs)]
    return [sum(verdicts[i:i + n]) for i in range(0, len(verdicts), n)]


# --------------------------------------------------------------------------------------- metrics

def pass_at_k(n: int, c: int, k: int) -> float:
    """Pass@k (Eq. 22; 2107.03374): estimates without bias, from c right among n samples, the chance
    that one of k is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def mg_pass_at_k(n: int, c: int, k: int) -> float:
    """mG-Pass@k (Eq. 23; 2412.13147): (2/k) sum over i > k/2 of the chance that at least i of k
    samples are right: right, and reliably so."""
    def at_least(i):
        ways = [math.comb(c, j) * math.comb(n - c, k - j) for j in range(i, min(c, k) + 1)]
        return sum(ways) / math.comb(n, k)
    return 2 / k * sum(at_least(i) for i in range(math.ceil(k / 2) + 1, k + 1))

def commonest(questions: list) -> float:
    """Says what share is right for somebody who always gives the most frequent answer."""
    return max(Counter(q.answer for q in questions).values()) / len(questions)

def shallow(questions: list, n: int = 5_000, seed: int = 0) -> list:
    """Answers as a shallow reader of `expr` does, who sees the last operation and the digits beside
    it, not what stands in brackets, and guesses best -> a bool per question.

    What is best is counted on n other questions of the same sizes."""
    def seen(q):
        op, *sides = arithmetic.root(q)
        return op, *(side if len(side) == 1 else "?" for side in sides)
    rng, counts = random.Random(seed), {}
    for _ in range(n):
        q = arithmetic.draw(rng, "expr", rng.choice(questions).operands)
        counts.setdefault(seen(q), Counter())[q.answer] += 1
    best = {what: count.most_common(1)[0][0] for what, count in counts.items()}
    return [best.get(seen(q)) == q.answer for q in questions]

def exact_match(model, cells: dict, n: int, part: str = "test"):
    """Asks n held-out questions per cell -> ({domain: {operands: {mode: share right}}}, a few
    mistakes as text)."""
    questions = [q for d, ks in cells.items() for k in ks for q in held_out(d, k, n, part)]
    table, mistakes = {}, []
    for mode in ("trajectory", "direct"):
        cell = {}
        for q, (t, a) in zip(questions, respond(model, questions, mode)):
            ok = arithmetic.verify(q, a)
            cell.setdefault((q.domain, str(q.operands)), []).append(ok)
            if not ok and mode == "trajectory" and arithmetic.trained(q.domain, q.operands):
                says = a or "(no answer)"
                mistakes.append(f"{q.text} -> {t[:60]} -> {says}, but it is {q.answer}")
        for (domain, k), verdicts in cell.items():
            share = sum(verdicts) / len(verdicts)
            table.setdefault(domain, {}).setdefault(k, {})[mode] = share
    return table, mistakes

def show_table(table: dict, counts: tuple = ()) -> str:
    """Writes exact match as text, one line per cell. counts: see `trained`."""
    lines = [f"{'domain':8} {'operands':>8} {'trajectory':>11} {'direct':>8}"]
    for d, ks in table.items():
        for k, m in ks.items():
            note = "" if arithmetic.trained(d, int(k), counts) else "   never trained on"
            lines.append(f"{d:8} {k:>8} {m['trajectory']:>11.1%} {m['direct']:>8.1%}{note}")
    return "\n".join(lines)
