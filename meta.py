"""The explicit inner loop: theta -> theta' along a trajectory, and outer meta-steps through it (the paper's Eqs. 4 and 8, literally).

A question is a task. Its support set is one or more trajectories, its query set the answer, asked for without any trajectory:

    inner loop (Eq. 4)      theta' = theta - alpha grad_theta L_support(theta)       L_support: the trajectory's own NLL
    outer loop (Eq. 8)      min_theta  sum over questions of  L_q(theta')            L_q: the answer's NLL after `<think></think>`

The gradient of L_support at a linear layer y = x W is X^T D, with X the layer's inputs at the support's tokens and D the gradient at its
outputs. So the adapted layer, for any input x, is

    x W' = x W - alpha (x X^T) D

linear attention over the trajectory's own activations: keys X, values D. `Fast` is these two lines as a hook of the model: a
batch of questions, each with a theta' of its own, runs as batched matrix products, and nothing of size questions x parameters exists.
`theta_prime` is the same thing unrolled into weights, one question at a time: slow, and what the tests hold `Fast` equal to.

    python meta.py                               # from out/sft (trained first if missing) into out/meta
    python meta.py --algo=fomaml --out=out/fomaml
    torchrun --standalone --nproc_per_node=2 meta.py
"""
import fnmatch
import math
import random
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from data import arithmetic
from data.flags import fail, flags


@dataclass
class Meta:
    """Meta-training: the trajectory goes into the weights, the answer comes out of them."""
    algo: str = "maml"              # maml (second order), fomaml, reptile, anil (maml on the last block only), none
    init: str = "out/sft/ckpt.pt"   # where theta starts; the default is trained if it is missing
    out: str = "out/meta"           # the folder of the run
    resume: bool = False            # go on with the run in --out
    overwrite: bool = False         # replace the run in --out
    seed: int = 0                   # of data
    steps: int = 700                # meta-steps
    batch: int = 32                 # questions a meta-step
    chunks: int = 1                 # pieces of equal length that a batch is cut into, gradients summed
    domain: str = "expr"            # of the questions
    operands: str = "3,4"           # operand counts, drawn evenly
    fast: str = "*.up,*.down"       # patterns of the layers that the inner loop moves: BLOCK.qkv, .out, .up, .down
    inner: str = "whole"            # whole: steps on the whole trajectory; step: on one arithmetic step after the other; token: on every token by itself
    K: int = 1                      # inner steps (with --inner=step: passes over the trajectory)
    support: int = 1                # distinct trajectories a question
    alpha: float = 1.0              # inner rate at the start; learned per layer and step
    tau: float = 10.0               # temperature of the inner loss
    weigh: bool = False             # learn a weight for every kind of token in the inner loss
    unclosed: bool = False          # leave the closing </think> out of the inner loss
    msl: float = 0.0                # weight of the answers after inner steps before the last
    first_order: float = 0.0        # first share of the meta-steps taken first order
    joint: float = 1.0              # weight of the in-context loss
    context_grad: str = "full"      # full, or detached: no gradient from the answer through the trajectory's keys and values
    cut: float = 0.6                # share of questions whose trajectory misses results, after the curriculum
    missing: str = "7,2,1"          # how often 1, 2, 3 results are missing from such a trajectory
    cut_from: float = 0.1           # share of the meta-steps before cutting begins
    cut_full: float = 0.4           # share of the meta-steps when cutting reaches --cut
    lr: float = 0.02                # of Muon, for the hidden matrices
    lr_adam: float = 0.005          # of AdamW, for embedding and head; four times that for the inner rates
    warmup: int = 20                # meta-steps of linear warm-up
    decay: float = 0.6              # last share of the meta-steps in which the rate falls linearly to 0
    clip: float = 1.0               # largest norm of a meta-gradient
    questions: int = 200            # held-out questions a cell of the evaluation
    save_every: int = 100           # meta-steps between checkpoints
    device: str = "auto"            # cpu, cuda, or auto
    threads: int = 0                # CPU threads, 0: as many as torch chooses

