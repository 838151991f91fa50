"""Text -> ids -> tensors. One token a character, so that how an answer is tokenised never depends
on what stands before it.

A sequence is `<bos> q <think> t </think> a <eos>`; without thinking, `<bos> q <think></think> a
<eos>`. A training row asks for the answer after every state: at the question's end and at the end
of every state stands one more `</think>`, an *aside*. Its target is the answer. It sees everything
before it but other asides, and nobody sees it: for the rest of the row it is not there.

Here are the vocabulary, the rows, the padding of the whole project, and a `Mix` that draws training
samples.
"""
import random
from typing import NamedTuple

import tiktoken
import torch

from data import arithmetic

CHARS = "0123456789+-*();W.="
SPECIAL = ("<pad>", "<bos>", "<think>", "</think>", "<eos>")
VOCAB = len(CHARS) + len(SPECIAL)
ENCODING = tiktoken.Encoding(
    name="raml-digit-1", pat_str="(?s:.)",
    mergeable_ranks={c.encode(): i for i, c in enumerate(CHARS)},
    special_tokens={s: len(CHARS) + i for i, s in enumerate(SPECIAL)})
PAD, BOS, THINK, END_THINK, EOS = (ENCODING.encode_single_token(s) for s in SPECIAL)

# The target id that a loss skips.
IGNORE = -100

# What stands between states.
SEPARATOR = CHARS.index(";")


def encode(text: str) -> list:
    """Encodes text without special tokens. ValueError names a character that the encoding
    lacks."""
    for c in text:                                  # tiktoken itself panics on one
        if c not in CHARS:
            raise ValueError(f"the encoding has no character {c!r}")
    return ENCODING.encode_ordinary(text)

def plain(text: str) -> bool:
    """Tells whether text can be encoded: no special token is spelt out in it."""
    return set(text) <= set(CHARS)

def decode(ids) -> str:
    """Writes ids as text, special tokens spelt out."""
    return ENCODING.decode([int(i) for i in ids])

def prompt(question: str, think: str = None) -> list:
    """Gives the ids of `<bos> q <think>`, and of `t </think>` after it where `think` is a text
    (`''`: answer directly)."""
    ids = [BOS, *encode(question), THINK]
    return ids if think is None else ids + [*encode(think), END_THINK]


# ------------------------------------------------------------------------------------------- rows

class Row(NamedTuple):
    """One sequence, as lists with an entry per token."""
    ids: list
    before: list                    # the token that stands before it, asides not counted
    targets: list                   # the next token, at an aside the answer; IGNORE: none
    inner: list                     # t </think>: what the inner loop of meta.py learns from
    step: list                      # which state the inner target belongs to
    aside: list                     # is this token an aside?


def row(question: str, steps: list, answer: str, asides: bool = True, whole: bool = True,
        brackets: bool = False) -> Row:
    """Writes a question, the steps of its trajectory (none: it is answered directly) and its answer
    as a training row.

    asides=False asks at the end only. whole=False: the trajectory was cut, so that where it ends is
    not to be learned. brackets=True asks, after every bracket of the question, for its value."""
    head, t, digit = prompt(question), encode(";".join(steps)), encode(answer)[0]
    trunk = [*head, *t, END_THINK, digit, EOS]
    think, last = len(head) - 1, len(head) + len(t) - 1     # where <think> and t's last token stand
    asked = {}                                              # {position: the digit asked there}
    if asides and steps:
        ends = [i for i in range(think, last) if trunk[i + 1] == SEPARATOR]
        asked = dict.fromkeys([think, *ends], digit)
    if brackets:                                            # <bos> shifts the question by one
        asked |= {i + 1: encode(value)[0] for i, value in arithmetic.brackets(question).items()}

    row, state = Row([], [], [], [], [], []), 0
    for i, token in enumerate(trunk[:-1]):
        following = trunk[i + 1]
        inside = think <= i <= last                         # what follows is t, or closes it
        target = following if i >= think else IGNORE
        if i == last and not (steps and whole):
            target = IGNORE
        state += token == SEPARATOR
        inner = following if inside else IGNORE
        entries = [(token, trunk[i - 1] if i else PAD, target, inner, state, False)]
        if i in asked:
            entries.append((END_THINK, token, asked[i], IGNORE, state, True))
        for entry in entries:
            for column, value in zip(row, entry):
                column.append(value)
    return row


class Batch(NamedTuple):
    """Rows one below the other, padded on the right, tensors all (R, T)."""
    ids: torch.Tensor
    before: torch.Tensor
    targets: torch.Tensor
    inner: torch.Tensor
    step: torch.Tensor
    aside: torch.Tensor             # bool
    asides: bool                    # is there any?

    def inputs(self) -> dict:
        """What a model wants to know: `model(**batch.inputs())`. Rows without asides are causal and
        need no mask: the padding stands behind what counts. A GPU is faster without one."""
        mask = aside_mask(self.aside) if self.asides else None
        return {"ids": self.ids, "before": self.before, "mask": mask}

    def to(self, device):
        return Batch(*(x.to(device, non_blocking=True) for x in self[:-1]), self.asides)

