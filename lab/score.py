"""Held-out questions, a model's answers to them, and what they are worth: exact match, Pass@k
(Eq. 22), mG-Pass@k (Eq. 23)."""
import math
import random

import torch

from data import arithmetic, text

# Every cell of the evaluation: {domain: operand counts}.
CELLS = {d: (*arithmetic.TRAINED.get(d, ()), *arithmetic.OOD[d]) for d in arithmetic.OOD}


def held_out(domain, operands, n, part=None, seed=0):
    """n questions of a cell, distinct where it has so many: the same for every model. part: 'val',
    'test' or 'ood'; default test, or ood where that applies."""
    trained = operands in arithmetic.TRAINED.get(domain, ())
    part = part or ("test" if trained else "ood")
    rng, questions = random.Random(f"{seed}/{domain}/{operands}/{part}"), {}
    for _ in range(20 * n):
        q = arithmetic.draw(rng, domain, operands, part)
        questions.setdefault(arithmetic.canonical(q), q)
        if len(questions) == n:
            break
    return list(questions.values())

def respond(model, questions, mode="trajectory", max_new=96, **sampling):
    """Model output for Questions -> list of (trajectory text, answer text). mode: 'trajectory'
    thinks first, 'direct' does not."""
    thinks = mode == "trajectory"
    prompts = [text.prompt(q.text, None if thinks else "") for q in questions]
    rows = model.generate(prompts, text.EOS, max_new if thinks else 6, pad=text.PAD, **sampling)
    out = []
    for row in rows:
        trajectory, answer = ([], row) if not thinks else (row, [])
        if thinks and text.END_THINK in row:
            end = row.index(text.END_THINK)
            trajectory, answer = row[:end], row[end + 1:]
        out.append((text.decode(trajectory), text.decode(answer)))
    return out

def right(model, questions, mode="trajectory"):
    """Greedy answers of a model -> a bool a question."""
    answers = respond(model, questions, mode)
    return [arithmetic.verify(q, a) for q, (_, a) in zip(questions, answers)]

def sampled(model, questions, n, mode="trajectory", seed=0, size=1024):
    """n outputs a question, sampled at temperature 1 -> [(how many are right, how many give a plain
    number as answer)]."""
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    asked = [q for q in questions for _ in range(n)]
    verdicts = []
    for i in range(0, len(asked), size):
        part = asked[i:i + size]
        outputs = respond(model, part, mode, temperature=1.0, generator=generator)
        verdicts += [(arithmetic.verify(q, a), arithmetic.number(a) is not None)
                     for q, (_, a) in zip(part, outputs)]
    groups = [verdicts[i:i + n] for i in range(0, len(verdicts), n)]
    return [tuple(map(sum, zip(*group))) for group in groups]


# --------------------------------------------------------------------------------------- metrics

def pass_at_k(n, c, k):
    """Pass@k (Eq. 22; 2107.03374): unbiased estimate, from c right among n samples, that one of k
    is right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def mg_pass_at_k(n, c, k):
    """mG-Pass@k (Eq. 23; 2412.13147): (2/k) sum over i > k/2 of the chance that at least i of k
    samples are right: right, and reliably so."""
    def at_least(i):
        ways = [math.comb(c, j) * math.comb(n - c, k - j) for j in range(i, min(c, k) + 1)]
        return sum(ways) / math.comb(n, k)
    return 2 / k * sum(at_least(i) for i in range(math.ceil(k / 2) + 1, k + 1))

def exact_match(model, cells, n, seed=0, size=400):
    """{domain: {operands: {mode: share right}}} over n held-out questions a cell, and a few
    mistakes as text."""
    questions = [q for d, ks in cells.items() for k in ks for q in held_out(d, k, n, seed=seed)]
    verdicts, mistakes = {}, []
    for mode in ("trajectory", "direct"):
        for i in range(0, len(questions), size):
            part = questions[i:i + size]
            for q, (t, a) in zip(part, respond(model, part, mode)):
                ok = arithmetic.verify(q, a)
                cell = verdicts.setdefault(q.domain, {}).setdefault(str(q.operands), {})
                cell.setdefault(mode, []).append(ok)
                if not ok and mode == "trajectory" and q.trained:
                    says = a or "(no answer)"
                    mistakes.append(f"{q.text} -> {t} -> {says}, but it is {q.answer}")
    return averaged(verdicts), mistakes

def averaged(node):
    """Nested dicts with every list at their ends replaced by its mean."""
    if isinstance(node, dict):
        return {key: averaged(child) for key, child in node.items()}
    return sum(node) / len(node)

def show_table(table):
    """Exact match as text, a line a cell."""
    lines = [f"{'domain':8} {'operands':>8} {'trajectory':>11} {'direct':>8}"]
    for d, ks in table.items():
        for k, m in ks.items():
            trained = int(k) in arithmetic.TRAINED.get(d, ())
            note = "" if trained else "   never trained on"
            if trained and int(k) == 2:             # held out as a question, not as a step
                note = "   seen as a step of other questions"
            lines.append(f"{d:8} {k:>8} {m['trajectory']:>11.1%} {m['direct']:>8.1%}{note}")
    return "\n".join(lines)