def check(c, given):
    """Refuses, with a line, flags that contradict each other or make no sense. -> (c, given)."""
    if not set(c.operands.split(",")) <= set(map(str, arithmetic.TRAINED[c.domain])):
        fail(f"--operands={c.operands}: {c.domain} is trained on {', '.join(map(str, arithmetic.TRAINED[c.domain]))}; a list of them is expected, such as 3,4")
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?){2}", c.missing, re.ASCII) or not any(map(float, c.missing.split(","))):
        fail(f"--missing={c.missing} is not three weights such as 7,2,1")
    if c.cut_from > c.cut_full:
        fail(f"--cut_from={c.cut_from} comes after --cut_full={c.cut_full}")
    return c, given

if __name__ == "__main__":
    COMMAND = check(*flags(Meta))                                           # before the seconds that torch takes to import

import numpy as np                                                          # noqa: E402
import torch                                                                # noqa: E402
import torch.nn as nn                                                       # noqa: E402
from torch.func import functional_call                                      # noqa: E402

import train                                                                # noqa: E402
from data import text                                                       # noqa: E402
from model import Linear                                                    # noqa: E402


# ------------------------------------------------------------------------------------------------------------------- the tasks

class Task(NamedTuple):
    """A question, its support trajectories as text, and whether they run to the end."""
    question: arithmetic.Question
    thinks: list
    whole: bool = True


def without_results(think, n):
    """A trajectory's text up to the '=' of its n-th last result: `3+5=8;8*2=16` with n=1 -> `3+5=8;8*2=`. n=0: all of it."""
    steps = think.split(";")
    if not 0 <= n <= len(steps):
        raise ValueError(f"a trajectory of {len(steps)} steps has no {n} results to cut")
    return ";".join(steps[:len(steps) - n] + [steps[-n].split("=")[0] + "="]) if n else think

def tasks_at(step, c):
    """The tasks of a meta-step: a pure function of (seed, step)."""
    rng = random.Random(f"meta/{c.seed}/{step}")
    ramp = (step / c.steps - c.cut_from) / max(1e-9, c.cut_full - c.cut_from)
    share, out, missing = c.cut * min(1, max(0, ramp)), [], [float(w) for w in c.missing.split(",")]
    for _ in range(c.batch):
        q = arithmetic.draw(rng, c.domain, rng.choice([int(k) for k in c.operands.split(",")]))
        thinks = [";".join(t) for t in arithmetic.distinct(q, rng, c.support)]
        whole = rng.random() >= share
        if not whole:
            n = rng.choices((1, 2, 3), missing)[0]
            anywhere = rng.random() < 0.15
            thinks = [t[:rng.randrange(1, len(t))] if anywhere else without_results(t, min(n, t.count("="))) for t in thinks]
        out.append(Task(q, thinks, whole))
    return out

class Support(NamedTuple):
    """Rows `<bos> q <think> t </think> a <eos>` of N trajectories each of G questions, as tensors (G * N, S) of int64."""
    ids: torch.Tensor
    inner: torch.Tensor             # targets of the inner loss: t </think>; the answer behind them is never one
    joint: torch.Tensor             # targets of the in-context loss: t </think> a <eos> (not </think> where the trajectory is cut)
    step: torch.Tensor              # which arithmetic step a token of t belongs to; </think> to the last
    answer: torch.Tensor            # bool: positions behind t

class Query(NamedTuple):
    """`<bos> q <think></think> a <eos>` of G questions, (G, T)."""
    ids: torch.Tensor
    targets: torch.Tensor           # a <eos>