def aside_mask(aside: torch.Tensor) -> torch.Tensor:
    """Tells who sees whom in rows (R, T), aside bool -> (R, 1, T, T) bool: a token sees what stands
    before it but asides, and itself."""
    T = aside.size(1)
    before = torch.ones(T, T, dtype=torch.bool, device=aside.device).tril(-1)
    itself = torch.eye(T, dtype=torch.bool, device=aside.device)
    return (before & ~aside[:, None] | itself)[:, None]

def batch(rows: list, device="cpu") -> Batch:
    """Pads Rows, to a multiple of 8 tokens: in bfloat16 a CPU prepares, and keeps, code of 0.7 MB
    for every shape that it multiplies."""
    fills, T = Row(PAD, PAD, IGNORE, IGNORE, 0, 0), max(len(row.ids) for row in rows)
    columns = [padded([row[k] for row in rows], fill, device, T=-(-T // 8) * 8)
               for k, fill in enumerate(fills)]
    return Batch(*columns[:-1], columns[-1].bool(), any(any(row.aside) for row in rows))

def padded(rows: list, fill: int = PAD, device="cpu", left: bool = False, T=0) -> torch.Tensor:
    """Fills lists of any lengths up on the right, or left -> (N, T or longest) int64."""
    T = T or max(map(len, rows))
    gaps = [[fill] * (T - len(row)) for row in rows]
    filled = [gap + row if left else row + gap for row, gap in zip(rows, gaps)]
    return torch.tensor(filled, dtype=torch.int64).to(device, non_blocking=True)

def shifted(contexts: list, continuations: list, device="cpu"):
    """Says what to predict after what: lists of ids, N of each -> ids (N, T), targets (N, T). A
    target is the next token where that belongs to the continuation, else IGNORE."""
    rows = [c + a for c, a in zip(contexts, continuations)]
    targets = [[IGNORE] * len(c) + a for c, a in zip(contexts, continuations)]
    return padded(rows, PAD, device)[:, :-1], padded(targets, IGNORE, device)[:, 1:]


# ------------------------------------------------------------------------------ training samples

class Mix(NamedTuple):
    """What training samples are made of."""
    domains: tuple = ("expr", "expr", "expr", "sum")
    operands: tuple = ()            # counts, drawn evenly; empty: those of WEIGHTS
    styles: tuple = ("states",)     # drawn evenly, too
    ops: str = "+-*"                # operations of `expr`
    direct: int = 0                 # a quarter of the samples: direct questions of so many operands
    pool: tuple = ()                # from `limited`; empty: every question is drawn anew

    def lesson(self, rng: random.Random):
        """Draws a question with a trajectory -> (Question, steps)."""
        if self.direct and rng.random() < 0.25:
            return arithmetic.lesson(rng, "expr", self.direct, "direct", self.ops)
        if self.pool:
            q, trajectories = rng.choice(self.pool)
            return q, rng.choice(trajectories)
        domain = rng.choice(self.domains)
        weights = WEIGHTS[domain]
        counts = self.operands or tuple(weights)
        n, = rng.choices(counts, None if self.operands else list(weights.values()))
        return arithmetic.lesson(rng, domain, n, rng.choice(self.styles), self.ops)

    def limited(self, size: int, support: int, seed: int):
        """Gives this mix a pool of `size` questions with up to `support` distinct trajectories of
        each (the paper's support set, Fig. 8).

        A sample draws a question, then one of its trajectories, so that only their diversity
        depends on `support`."""
        pool, rng = [], random.Random(f"pool/{seed}")
        while len(pool) < size:
            q, steps = self.lesson(rng)
            private, found = random.Random(f"pool/{seed}/{len(pool)}"), {tuple(steps): None}
            for _ in range(40 * support):
                if len(found) == support:
                    break
                steps = arithmetic.steps(q, private, self.styles[0])[0]
                if not arithmetic.leaks(*steps):
                    found[tuple(steps)] = None
            pool.append((q, list(found)))
        return self._replace(pool=tuple(pool))


# How often a sample has so many operands.
WEIGHTS = {"expr": {2: 1, 3: 1, 4: 2, 5: 3, 6: 4}, "sum": {2: 1, 3: 1, 4: 2, 5: 4, 6: 8}}

def batch_at(step: int, size: int, mix: Mix, seed: int, asides: bool = True) -> list:
    """Draws the training rows of a step, a pure function of (seed, step), so that a resumed run
    needs no generator state -> list of Rows, the longest first."""
    rng = random.Random(f"{seed}/{step}")
    lessons = [mix.lesson(rng) for _ in range(size)]
    rows = [row(q.text, steps, q.answer, asides) for q, steps in lessons]
    return sorted(rows, key=lambda r: -len(r.ids))
