"""Text -> ids -> tensors. One token a character, so that how an answer is tokenised never depends
on what stands before it.

A sequence is `<bos> q <think> t </think> a <eos>`; without thinking, `<bos> q <think></think> a
<eos>`. Here are the vocabulary, the padding of the whole project (`padded`, `shifted`), and the
training batches: a `Mix` draws Examples, `batch` packs them into rows.
"""
import heapq
import random
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from data import arithmetic

CHARS = "0123456789+-*()%=;W."
SPECIAL = ("<pad>", "<bos>", "<think>", "</think>", "<eos>")
VOCAB = len(CHARS) + len(SPECIAL)
ENCODING = tiktoken.Encoding(
    name="raml-arithmetic-1", pat_str="(?s:.)",
    mergeable_ranks={c.encode(): i for i, c in enumerate(CHARS)},
    special_tokens={s: len(CHARS) + i for i, s in enumerate(SPECIAL)})
PAD, BOS, THINK, END_THINK, EOS = (ENCODING.encode_single_token(s) for s in SPECIAL)

# The target id that a loss skips.
IGNORE = -100


def encode(text):
    """Text without special tokens -> list of ids. ValueError names a character that the encoding
    lacks."""
    for c in text:                                  # tiktoken itself panics on one
        if c not in CHARS:
            raise ValueError(f"the encoding has no character {c!r}")
    return ENCODING.encode_ordinary(text)

def plain(text):
    """Can it be encoded: no special token spelt out in it?"""
    return set(text) <= set(CHARS)

def decode(ids):
    return ENCODING.decode([int(i) for i in ids])

def prompt(question, think=None):
    """Ids of `<bos> q <think>`, and of `t </think>` behind it where `think` is a text (`''`: answer
    directly)."""
    ids = [BOS, *encode(question), THINK]
    return ids if think is None else ids + [*encode(think), END_THINK]

def answer(text):
    """Ids of `a <eos>`."""
    return [*encode(text), EOS]


# --------------------------------------------------------------------------------------- tensors

def padded(rows, fill=PAD, device="cpu", left=False):
    """Lists of any lengths -> (N, longest) int64, filled up on the right, or left."""
    T = max(map(len, rows))
    gaps = [[fill] * (T - len(row)) for row in rows]
    filled = [gap + row if left else row + gap for row, gap in zip(rows, gaps)]
    return torch.tensor(filled, dtype=torch.int64, device=device)

def shifted(contexts, continuations, device="cpu"):
    """What to predict behind what: lists of ids, N of each -> ids (N, T), targets (N, T).

    A target is the next token where that belongs to the continuation, else IGNORE."""
    rows = [c + a for c, a in zip(contexts, continuations)]
    targets = [[IGNORE] * len(c) + a for c, a in zip(contexts, continuations)]
    return padded(rows, PAD, device)[:, :-1], padded(targets, IGNORE, device)[:, 1:]


# ------------------------------------------------------------------------------ training samples

class Example(NamedTuple):
    """A training sequence. learn: what of it are targets.

    'all': trajectory, </think>, answer; 'cut': all of them but </think>; 'answer': the answer."""
    question: str
    think: str
    answer: str
    learn: str = "all"


class Mix(NamedTuple):
    """What training samples are made of. `operands` are weights in the order of TRAINED."""
    domains: dict = {"expr": 0.45, "sum": 0.37, "modsum": 0.18}
    operands: dict = {"expr": (1, 3, 6), "sum": (1, 3, 5, 2), "modsum": (2, 3, 5)}
    style: str = "long"             # several, separated by commas, are drawn evenly
    harder: int = 2                 # questions drawn for a sample, which takes the hardest
    direct: float = 0.05            # share that answers without a trajectory
    cut: float = 0.05               # share whose trajectory stops anywhere, then the answer
    filler: float = 0.02            # share that thinks in dots
    pool: tuple = ()                # from `limited`; empty: every question is drawn anew

    def think(self, q, rng):
        style = rng.choice(self.style.split(",")) if "," in self.style else self.style
        return arithmetic.trajectory(q, rng, style)

    def question(self, rng):
        """The one of a few that has the largest numbers to calculate with: they are rare, and take
        longest to learn."""
        domain = rng.choices(list(self.domains), list(self.domains.values()))[0]
        counts = rng.choices(arithmetic.TRAINED[domain], self.operands[domain], k=self.harder)
        drawn = [arithmetic.draw(rng, domain, k) for k in counts]
        return max(drawn, key=arithmetic.digits)

    def limited(self, size, support, seed):
        """This mix with a pool of `size` questions and up to `support` distinct trajectories of
        each (the paper's support set, Fig. 8).

        A sample draws a question, then one of its trajectories, so that only their diversity
        depends on `support`."""
        rng, pool = random.Random(f"pool/{seed}"), []
        for i in range(size):
            q = self.question(rng)
            private, thinks = random.Random(f"pool/{seed}/{i}"), {}
            for _ in range(20 * support):
                thinks[self.think(q, private)] = None
                if len(thinks) == support:
                    break
            pool.append((q, list(thinks)))
        return self._replace(pool=tuple(pool))

    def sample(self, rng):
        """-> a random training Example."""
        q, thinks = rng.choice(self.pool) if self.pool else (self.question(rng), None)
        u = rng.random()
        if u < self.direct:
            return Example(q.text, "", q.answer, "answer")
        if u < self.direct + self.filler:
            dots = "." * rng.randint(1, 8 * (q.operands - 1))
            return Example(q.text, dots, q.answer, "answer")
        think = rng.choice(thinks) if thinks else self.think(q, rng)
        if u < self.direct + self.filler + self.cut:
            return Example(q.text, think[:rng.randrange(len(think))], q.answer, "cut")
        return Example(q.text, think, q.answer)