def tensors(tasks, device="cpu"):
    """Tasks -> (Support, Query); targets are IGNORE where there is nothing to learn. ValueError for an empty trajectory."""
    rows, queries = [], []
    for t in tasks:
        answer = [*text.encode(t.question.answer), text.EOS]
        queries.append((text.prompt(t.question.text, ""), answer))
        for think in t.thinks:
            if not think:
                raise ValueError(f"{t.question.text}: an empty trajectory is no support set")
            rows.append((text.prompt(t.question.text), text.encode(think), [text.END_THINK, *answer], t.whole))
    S, T = max(len(h) + len(t) + len(a) for h, t, a, _ in rows), max(len(p) + len(a) for p, a in queries)
    grid = lambda n, size, fill: np.full((n, size), fill)
    ids, inner, joint, step = (grid(len(rows), S, v) for v in (text.PAD, text.IGNORE, text.IGNORE, 0))
    q, target = grid(len(queries), T, text.PAD), grid(len(queries), T, text.IGNORE)
    after, semicolon = np.zeros((len(rows), S), dtype=bool), text.encode(";")[0]
    for j, (head, t, tail, whole) in enumerate(rows):
        a, b, end = len(head), len(head) + len(t), len(head) + len(t) + len(tail)
        ids[j, :end] = head + t + tail
        inner[j, a:b + 1] = t + tail[:1]
        joint[j, a:end] = t + tail
        joint[j, b] = tail[0] if whole else text.IGNORE
        step[j, a:b + 1] = np.cumsum([0] + [i == semicolon for i in t])
        after[j, b:] = True
    for j, (p, a) in enumerate(queries):
        q[j, :len(p) + len(a)] = p + a
        target[j, len(p):len(p) + len(a)] = a
    put = lambda a: torch.from_numpy(a).to(device)
    return (Support(put(ids[:, :-1]), *(put(a[:, 1:]) for a in (inner, joint, step)), put(after[:, :-1])),
            Query(put(q[:, :-1]), put(target[:, 1:])))


# --------------------------------------------------------------------------------------------------------------- the inner loop

class Inner(nn.Module):
    """What the inner loop learns for itself: a rate for every fast layer and step, and, if asked, a weight for every kind of token.

    tau is the temperature of its loss, the NLL of softmax(logits / tau). At 1 the gradient of a token that the model is sure of
    vanishes, and the results of a trajectory are such tokens: a hot loss writes them down all the same."""
    def __init__(self, names, K=1, alpha=1.0, tau=1.0, weigh=False):
        super().__init__()
        self.names, self.K, self.tau = list(names), K, tau
        self.log_alpha = nn.Parameter(torch.full((len(self.names), K), math.log(alpha) if alpha else -math.inf))
        self.weight = nn.Parameter(torch.ones(text.VOCAB), requires_grad=weigh)

    @property
    def lowest(self):
        return min(int(n.split(".")[0]) for n in self.names)

    def rate(self, name, k):
        return self.log_alpha[self.names.index(name), min(k, self.K - 1)].exp()

    def loss(self, model, h, targets):
        """Summed over a question's tokens, so that every token is an update of its own (Eq. 4) and a longer trajectory moves theta further."""
        return (model.score(h, targets, self.tau) * self.weight[targets.clamp(min=0)]).sum()


class Fast:
    """The dual form as a hook of the model: y - sum_k alpha_k (x X_k^T) D_k, for G questions side by side (a meta-gradient of 64 questions
    on a CPU: 11 times as fast as one after the other, 1.6 times as fast as torch.func.vmap).

    `seen` (G, M, P) bool: which of the support's P tokens each of a question's M inputs may draw on; None: all. With a causal one,
    every input has a theta'_i of its own, i being the last token it may see."""
    def __init__(self, inner, G):
        self.inner, self.G, self.steps, self.tape, self.seen = inner, G, [], None, None

    def __call__(self, name, x, y):
        if name not in self.inner.names:
            return y
        rows = x.reshape(self.G, -1, x.size(-1))                            # (G, M, in): the tokens of a question in one axis
        for k, step in enumerate(self.steps):
            X, D = step[name]                                               # (G, P, in), (G, P, out)
            keys = rows @ X.mT                                              # (G, M, P)
            keys = keys if self.seen is None else keys * self.seen
            y = y - (self.inner.rate(name, k) * keys @ D).view_as(y)
        if self.tape is not None:
            self.tape.setdefault(name, []).append((x, y))
        return y


