"""The explicit inner loop: theta -> theta' along a trajectory, and outer meta-steps through it (the
paper's Eqs. 4 and 8).

The paper writes grad L_q in Eq. 4 and never gives L_q a formula. An inner loop cannot know the
answer, so this one descends the trajectory's own loss:

    inner loop (Eq. 4)   theta' = theta - alpha grad L_support(theta)
                         L_support: the trajectory's own NLL
    outer loop (Eq. 8)   min_theta  sum over questions of  L_q(theta')
                         L_q: the NLL of answers after `<think></think>`, and of the value of
                         every bracket of the question

One layer moves by default: the first matrix of the MLP in the block before the last. What it then
holds, the last block can calculate with.

A question with its trajectory is a task (data/tasks.py), the trajectory is its support set, and
several questions that are asked of the same theta' are its query set.

    python meta.py                          # from out/sft (trained first if missing) into out/meta
    python meta.py --algo=fomaml --out=out/fomaml
"""
import fnmatch
import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch.func import functional_call

import train
from data import arithmetic, tasks, text
from data.tasks import Task
from lab import score
from lab.flags import chosen, fail, flag, flags, from_file
from lab.run import (Run, ahead, command, device_of, lr_at, move, precision_of, prepare, provenance,
                     write)
from model import Linear


# What of a trajectory an inner loss may be restricted to.
PARTS = ("closing", "unclosed", "last", "earlier")


@dataclass
class Meta:
    """Meta-training: the trajectory goes into the weights, answers come out of them."""
    algo: Literal["maml", "fomaml", "none", "context"] = flag(
        "maml", "none: no inner loop; context: none, but queries show the trajectory")
    init: str = flag("out/sft/ckpt.pt", "where theta starts; the default is trained if missing")
    out: str = flag("out/meta", "the folder of the run")
    resume: bool = flag(False, "go on with the run in --out")
    overwrite: bool = flag(False, "replace the run in --out")
    seed: int = flag(0, "of data")
    steps: int = flag(2400, "meta-steps", 1)
    batch: int = flag(12, "trajectories per meta-step", 1)
    queries: int = flag(5, "questions asked of every theta'", 2, 100)
    operands: str = flag("3,4,5,6", "operand counts of the trajectories' questions")
    style: Literal["states", "steps"] = flag("states", "of the trajectories")
    itself: Literal["yes", "no"] = flag("yes", "is a trajectory's own question asked as well?")
    fast: str = flag("2.up", "layers that the inner loop moves: BLOCK.qkv, out, up, down")
    K: int = flag(1, "inner steps", 1, 100)
    alpha: float = flag(3.5, "inner rate at the start; learned per layer and step", 1e-9)
    tau: float = flag(10.0, "temperature of the inner loss", 1e-9)
    targets: Literal["own", "permuted", "constant", "random", *PARTS] = flag(
        "own", "what the inner loss asks for: the trajectory's own tokens, nonsense, or a part")
    update: Literal["gradient", "recursive", "write", "register"] = flag(
        "gradient", "recursive: state after state; write, register: learned matrices instead")
    lr: float = flag(0.03, "of Muon, for the hidden matrices")
    lr_adam: float = flag(0.005, "of AdamW, for the rest; inner rates: four times that")
    warmup: int = flag(20, "meta-steps of linear warm-up")
    questions: int = flag(100, "held-out questions per cell of the evaluation", 1, 1e5)
    save_every: int = flag(100, "meta-steps between checkpoints", 1)
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "cuda where there is one; a Mac: cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: bfloat16 in hardware")
    threads: int = flag(0, "CPU threads; 0: as many as torch chooses", 0, 1000)

    script = "meta.py"

    @property
    def counts(self):
        return train.numbers(self.operands)

    @property
    def moves(self):
        """Is there an inner loop?"""
        return self.algo not in ("none", "context")


DECAY = 0.6                         # last share of the meta-steps, the rate falling to 0
CLIP = 1.0                          # largest norm of a meta-gradient
LR_MATRICES = {"write": 3e-5, "register": 3e-3}     # of Adam, where there is no inner gradient


# -------------------------------------------------------------------------- the inner loop (Eq. 4)

