"""Text -> ids -> tensors. One token a character, so that how an answer is tokenised never depends
on what stands before it.

A sequence is `<bos> q <think> t </think> a <eos>`; without thinking, `<bos> q <think></think> a
<eos>`. A training row asks for the answer after every state: beside this *trunk* it has *asides*,
one for the question's end and one for the end of every state. An aside is one more `</think>`, its
target is the answer. It sees the trunk as far as its place, and nobody sees it.

Here are the vocabulary, the rows, the padding of the whole project, and a `Mix` that draws training
samples.
"""
import random
from typing import NamedTuple

import numpy as np
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

class Token(NamedTuple):
    """A place of a training row."""
    id: int = PAD
    before: int = PAD               # the token that stands before it, asides not counted
    target: int = IGNORE            # the next token, at an aside the answer; IGNORE: none
    inner: int = IGNORE             # t </think>: what the inner loop of meta.py learns from
    step: int = 0                   # which state the inner target belongs to
    place: int = 0                  # how many tokens of the trunk stand before it

class Row(NamedTuple):
    """One sequence, and its asides."""
    trunk: list                     # Tokens
    asides: list                    # Tokens


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

    row, state = Row([], []), 0
    for i, token in enumerate(trunk[:-1]):
        following = trunk[i + 1]
        inside = think <= i <= last                         # what follows is t, or closes it
        target = following if i >= think else IGNORE
        if i == last and not (steps and whole):
            target = IGNORE
        state += token == SEPARATOR
        inner = following if inside else IGNORE
        row.trunk.append(Token(token, trunk[i - 1] if i else PAD, target, inner, state, i))
        if i in asked:
            row.asides.append(Token(END_THINK, token, asked[i], IGNORE, state, i + 1))
    return row

def asked_after(trunk: list, places) -> Row:
    """Writes ids, with an aside after the first `place` of them for each of `places`, as a row that
    nothing is learned from."""
    tokens = [Token(token, before, place=i)
              for i, (token, before) in enumerate(zip(trunk, [PAD, *trunk]))]
    return Row(tokens, [Token(END_THINK, trunk[place - 1], place=place) for place in places])


class Batch(NamedTuple):
    """Rows one below the other, tensors all (R, T): on the left the trunks, padded on the right,
    then the asides, padded too."""
    ids: torch.Tensor
    before: torch.Tensor
    targets: torch.Tensor
    inner: torch.Tensor
    step: torch.Tensor
    place: torch.Tensor
    trunk: int                      # tokens of the longest trunk
    hidden: torch.Tensor = None     # bool: what nobody sees but itself

    def inputs(self) -> dict:
        """What a model wants to know: `model(**batch.inputs())`. A trunk is causal and needs no
        mask: its padding stands after what counts. A GPU's fastest attention takes none, so only
        asides, which see their trunk as far as their place, get one there."""
        T, masked = self.ids.size(1), self.ids.size(1) - self.trunk
        if self.hidden is not None or masked and not self.ids.is_cuda:
            masked = T                      # a CPU takes longer for two kinds of attention
        given = {"ids": self.ids, "before": self.before}
        if not masked:
            return given
        places = torch.arange(T, device=self.ids.device)
        seen = places < self.place[:, -masked:, None]               # (R, masked, T)
        if self.hidden is not None:
            seen = seen & ~self.hidden[:, None]
        itself = places == places[-masked:, None]
        return given | {"mask": (seen | itself)[:, None]}

    def to(self, device):
        return Batch(*(x.to(device, non_blocking=True) for x in self[:6]), self.trunk)

def batch(rows: list, device="cpu") -> Batch:
    """Pads Rows, to a multiple of 8 tokens: in bfloat16 a CPU prepares, and keeps, code of 0.7 MB
    for every shape that it multiplies."""
    trunk, asides = (max(map(len, part)) for part in zip(*rows))
    T = -(-(trunk + asides) // 8) * 8
    if not asides:
        trunk = T
    filled = []
    for row in rows:
        gaps = trunk - len(row.trunk), T - trunk - len(row.asides)
        tokens = row.trunk + [Token()] * gaps[0] + row.asides + [Token()] * gaps[1]
        filled.append(list(zip(*tokens)))                           # a column per field
    columns = torch.from_numpy(np.array(filled)).movedim(1, 0)      # (6, R, T)
    return Batch(*columns.contiguous().to(device, non_blocking=True), trunk)

def padded(rows: list, fill: int = PAD, device="cpu", left: bool = False) -> torch.Tensor:
    """Fills lists of any lengths up on the right, or left -> (N, longest) int64."""
    T = max(map(len, rows))
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
    return sorted(rows, key=lambda r: -len(r.trunk) - len(r.asides))