def adapt(model, inner, pairs, G, steps=None, order=2, local=False):
    """The inner loop of G questions at once -> (Fast at theta', hidden states of pairs[0] at theta).

    pairs: [(ids, targets), ...], rows in the order of the questions; their losses are summed. steps: a list of targets for pairs[0],
    one for every inner step (default: the same K times). order 2 keeps the graph through the update (MAML); 1 takes X and D as
    constants (FOMAML). local: D of a token comes from that token's own loss alone, so a causal `seen` gives exact theta'_i."""
    fast, first = Fast(inner, G), None
    with torch.enable_grad():
        for targets in steps or [pairs[0][1]] * inner.K:
            fast.tape, loss = {}, 0.0
            for j, (ids, t) in enumerate(pairs):
                h = model(ids, hook=fast, plain_from=inner.lowest if order == 2 else None,
                          detach=torch.ones_like(ids, dtype=torch.bool) if local else None)
                first = h if first is None else first
                loss = loss + inner.loss(model, h, t if j else targets)
            outputs = [y for name in inner.names for _, y in fast.tape[name]]
            grads = iter(torch.autograd.grad(loss, outputs, create_graph=order == 2, retain_graph=True, materialize_grads=True))
            step = {}
            for name in inner.names:                                        # (G, P, in), (G, P, out): the pairs' tokens behind each other
                X, D = (torch.cat([a.reshape(G, -1, a.size(-1)) for a in part], 1)
                        for part in zip(*((x, next(grads)) for x, _ in fast.tape[name])))
                step[name] = (X, D) if order == 2 else (X.detach(), D.detach())
            fast.steps.append(step)
    fast.tape = None
    return fast, first

def by_step(support):
    """Targets of the inner loss, one arithmetic step after the other: the paper's sequence of updates, t_{<=i} by whole steps."""
    return [support.inner.masked_fill(support.step != k, text.IGNORE) for k in range(int(support.step.max()) + 1)]

def theta_prime(model, inner, pairs, steps=None, create_graph=True):
    """The readable primal form, for one question: theta' = theta - alpha grad -> {parameter name: tensor}. Same arguments as `adapt`."""
    layers = {m.name: f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Linear)}
    theta = {layers[n]: model.get_parameter(layers[n]) for n in inner.names}
    for k, targets in enumerate(steps or [pairs[0][1]] * inner.K):
        loss = sum(inner.loss(model, functional_call(model, theta, (ids,), {"plain_from": inner.lowest}), t if j else targets)
                   for j, (ids, t) in enumerate(pairs))
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph)
        theta = {p: w - inner.rate(n, k) * g for n, (p, w), g in zip(inner.names, theta.items(), grads)}
    return theta

def fast_layers(model, patterns, algo="maml"):
    """Names of the layers that comma-separated patterns name, in the last block only for anil. ValueError where there are none."""
    names, found = [m.name for m in model.modules() if isinstance(m, Linear)], set()
    for p in patterns.split(","):
        hit = fnmatch.filter(names, p)
        if not hit:
            raise ValueError(f"no layer matches {p!r}; there are {', '.join(names)}")
        found.update(hit)
    found = [n for n in names if n in found and (algo != "anil" or n.startswith(f"{model.config.layers - 1}."))]
    if not found:
        raise ValueError(f"anil moves the last block only, and {patterns} has none of its layers")
    return found


# ------------------------------------------------------------------------------------------------------------------- meta-test