class Inner(nn.Module):
    """What the inner loop learns for itself: a rate for every fast layer and step.

    tau is the temperature of its loss, the NLL of softmax(logits / tau). At 1 the gradient of a
    token that the model is sure of vanishes, and most tokens of a trajectory are such; a hot loss
    writes them down all the same."""

    def __init__(self, model, names: list, K=1, alpha=1.0, tau=1.0, targets="own",
                 update="gradient"):
        super().__init__()
        self.names, self.K, self.tau, self.targets = list(names), K, tau, targets
        self.update = update
        self.log_alpha = nn.Parameter(torch.full((len(self.names), K), math.log(alpha)))
        self.matrices = None
        if update in ("write", "register"):
            shapes = [model.get_parameter(linear_layers(model)[name]).shape for name in names]
            C = model.config.width
            self.matrices = nn.ParameterList(
                torch.zeros(i if update == "write" else C, o) for o, i in shapes)

    def rate(self, name: str, k: int) -> torch.Tensor:
        return self.log_alpha[self.names.index(name), min(k, self.K - 1)].exp()

    def passes(self, support: text.Batch) -> list:
        """The support set as one inner step after the other sees it: all of it, K times; or, as Eq.
        4 is written, one state at a time, which no earlier one is seen from."""
        if self.update != "recursive":
            return [support] * self.K
        parts = []
        for i in range(int(support.step.max()) + 1):
            earlier = (support.inner >= 0) & (support.step < i) & (support.ids != text.THINK)
            inner = support.inner.masked_fill(support.step != i, text.IGNORE)
            parts.append(support._replace(inner=inner, hidden=earlier))
        return parts

    def loss(self, model, h, support: text.Batch) -> torch.Tensor:
        """L_support, summed over tokens, so that every token is an update of its own (Eq. 4) and a
        longer trajectory moves theta further."""
        return model.score(h, self.asked(support), self.tau).sum()

    def asked(self, support: text.Batch) -> torch.Tensor:
        """The targets of the inner loss. Nonsense in place of the trajectory's own tokens shows
        whether it matters what the loss is a loss of."""
        own, there = support.inner, support.inner >= 0
        if self.targets in PARTS:
            return own.masked_fill(~part_of(support, self.targets), text.IGNORE)
        if self.targets == "permuted":
            shuffled = random.Random(0).sample(range(text.VOCAB), text.VOCAB)
            shuffled = torch.tensor(shuffled, device=own.device)
            return torch.where(there, shuffled[own.clamp(min=0)], own)
        if self.targets == "constant":
            return own.masked_fill(there, text.END_THINK)
        if self.targets == "random":                # the same digits for the same batch
            generator = torch.Generator().manual_seed(int(support.ids.sum()))
            digits = torch.randint(10, own.shape, generator=generator).to(own.device)
            return torch.where(there, digits, own)
        return own

    def written(self, name: str, X: torch.Tensor, h, support: text.Batch) -> tuple:
        """What stands in for (X, D) where there is no gradient, B being learned. write: D = X B at
        the tokens that the inner loss would ask (a fast-weight layer as of 1991, 2102.11174).
        register: one vector, read off the hidden state h at the trajectory's end."""
        B = self.matrices[self.names.index(name)].to(X.dtype)
        if self.update == "register":
            return None, h[part_of(support, "closing")] @ B                 # (G, out)
        return X, X @ B * (support.inner >= 0)[..., None]


def part_of(support: text.Batch, name: str) -> torch.Tensor:
    """Says which tokens of the trajectories belong to a part -> bool (R, P). closing: `</think>`
    alone; unclosed: all but it; last: the last state and `</think>`; earlier: all but those."""
    closing = support.inner == text.END_THINK
    last = support.step == support.step.max(1, keepdim=True).values
    return {"closing": closing, "unclosed": ~closing, "last": last, "earlier": ~last}[name]


def theta_prime(model, inner: Inner, support: text.Batch) -> dict:
    """Eq. 4 as it is written, for one question: theta' = theta - alpha grad L_support(theta), K
    times -> {parameter name: tensor}. support: one row.

    It is what every test holds the fast form below equal to."""
    paths = linear_layers(model)
    params = {paths[name]: model.get_parameter(paths[name]) for name in inner.names}
    for k, part in enumerate(inner.passes(support)):
        h = functional_call(model, params, (), part.inputs())
        loss = inner.loss(model, h, part)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {path: weight - inner.rate(name, k) * grad
                  for name, (path, weight), grad in zip(inner.names, params.items(), grads)}
    return params


