"""Text -> ids -> batches. One token a character, so how an answer is tokenised never depends on what stands before it.

A sequence is `<bos> q <think> t </think> a <eos>`; without thinking `<bos> q <think></think> a <eos>`. An Example carries the same
thing as text plus which of its tokens are targets; `batch` turns many into padded tensors.
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
ENCODING = tiktoken.Encoding(name="raml-arithmetic-1", pat_str="(?s:.)", mergeable_ranks={c.encode(): i for i, c in enumerate(CHARS)},
                             special_tokens={s: len(CHARS) + i for i, s in enumerate(SPECIAL)})
PAD, BOS, THINK, END_THINK, EOS = (ENCODING.encode_single_token(s) for s in SPECIAL)
VOCAB = len(CHARS) + len(SPECIAL)
IGNORE = -100                                                               # target id that the loss skips


def encode(text):
    """Text without special tokens -> list of ids. ValueError names a character that the encoding lacks."""
    for c in text:                                                          # tiktoken itself panics on one
        if c not in CHARS:
            raise ValueError(f"the encoding has no character {c!r}")
    return ENCODING.encode_ordinary(text)

def plain(text):
    """Can it be encoded: no special token spelt out in it?"""
    return set(text) <= set(CHARS)

def decode(ids):
    return ENCODING.decode([int(i) for i in ids])

def prompt(question, think=None):
    """Ids of `<bos> q <think>`, and of `t </think>` behind it where `think` is a text (`''`: answer directly)."""
    ids = [BOS, *encode(question), THINK]
    return ids if think is None else ids + [*encode(think), END_THINK]


class Example(NamedTuple):
    """A training sequence. learn: 'all' (trajectory, </think>, answer are targets), 'cut' (all but </think>), 'answer' (the answer)."""
    question: str
    think: str
    answer: str
    learn: str = "all"


class Mix(NamedTuple):
    """What training samples are made of: shares of domains, of operand counts (weights in the order of TRAINED), of kinds."""
    domains: dict = {"expr": 0.45, "sum": 0.37, "modsum": 0.18}
    operands: dict = {"expr": (1, 3, 6), "sum": (1, 3, 5, 2), "modsum": (2, 3, 5)}
    style: str = "long"                                                     # several, separated by commas, are drawn evenly
    direct: float = 0.10                                                    # share that answers without a trajectory
    cut: float = 0.10                                                       # share whose trajectory stops anywhere, then the answer
    filler: float = 0.03                                                    # share that thinks in dots
    pool: tuple = ()                                                        # from `limited`; empty: every question is drawn anew

    def think(self, q, rng):
        style = rng.choice(self.style.split(",")) if "," in self.style else self.style
        return ";".join(arithmetic.steps(q, rng, style)[0])

    def question(self, rng):
        domain = rng.choices(list(self.domains), list(self.domains.values()))[0]
        return arithmetic.draw(rng, domain, rng.choices(arithmetic.TRAINED[domain], self.operands[domain])[0])

    def limited(self, size, support, seed):
        """This mix with a pool of `size` questions and up to `support` distinct trajectories of each (the paper's section on support
        sets): a sample draws a question, then one of its trajectories, so only their diversity depends on `support`."""
        rng, pool = random.Random(f"pool/{seed}"), []
        for i in range(size):
            q, own, found = self.question(rng), random.Random(f"pool/{seed}/{i}"), {}
            for _ in range(20 * support):
                found[self.think(q, own)] = None
                if len(found) == support:
                    break
            pool.append((q, list(found)))
        return self._replace(pool=tuple(pool))

    def sample(self, rng):
        """-> a random training Example."""
        q, thinks = rng.choice(self.pool) if self.pool else (self.question(rng), None)
        u = rng.random()
        if u < self.direct:
            return Example(q.text, "", q.answer, "answer")
        if u < self.direct + self.filler:
            return Example(q.text, "." * rng.randint(1, 8 * (q.operands - 1)), q.answer, "answer")
        think = rng.choice(thinks) if thinks else self.think(q, rng)
        if u < self.direct + self.filler + self.cut:
            return Example(q.text, think[:rng.randrange(len(think))], q.answer, "cut")
        return Example(q.text, think, q.answer)


class Batch(NamedTuple):
    """R rows of T tokens, several samples behind each other in a row, all (R, T) of int64."""
    ids: torch.Tensor
    targets: torch.Tensor           # ids shifted by one, IGNORE where nothing is to be learned
    pos: torch.Tensor               # position in a token's own sample
    sample: torch.Tensor            # which sample of its row a token belongs to, 0: padding

    def mask(self):
        """(R, 1, T, T) bool: a token sees its own sample up to itself."""
        at = torch.arange(self.ids.size(1), device=self.ids.device)
        return ((self.sample[:, :, None] == self.sample[:, None]) & (at[:, None] >= at))[:, None]

def batch(examples, device="cpu", room=64):
    """Examples -> Batch, packed into rows of `room` tokens, or of the longest sample: padding is work without use. (Against two chunks
    padded to their longest sample, packing makes a step take 0.8 of the time.)

    Longest first, each into the emptiest row."""
    rows, open_rows = [], []
    for e in examples:
        head, think, tail = prompt(e.question), encode(e.think), [END_THINK, *encode(e.answer), EOS]
        rows.append((head + think + tail, len(head), len(head) + len(think), e.learn))
    rows.sort(key=lambda r: -len(r[0]))
    T, where = max(room, len(rows[0][0]) - 1), []
    for ids, *_ in rows:
        used, r, n = heapq.heappop(open_rows) if open_rows and open_rows[0][0] + len(ids) - 1 <= T else (0, len(open_rows), 0)
        where.append((r, used, n + 1))
        heapq.heappush(open_rows, (used + len(ids) - 1, r, n + 1))
    x, y, pos, sample = (np.full((len(open_rows), T), v) for v in (PAD, IGNORE, 0, 0))
    for (ids, begin, end, learn), (r, a, n) in zip(rows, where):
        b, first = a + len(ids) - 1, end + 1 if learn == "answer" else begin
        x[r, a:b], pos[r, a:b], sample[r, a:b] = ids[:-1], range(b - a), n
        y[r, a + first - 1:b] = ids[first:]
        if learn == "cut":
            y[r, a + end - 1] = IGNORE                                      # where to stop was chance: not a habit to learn
    return Batch(*(torch.from_numpy(a).to(device) for a in (x, y, pos, sample)))

def batch_at(step, size, mix, seed, device="cpu"):
    """The training batch of a step: a pure function of (seed, step), so that a resumed run needs no generator state."""
    rng = random.Random(f"{seed}/{step}")
    return batch([mix.sample(rng) for _ in range(size)], device)

class Batches(torch.utils.data.Dataset):
    """`batch_at` of every step, for a DataLoader."""
    def __init__(self, *args):
        self.args = args

    def __getitem__(self, step):
        return batch_at(step, *self.args)