def answers(model, questions, thinks, inner=None, where="theta_prime", mode="whole", size=256):
    """Greedy answers (texts) of Questions, one trajectory text each (or a list of texts: several).

    where: 'theta' answers after `<think></think>`; 'theta_prime' too, but from weights moved along the trajectory, which is not in
    the context; 'in_context' answers after the trajectory."""
    out = []
    for i in range(0, len(questions), size):
        qs, ts = questions[i:i + size], thinks[i:i + size]
        fast = None
        if where == "theta_prime":
            tasks = [Task(q, [t] if isinstance(t, str) else t) for q, t in zip(qs, ts)]
            support, _ = tensors(tasks, model.head.weight.device)
            fast, _ = adapt(model, inner, [(support.ids, support.inner)], len(qs), by_step(support) * inner.K if mode == "step" else None,
                            order=1, local=mode == "token")
        prompts = [text.prompt(q.text, t if where == "in_context" else "") for q, t in zip(qs, ts)]
        out += [text.decode(r) for r in model.generate(prompts, text.EOS, 4, pad=text.PAD, hook=fast)]
    return out

CONDITIONS = ("whole", "own", "cut", "cut2", "cut3", "other", "corrupted_early", "corrupted_last")

def trial(q, others, condition, rng):
    """-> (trajectory text, the answer it implies) of a question under a condition, or None where there is no such trajectory.

    cut, cut2, cut3: without the last 1, 2, 3 results. other: another question's. corrupted_*: one result wrong, consistent after it."""
    if condition.startswith("corrupted"):
        if condition.endswith("early") and q.operands == 2:
            return None
        found = arithmetic.corrupt(q, rng, -1 if condition.endswith("last") else rng.randrange(q.operands - 2))
        return found and (";".join(found[0]), found[1])
    if condition == "other":
        ts, implied = arithmetic.steps(rng.choice([o for o in others if o.answer != q.answer]), rng)
        return ";".join(ts), implied
    n, ts = int(condition[3:] or 1) if condition.startswith("cut") else 0, arithmetic.steps(q, rng)[0]
    return (without_results(";".join(ts), n), q.answer) if n <= len(ts) else None

def outcomes(model, inner, questions, condition, mode="whole", seed=0, own=None):
    """Answers under a condition -> {theta, theta_prime, in_context: list of bool, right or not; implied, implied_in_context: what the
    trajectory implies, where that differs from the truth}. `own`: the trajectories that the model wrote itself. {} if there is no trial."""
    rng = random.Random(f"{seed}/{questions[0].text}/{condition}")
    if condition == "own":
        trials = [(q, (t, "")) for q, t in zip(questions, own) if t and text.plain(t)]
    else:
        trials = [(q, t) for q in questions if (t := trial(q, questions, condition, rng))]
    if not trials:
        return {}
    qs, thinks, implied = [q for q, _ in trials], [t for _, (t, _) in trials], [i for _, (_, i) in trials]
    row = {}
    for where in ("theta", "theta_prime", "in_context"):
        if where == "theta_prime" and inner is None:
            continue
        got = answers(model, qs, thinks, inner, where, mode)
        row[where] = [arithmetic.verify(q, a) for q, a in zip(qs, got)]
        if where != "theta" and (condition == "other" or condition.startswith("corrupted")):
            row["implied" if where == "theta_prime" else "implied_in_context"] = [a == i for a, i in zip(got, implied)]
    return row

def exact_match(model, inner, cells, n, mode="whole", seed=0):
    """{domain: {operands: {condition: {theta, theta_prime, in_context, implied, ...: list of bool}}}}, n held-out questions a cell."""
    table = {}
    for domain, counts in cells.items():
        for k in counts:
            qs = train.held_out(domain, k, n)
            own = [t for t, _ in train.respond(model, qs)]
            rows = {condition: outcomes(model, inner, qs, condition, mode, seed, own) for condition in CONDITIONS}
            table.setdefault(domain, {})[str(k)] = {condition: row for condition, row in rows.items() if row}
    return table