# The same in dual form. The gradient of L_support at a linear layer y = x W is X^T D, with X the
# layer's inputs at the trajectory's tokens and D the gradient at its outputs. So the layer of
# theta', for any input x, is
#
#     x W' = x W - alpha (x X^T) D
#
# linear attention over the trajectory's own activations: keys X, values D. A batch of questions,
# each with a theta' of its own, is two batched matrix products, and nothing of size questions x
# parameters exists.

class Adapted(NamedTuple):
    """theta' of G questions, by what it was made of."""
    hook: callable                  # for the model: makes it compute with theta'
    updates: list                   # [{layer: (X (G, P, in), D (G, P, out))}], one per inner step
    at_theta: torch.Tensor          # hidden states of the support rows at theta (G, P, C)


def adapt(model, inner: Inner, support: text.Batch, order: int = 2) -> Adapted:
    """Runs the inner loop of all questions of a support set at once.

    order 2 keeps the graph through the update (MAML); 1 takes X and D as constants (FOMAML)."""
    updates, at_theta = [], None
    with torch.enable_grad():
        for part in inner.passes(support):
            tape = {}
            hook = recording(tape, inner.names, moved(inner, updates, len(support.ids)))
            h = model(**part.inputs(), hook=hook)
            at_theta = h if at_theta is None else at_theta
            if inner.matrices is not None:
                update = {name: inner.written(name, X, h, part) for name, (X, _) in tape.items()}
            else:
                loss = inner.loss(model, h, part)
                outputs = [tape[name][1] for name in inner.names]
                grads = torch.autograd.grad(loss, outputs, create_graph=order == 2,
                                            retain_graph=True)
                update = {name: (tape[name][0], D) for name, D in zip(inner.names, grads)}
            if order == 1:
                update = {name: (X if X is None else X.detach(), D.detach())
                          for name, (X, D) in update.items()}
            updates.append(update)
    return Adapted(moved(inner, updates, len(support.ids)), updates, at_theta)

def moved(inner: Inner, updates: list, G: int):
    """A hook that computes with theta': y - sum over k of alpha_k (x X_k^T) D_k."""
    def hook(name, x, y):
        if name not in inner.names:
            return y
        rows = x.reshape(G, -1, x.size(-1))                 # (G, M, in): a question's tokens
        for k, update in enumerate(updates):
            X, D = update[name]                             # (G, P, in), (G, P, out)
            rate = inner.rate(name, k).to(y.dtype)
            if X is None:                                   # a register: (G, out)
                change = rate * D[:, None].expand(*rows.shape[:2], -1)
            else:
                scores = rows @ X.mT                        # (G, M, P)
                change = rate * scores @ D                  # (G, M, out)
            y = y - change.reshape(y.shape)
        return y
    return hook

def recording(tape: dict, names: list, inside):
    """A hook that writes {layer: (inputs, outputs)} into tape, around another hook."""
    def hook(name, x, y):
        y = inside(name, x, y)
        if name in names:
            tape[name] = x, y
        return y
    return hook

def linear_layers(model) -> dict:
    """{name as the hook knows it: name of its weight} of every linear layer in the blocks."""
    return {m.name: f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Linear)}

def fast_layers(model, patterns: str) -> list:
    """Names of the layers that comma-separated patterns name. ValueError where there are none."""
    names = list(linear_layers(model))
    matched = {n for p in patterns.split(",") for n in fnmatch.filter(names, p)}
    if not matched:
        raise ValueError(f"no layer matches {patterns}; there are {', '.join(names)}")
    return [n for n in names if n in matched]


# -------------------------------------------------------------------------- the outer loop (Eq. 8)