# --------------------------------------------------------------------------------------- batches

class Batch(NamedTuple):
    """R rows of T tokens, several samples behind each other in a row, all (R, T) of int64."""
    ids: torch.Tensor
    targets: torch.Tensor           # ids shifted by one, IGNORE where nothing is to be learned
    pos: torch.Tensor               # position in a token's own sample
    sample: torch.Tensor            # which sample of its row a token belongs to, 0: padding

    def mask(self):
        """(R, 1, T, T) bool: a token sees its own sample up to itself."""
        at = torch.arange(self.ids.size(1), device=self.ids.device)
        same_sample = self.sample[:, :, None] == self.sample[:, None]
        return (same_sample & (at[:, None] >= at))[:, None]

def encoded(example):
    """An Example -> ids, the next token's id or IGNORE for each of them."""
    head, think = prompt(example.question), encode(example.think)
    ids = [*head, *think, END_THINK, *answer(example.answer)]
    first = len(head) + len(think)                  # where </think> stands
    targets = list(ids)
    if example.learn == "answer":
        targets[:first + 1] = [IGNORE] * (first + 1)
    else:
        targets[:len(head)] = [IGNORE] * len(head)
    if example.learn == "cut":                      # where to stop was chance: not a habit to learn
        targets[first] = IGNORE
    return ids[:-1], targets[1:]

def packed(lengths, room):
    """Where pieces of these lengths go, each into the emptiest row of `room` tokens -> [(row, first
    token, number in its row from 1)], and how many rows there are."""
    places, rows = [], []                           # rows: a heap of (tokens used, row, pieces)
    for n in lengths:
        used, row, pieces = 0, len(rows), 0
        if rows and rows[0][0] + n <= room:
            used, row, pieces = heapq.heappop(rows)
        places.append((row, used, pieces + 1))
        heapq.heappush(rows, (used + n, row, pieces + 1))
    return places, len(rows)

def batch(examples, device="cpu", room=80):
    """Examples -> Batch, longest first, packed into rows of `room` tokens, or of the longest
    sample: padding is work without use."""
    samples = sorted(map(encoded, examples), key=lambda s: -len(s[0]))
    T = max(room, len(samples[0][0]))
    places, R = packed([len(ids) for ids, _ in samples], T)
    x, y, pos, sample = (np.full((R, T), fill) for fill in (PAD, IGNORE, 0, 0))
    for (ids, targets), (row, a, n) in zip(samples, places):
        b = a + len(ids)
        x[row, a:b] = ids
        y[row, a:b] = targets
        pos[row, a:b] = range(b - a)
        sample[row, a:b] = n
    return Batch(*(torch.from_numpy(a).to(device) for a in (x, y, pos, sample)))

def batch_at(step, size, mix, seed, device="cpu"):
    """The training batch of a step: a pure function of (seed, step), so that a resumed run needs no
    generator state."""
    rng = random.Random(f"{seed}/{step}")
    return batch([mix.sample(rng) for _ in range(size)], device)

class Batches(torch.utils.data.Dataset):
    """`batch_at` of every step, for a DataLoader."""
    def __init__(self, *args):
        self.args = args

    def __getitem__(self, step):
        return batch_at(step, *self.args)