def shares(table):
    """The same with every list replaced by its mean."""
    return {d: {k: {c: {w: sum(v) / len(v) for w, v in row.items()} for c, row in cs.items()} for k, cs in ks.items()} for d, ks in table.items()}


# --------------------------------------------------------------------------------------------------------------- the outer loop

def counts_of(tasks):
    """Questions, tokens of answers, targets of the in-context loss: what a sum over tasks is divided by to be a mean."""
    answers = [len(t.question.answer) + 1 for t in tasks]
    return len(tasks), sum(answers), sum(len(think) + a + t.whole for t, a in zip(tasks, answers) for think in t.thinks)

def meta_loss(model, inner, c, tasks, device="cpu", order=2, counts=None):
    """The meta-objective (Eq. 8) of a list of tasks -> (loss to differentiate, numbers to log). counts: `counts_of` the whole batch,
    where these tasks are a part of one.

    L_q(theta') + joint * L(theta), the second term the ordinary in-context loss on the support's own rows, which the inner loop
    has run already: it keeps theta able to think. Reptile has no L_q(theta'): its gradients are left in the parameters."""
    support, query = tensors(tasks, device)
    G, (questions, n_q, n_j) = len(tasks), counts or counts_of(tasks)
    support_pair, query_pair = (support.ids, support.inner), (query.ids, query.targets)
    answer = lambda fast: model.score(model(query.ids, hook=fast, plain_from=inner.lowest if order == 2 else None), query.targets).sum() / n_q
    if c.algo == "none":
        h, L_q = model(support.ids), answer(None)
    elif c.algo == "reptile":
        fast, h = adapt(model, inner, [support_pair, query_pair], G, order=1)
        L_q = answer(fast).detach()
        for m in model.modules():                                           # theta - theta', averaged over the questions (Nichol 2018)
            if isinstance(m, Linear) and m.name in inner.names:
                move = sum(inner.rate(m.name, k).detach() * torch.einsum("gpo,gpi->oi", D, X) for k, (X, D) in
                           enumerate(step[m.name] for step in fast.steps)) / questions
                m.weight.grad = move if m.weight.grad is None else m.weight.grad + move
    else:
        fast, h = adapt(model, inner, [support_pair], G, by_step(support) * c.K if c.inner == "step" else None, order, c.inner == "token")
        L_q = answer(fast)
        h = model(support.ids) if c.inner == "token" else h                 # there the inner loop's own pass has no gradient through keys
        if c.msl:                                                           # MAML++: every inner step answers, not only the last
            steps = fast.steps
            for k in range(1, len(steps)):
                fast.steps = steps[:k]
                L_q = L_q + c.msl * answer(fast)
            fast.steps = steps
    if c.context_grad == "detached":                                        # Eq. 8 in context, without its second-order path
        own = model.score(h, support.joint.masked_fill(support.answer, text.IGNORE)).sum()
        h = model(support.ids, detach=~support.answer)
        joint = (own + model.score(h, support.joint.masked_fill(~support.answer, text.IGNORE)).sum()) / n_j
    else:
        joint = model.score(h, support.joint).sum() / n_j
    return c.joint * joint + (L_q if L_q.requires_grad else 0), {"L_q": L_q.detach(), "joint": joint.detach()}