def meta_loss(model, inner: Inner, batch: list, algo: str = "maml", joint: float = 1.0):
    """The meta-objective (Eq. 8, Algorithm 2) of a list of Tasks -> (loss to differentiate, numbers
    to log).

    L_q(theta') + joint * L(theta). The second term is SFT's own loss on the support's rows, which
    the inner loop has run already: it keeps theta able to think."""
    support = tasks.support(batch, model.device)
    query = tasks.query(batch, model.device, shown=algo == "context")
    if algo in ("none", "context"):
        at_theta, hook = model(**support.inputs()), None
    else:
        adapted = adapt(model, inner, support, order=1 if algo == "fomaml" else 2)
        at_theta, hook = adapted.at_theta, adapted.hook
    losses = model.score(model(**query.inputs(), hook=hook), query.targets)
    L_q = losses.sum() / (query.targets >= 0).sum()
    answers = query.ids[:, :query.trunk] == text.END_THINK
    L = train.sft_loss(model.score(at_theta, support.targets), (support.targets >= 0).sum())
    numbers = {"L_q": losses[:, :query.trunk][answers].mean(), "joint": L}
    return L_q + joint * L, {name: float(loss.detach()) for name, loss in numbers.items()}

def meta(c: Meta, given: dict = {}) -> dict:
    """Meta-trains, evaluates, writes c.out -> summary."""
    c = prepare(configure(c), chosen(c) | given)
    device = device_of(c)
    model, inner = start(c, device)
    opts = train.optimisers(model, c)
    if inner.matrices is not None:                  # their size is a rate already
        opts.append(torch.optim.Adam(inner.matrices.parameters(), LR_MATRICES[c.update]))
    elif c.moves:
        opts.append(torch.optim.Adam([inner.log_alpha], 4 * c.lr_adam))
    before, _ = score.exact_match(model, {"expr": (3, 4, 5, 6)}, c.questions)
    everything = [*model.parameters(), *inner.parameters()]
    with Run(c, model, opts, inner) as run:
        model.dtype = precision_of(c, device)
        steps = range(run.start, c.steps)
        for step, batch in zip(steps, ahead(partial(tasks.tasks_at, c=c), steps, device)):
            loss, numbers = meta_loss(model, inner, batch, c.algo)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(everything, CLIP)
            move(opts, lr_at(c, step, DECAY))
            tokens = sum(len(task.solved.text) + sum(map(len, task.steps)) for task in batch)
            run.log(step, numbers | {"norm": float(norm), "tokens": tokens})
            run.save(step)
        summary = provenance(c, model, run)
        model.dtype = None
    after, _ = score.exact_match(model, {"expr": (3, 4, 5, 6)}, c.questions)
    table = meta_test(model, inner if c.moves else None, c)
    summary |= {"before": before, "after": after, "exact_match": {"expr": table},
                "rates": dict(zip(inner.names, inner.log_alpha.exp().tolist()))}
    write(Path(c.out) / "summary.json", summary)
    print(show_table(table))
    return summary

def start(c: Meta, device):
    """Loads theta from --init, trained first if that is the default and missing, or from the run
    that is resumed -> (model, its Inner)."""
    path = Path(c.out) / "ckpt.pt" if c.resume else Path(c.init)
    whole = (path.parent / "summary.json").exists()
    if not c.resume and not whole and c.init == Meta.init:
        print("training the model to start from")
        words = ["--resume" if path.exists() else "--overwrite", f"--device={c.device}"]
        train.train(*flags(train.Train, words))
    model, _ = train.load_model(path, device)
    torch.manual_seed(c.seed)
    try:
        return model, inner_of(model, c)
    except ValueError as e:
        fail(e)

def inner_of(model, c: Meta) -> Inner:
    names = fast_layers(model, c.fast)
    return Inner(model, names, c.K, c.alpha, c.tau, c.targets, c.update).to(model.device)

def load_meta(path, device="cpu"):
    """Loads a checkpoint of `meta` -> (model, inner, its config). Exits 2 with a line if it is
    none."""
    model, state = train.load_model(path, device)
    if not isinstance(state.get("extra"), dict):
        fail(f"{path} is a checkpoint, but not one of meta.py")
    c = from_file(Meta, state["config"], path)
    try:
        inner = inner_of(model, c)
        inner.load_state_dict(state["extra"])
    except (ValueError, RuntimeError) as e:
        fail(f"{path} does not fit itself: {str(e).splitlines()[-1].strip()}")
    return model, inner, c


# ------------------------------------------------------------------------------------- meta-test

KINDS = ("sibling", "swapped", "left", "right", "beyond", "cut", "whole", "unrelated", "fact",
         "other")