def meta(c, given):
    """Meta-trains, evaluates, writes c.out. -> summary."""
    c = train.prepare(*check(c, given))
    device = train.device_of(c)
    if not Path(c.init).exists() and c.init == Meta.init:
        print("training the model to start from")
        train.train(*flags(train.Train, [f"--device={c.device}"]))
    model, start = train.load_model(c.init, device)
    if start["step"] < start["config"].get("steps", 0):
        print(f"note: {c.init} is a run that stopped at step {start['step']} of {start['config']['steps']}", file=sys.stderr)
    torch.manual_seed(c.seed)
    try:
        counts = [int(k) for k in c.operands.split(",")]
        tasks_at(0, c)
        inner = Inner(fast_layers(model, c.fast, c.algo), c.K, c.alpha, c.tau, c.weigh).to(device)
        if c.unclosed:
            inner.weight.data[text.END_THINK] = 0.0
    except ValueError as e:
        fail(e)
    opts = train.optimisers(model, c.lr, c.lr_adam)
    learned = [p for p in inner.parameters() if p.requires_grad and c.alpha and c.algo not in ("none", "reptile")]
    if learned:
        opts.append(torch.optim.Adam(learned, 4 * c.lr_adam))
    everything = [*model.parameters(), *learned]

    def step(i):
        order = 1 if c.algo in ("fomaml", "reptile", "none") or i < c.first_order * c.steps else 2
        tasks = sorted(tasks_at(i, c), key=lambda t: len(t.question.text) + max(map(len, t.thinks)))
        own, counts, total = tasks[train.RANK::train.WORLD], counts_of(tasks), {"L_q": 0.0, "joint": 0.0}
        size = max(1, -(-len(own) // c.chunks))
        for j in range(0, len(own), size):
            loss, numbers = meta_loss(model, inner, c, own[j:j + size], device, order, counts)
            loss.backward()
            total = {k: total[k] + v for k, v in numbers.items()}
        total = train.together(everything, total)
        norm = torch.nn.utils.clip_grad_norm_(everything, c.clip)
        return {k: float(v) for k, v in total.items()} | {"norm": float(norm), "rate": float(inner.log_alpha.detach().exp().max())}

    cells = {c.domain: (*counts, max(counts) + 1)}
    keeps = {d: ks for d, ks in train.CELLS.items() if d == c.domain}
    before = None if train.RANK else train.exact_match(model, keeps, c.questions)[0]
    seconds, _ = train.fit(c, model, opts, step, inner)
    if train.RANK:
        return {}
    after, _ = train.exact_match(model, keeps, c.questions)
    table = shares(exact_match(model, None if c.algo == "none" else inner, cells, c.questions, c.inner))
    print(show_table(table))
    summary = {"exact_match": table, "before": before, "after": after, "seconds": round(seconds, 1), "steps": c.steps,
               "rates": {n: [round(r, 4) for r in inner.log_alpha[i].exp().tolist()] for i, n in enumerate(inner.names)},
               "parameters": sum(p.numel() for p in model.parameters()), "device": train.device_name(device), "torch": torch.__version__,
               "revision": train.revision(), "config": asdict(c)}
    train.write(Path(c.out) / "summary.json", summary)
    return summary

def load_meta(path, device="cpu"):
    """A checkpoint of `meta` -> (model, inner, the checkpoint). Exits 2 with a line if it is none."""
    model, state = train.load_model(path, device)
    if not state.get("extra") or "log_alpha" not in state["extra"]:
        fail(f"{path} is a checkpoint, but not one of meta.py")
    c = state["config"]
    inner = Inner(fast_layers(model, c["fast"], c["algo"]), c["K"], 1.0, c["tau"], c["weigh"]).to(device)
    inner.load_state_dict(state["extra"])
    return model, inner, state

def show_table(table):
    """Exact match as text, a line a cell and condition."""
    lines = [f"{'domain':7} {'operands':>8} {'trajectory':16} {'theta':>7} {'theta_prime':>12} {'in context':>11} {'implied, by theta_prime':>24}"]
    percent = lambda row, key, width: f"{row[key]:>{width}.1%}" if key in row else " " * (width - 1) + "-"
    for d, ks in table.items():
        for k, conditions in ks.items():
            for name, row in conditions.items():
                lines.append(f"{d:7} {k:>8} {name:16} {percent(row, 'theta', 7)} {percent(row, 'theta_prime', 12)} "
                             f"{percent(row, 'in_context', 11)} {percent(row, 'implied', 24)}")
    return "\n".join(lines)

def main(parsed=None):
    meta(*(parsed or check(*flags(Meta))))

if __name__ == "__main__":
    train.command(lambda: main(COMMAND))