def trial(q, others: list, kind: str, style: str, rng: random.Random):
    """Draws the Task that a question is tested with, one query, or None where there is none.

    sibling, swapped, left, right: see `arithmetic.relatives`; the trajectory lacks its last state,
    and left or right is no mere fact.
    beyond: an operation more; the trajectory is whole. cut, whole: the question itself, the last
    state missing or not. unrelated, fact: a question as long as the trajectory's, or of two
    operands, that has nothing to do with it. other: the question itself after another question's
    trajectory, its last state missing."""
    steps = arithmetic.steps(q, rng, style)[0]
    if kind in ("whole", "beyond"):
        asked = q if kind == "whole" else arithmetic.beyond(q, rng)
        return Task(q, steps, [asked])
    if kind in ("unrelated", "other"):
        unlike = [o for o in others if o.answer != q.answer]
        if not unlike:
            return None
        other = rng.choice(unlike)
        if kind == "unrelated":
            return Task(q, steps[:-1], [other], False)
        return Task(other, arithmetic.steps(other, rng, style)[0][:-1], [q], False)
    if kind == "fact":
        return Task(q, steps[:-1], [arithmetic.draw(rng, "expr", 2)], False)
    asked = q if kind == "cut" else arithmetic.relatives(q).get(kind)
    if not asked or kind in ("left", "right") and asked.operands == 2:
        return None
    return Task(q, steps[:-1], [asked], False)

def answers(model, inner, batch: list, where: str, size: int = 256) -> list:
    """Greedy answers (texts) to the one query of every Task.

    where: 'theta' answers after `<think></think>`; 'theta_prime' too, but from weights moved along
    the trajectory, which is not in the context; 'in_context' answers after the trajectory."""
    out = []
    for i in range(0, len(batch), size):
        part, hook = batch[i:i + size], None
        if where == "theta_prime":
            hook = adapt(model, inner, tasks.support(part, model.device), order=1).hook
        shown = [";".join(t.steps) if where == "in_context" else "" for t in part]
        prompts = [text.prompt(t.queries[0].text, think) for t, think in zip(part, shown)]
        out += map(text.decode, model.generate(prompts, text.EOS, 1, hook=hook))
    return out

def outcomes(model, inner, questions: list, kind: str, style: str = "states", seed: int = 0):
    """Tests held-out questions with one kind of trial -> {where: a bool per question, right or
    not}, and the Tasks. A question's trajectory is the same for every kind. theta_prime is left
    out without an inner loop."""
    batch = [trial(q, questions, kind, style, random.Random(f"{seed}/{q.text}")) for q in questions]
    batch = [task for task in batch if task]
    row = {}
    for where in ("theta", "theta_prime", "in_context"):
        if batch and (inner or where != "theta_prime"):
            got = answers(model, inner, batch, where)
            row[where] = [arithmetic.verify(t.queries[0], a) for t, a in zip(batch, got)]
    return row, batch

def meta_test(model, inner, c: Meta) -> dict:
    """{operands: {kind: {where: share right}}} of held-out questions, the trained sizes and one
    more."""
    table = {}
    for n in (*c.counts, max(c.counts) + 1):
        questions = score.held_out("expr", n, c.questions)
        for kind in KINDS:
            row, _ = outcomes(model, inner, questions, kind, c.style)
            shares = {where: sum(ok) / len(ok) for where, ok in row.items()}
            table.setdefault(str(n), {})[kind] = shares
    return table

def show_table(table: dict) -> str:
    """Writes exact match as text, one line per size and kind."""
    columns = ("theta", "theta_prime", "in_context")
    lines = [f"{'operands':>8} {'asked':10} " + " ".join(f"{name:>11}" for name in columns)]
    for n, kinds in table.items():
        for kind, row in kinds.items():
            shares = [f"{row[name]:>11.1%}" if name in row else f"{'-':>11}" for name in columns]
            lines.append(f"{n:>8} {kind:10} {' '.join(shares)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- command line

def configure(c: Meta) -> Meta:
    """Exits 2 with a line where flags make no sense; looks at no file -> c."""
    for word in c.operands.split(","):
        if word not in train.COUNTS[1:]:
            fail(f"--operands={c.operands}: counts from 3 to 10 are expected, such as 4,5,6")
    return c

def main():
    meta(*flags(Meta))

if __name__ == "__main__":
    command(main)
