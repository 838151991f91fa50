"""The explicit inner loop: theta -> theta' along a trajectory, and outer meta-steps through it (the
paper's Eqs. 4 and 8).

The paper writes grad L_q in Eq. 4 and never gives L_q a formula. An inner loop cannot know the
answer, so this one descends the trajectory's own NLL. A question is a task. Its support set is one
or more trajectories, its query set the answer, asked for without any trajectory:

    inner loop (Eq. 4)   theta' = theta - alpha grad L_support(theta)
                         L_support: the trajectory's own NLL
    outer loop (Eq. 8)   min_theta  sum over questions of  L_q(theta')
                         L_q: the answer's NLL after `<think></think>`

Few tasks can be solved by copying (data/tasks.py): the question goes an operation beyond the
trajectory, or the trajectory misses its last result.

The gradient of L_support at a linear layer y = x W is X^T D, with X the layer's inputs at the
support's tokens and D the gradient at its outputs. So the adapted layer, for any input x, is

    x W' = x W - alpha (x X^T) D

linear attention over the trajectory's own activations: keys X, values D. `Fast` is these two lines
as a hook of the model: a batch of questions, each with a theta' of its own, runs as batched matrix
products, and nothing of size questions x parameters exists. `theta_prime` is the same thing
unrolled into weights, one question at a time: slow, and what the tests hold `Fast` equal to.

    python meta.py                          # from out/sft (trained first if missing) into out/meta
    python meta.py --algo=fomaml --out=out/fomaml
    torchrun --standalone --nproc_per_node=2 meta.py
"""
from lab import flags                               # first: Ctrl-C from here on is quiet

import fnmatch
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.func import functional_call

import train
from data import arithmetic, text
from data.tasks import Task, sizes_of, tasks_at, tensors, without_results
from lab import machine, optim, score
from lab.flags import fail
from lab.machine import RANK, WORLD
from lab.run import Run, command, locked, prepare, provenance, write
from model import Linear


@dataclass
class Meta:
    """Meta-training: the trajectory goes into the weights, the answer comes out of them."""
    algo: str = "maml"              # {maml, fomaml, reptile, anil, none} anil: the last block only
    init: str = "out/sft/ckpt.pt"   # where theta starts; the default is trained if it is missing
    out: str = "out/meta"           # the folder of the run
    resume: bool = False            # go on with the run in --out
    overwrite: bool = False         # replace the run in --out
    seed: int = 0                   # [0, 1e9] of data
    steps: int = 700                # [1, 1e9] meta-steps
    batch: int = 32                 # [1, 1e6] questions a meta-step
    chunks: int = 1                 # [1, 1e4] pieces of a batch, gradients summed: less memory
    domain: str = "expr"            # {expr, sum, modsum} of the questions
    operands: str = "3,4"           # operand counts, drawn evenly
    fast: str = "*.up,*.down"       # layers that the inner loop moves: BLOCK.qkv, .out, .up, .down
    inner: str = "whole"            # {whole, step, token} one inner step on all, a step, a token
    K: int = 1                      # [1, 100] inner steps (with --inner=step: passes)
    support: int = 1                # [1, 100] distinct trajectories a question
    alpha: float = 1.0              # [0, 1e6] inner rate at the start; learned per layer and step
    tau: float = 10.0               # (0, 1e9] temperature of the inner loss
    weigh: bool = False             # learn a weight for every kind of token in the inner loss
    unclosed: bool = False          # leave the closing </think> out of the inner loss
    msl: float = 0.0                # [0, 1e9] weight of the answers after earlier inner steps
    first_order: float = 0.0        # [0, 1] first share of the meta-steps taken first order
    joint: float = 1.0              # [0, 1e9] weight of the in-context loss
    context_grad: str = "full"      # {full, detached} detached: the answer's none through t
    further: float = 0.5            # [0, 1] share that asks an operation beyond the trajectory
    cut: float = 0.9                # [0, 1] share of the others whose trajectory is cut
    lr: float = 0.02                # (0, 1e9] of Muon, for the hidden matrices
    lr_adam: float = 0.005          # (0, 1e9] of AdamW, for the rest; inner rates: four times that
    warmup: int = 20                # [0, 1e9] meta-steps of linear warm-up
    decay: float = 0.6              # [0, 1] last share of the meta-steps, the rate falling to 0
    clip: float = 1.0               # (0, 1e9] largest norm of a meta-gradient
    questions: int = 100            # [1, 1e5] held-out questions a cell of the evaluation
    save_every: int = 100           # [1, 1e9] meta-steps between checkpoints
    device: str = "auto"            # {auto, cpu, cuda} auto: cuda where there is one
    dtype: str = "auto"             # {auto, float32, bfloat16} auto: bfloat16 on CPUs that have it
    threads: int = 0                # [0, 1000] CPU threads, 0: as many as torch chooses

    script = "meta.py"

    @property
    def counts(self):
        return [int(k) for k in self.operands.split(",")]


# -------------------------------------------------------------------------- the inner loop (Eq. 4)

class Inner(nn.Module):
    """What the inner loop learns for itself: a rate for every fast layer and step, and, if asked, a
    weight for every kind of token. `heeded` (VOCAB,) takes kinds of tokens out of its loss.

    tau is the temperature of its loss, the NLL of softmax(logits / tau). At 1 the gradient of a
    token that the model is sure of vanishes, and the results of a trajectory are such tokens: a hot
    loss writes them down all the same."""

    def __init__(self, names, K=1, alpha=1.0, tau=1.0, weigh=False):
        super().__init__()
        self.names, self.K, self.tau = list(names), K, tau
        start = math.log(alpha) if alpha else -math.inf
        self.log_alpha = nn.Parameter(torch.full((len(self.names), K), start))
        self.weight = nn.Parameter(torch.ones(text.VOCAB), requires_grad=weigh)
        self.register_buffer("heeded", torch.ones(text.VOCAB), persistent=False)

    @property
    def lowest(self):
        """The first block that the inner loop moves."""
        return min(int(n.split(".")[0]) for n in self.names)

    def rate(self, name, k):
        return self.log_alpha[self.names.index(name), min(k, self.K - 1)].exp()

    def loss(self, model, h, targets):
        """Summed over a question's tokens, so that every token is an update of its own (Eq. 4) and
        a longer trajectory moves theta further."""
        weight = (self.weight * self.heeded)[targets.clamp(min=0)]
        return (model.score(h, targets, self.tau) * weight).sum()


class Fast:
    """The dual form as a hook of the model: y - sum_k alpha_k (x X_k^T) D_k, for G questions side
    by side.

    `seen` (G, M, P) bool: which of the support's P tokens each of a question's M inputs may draw
    on; None: all. With a causal one, every input has a theta'_i of its own, i being the last token
    it may see."""

    def __init__(self, inner, G):
        self.inner, self.G = inner, G
        self.steps = []                             # [{layer: (X, D)}], one an inner step
        self.tape = None                            # {layer: [(x, y)]} while gradients are taken
        self.seen = None

    def __call__(self, name, x, y):
        if name not in self.inner.names:
            return y
        rows = x.reshape(self.G, -1, x.size(-1))            # (G, M, in): a question's tokens
        for k, step in enumerate(self.steps):
            X, D = step[name]                               # (G, P, in), (G, P, out)
            keys = rows @ X.mT                              # (G, M, P)
            if self.seen is not None:
                keys = keys * self.seen
            y = y - (self.inner.rate(name, k) * keys @ D).view_as(y)
        if self.tape is not None:
            self.tape.setdefault(name, []).append((x, y))
        return y


def adapt(model, inner, pairs, G, steps=None, order=2, local=False):
    """The inner loop of G questions at once -> (Fast at theta', hidden states of pairs[0] at
    theta).

    pairs: [(ids, targets), ...], rows in the order of the questions; their losses are summed.
    steps: a list of targets for pairs[0], one for every inner step (default: the same K times).
    order 2 keeps the graph through the update (MAML); 1 takes X and D as constants (FOMAML). local:
    D of a token comes from that token's own loss alone, so that a causal `seen` gives exact
    theta'_i."""
    fast, at_theta = Fast(inner, G), None
    plain_from = inner.lowest if order == 2 else None
    with torch.enable_grad():
        for targets in steps or [pairs[0][1]] * inner.K:
            fast.tape, loss = {}, 0.0
            for j, (ids, pair_targets) in enumerate(pairs):
                detach = torch.ones_like(ids, dtype=torch.bool) if local else None
                h = model(ids, hook=fast, plain_from=plain_from, detach=detach)
                at_theta = h if at_theta is None else at_theta
                loss = loss + inner.loss(model, h, pair_targets if j else targets)
            fast.steps.append(keys_and_values(fast, loss, order))
    fast.tape = None
    return fast, at_theta

def keys_and_values(fast, loss, order):
    """One inner step in dual form: {layer: (X (G, P, in), D (G, P, out))} from what the hook has
    recorded, the tokens of several pairs behind each other."""
    names, G = fast.inner.names, fast.G
    outputs = [y for name in names for _, y in fast.tape[name]]
    grads = iter(torch.autograd.grad(loss, outputs, create_graph=order == 2, retain_graph=True,
                                     materialize_grads=True))
    step = {}
    for name in names:
        inputs = [x.reshape(G, -1, x.size(-1)) for x, _ in fast.tape[name]]
        gradients = [g.reshape(G, -1, g.size(-1)) for _, g in zip(inputs, grads)]
        X, D = torch.cat(inputs, 1), torch.cat(gradients, 1)
        step[name] = (X, D) if order == 2 else (X.detach(), D.detach())
    return step

def by_step(support):
    """Targets of the inner loss, one arithmetic step after the other: the paper's sequence of
    updates along t_{<=i}, by whole steps."""
    last = int(support.step.max())
    return [support.inner.masked_fill(support.step != k, text.IGNORE) for k in range(last + 1)]

def theta_prime(model, inner, pairs, steps=None, create_graph=True):
    """The readable primal form, for one question: theta' = theta - alpha grad L_support ->
    {parameter name: tensor}. pairs, steps as in `adapt`."""
    paths = linear_layers(model)
    theta = {paths[n]: model.get_parameter(paths[n]) for n in inner.names}
    for k, targets in enumerate(steps or [pairs[0][1]] * inner.K):
        loss = 0.0
        for j, (ids, pair_targets) in enumerate(pairs):
            h = functional_call(model, theta, (ids,), {"plain_from": inner.lowest})
            loss = loss + inner.loss(model, h, pair_targets if j else targets)
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph)
        theta = {path: w - inner.rate(name, k) * g
                 for name, (path, w), g in zip(inner.names, theta.items(), grads)}
    return theta

def linear_layers(model):
    """{name as the hook knows it: name of its weight} of every linear layer in the blocks."""
    return {m.name: f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Linear)}

def fast_layers(model, patterns, algo="maml"):
    """Names of the layers that comma-separated patterns name, in the last block only for anil.
    ValueError where there are none."""
    names, matched = list(linear_layers(model)), set()
    for p in patterns.split(","):
        hit = fnmatch.filter(names, p)
        if not hit:
            raise ValueError(f"no layer matches {p!r}; there are {', '.join(names)}")
        matched.update(hit)
    if algo == "anil":
        matched = {n for n in matched if n.startswith(f"{model.config.layers - 1}.")}
    if not matched:
        raise ValueError(f"anil moves the last block only, and {patterns} has none of its layers")
    return [n for n in names if n in matched]


# -------------------------------------------------------------------------- the outer loop (Eq. 8)

def meta_loss(model, inner, c, tasks, device="cpu", order=2, sizes=None):
    """The meta-objective (Eq. 8, Algorithm 2) of a list of tasks -> (loss to differentiate, numbers
    to log). sizes: `sizes_of` the whole batch, where these tasks are a part of one.

    L_q(theta') + joint * L(theta). The second term is the ordinary in-context loss on the support's
    own rows, which the inner loop has run already: it keeps theta able to think. Reptile has no
    L_q(theta'): its gradients are left in the parameters."""
    support, query = tensors(tasks, device)
    sizes = sizes or sizes_of(tasks)

    def L_q(fast):
        plain_from = inner.lowest if order == 2 else None
        h = model(query.ids, hook=fast, plain_from=plain_from)
        return model.score(h, query.targets).sum() / sizes.answer_tokens

    if c.algo == "none":
        h, loss = model(support.ids), L_q(None)
    elif c.algo == "reptile":
        pairs = [(support.ids, support.inner), query]
        fast, h = adapt(model, inner, pairs, len(tasks), order=1)
        loss = L_q(fast).detach()
        leave_moves(model, inner, fast, sizes.questions)
    else:
        steps = by_step(support) * c.K if c.inner == "step" else None
        pairs, local = [(support.ids, support.inner)], c.inner == "token"
        fast, h = adapt(model, inner, pairs, len(tasks), steps, order, local)
        loss = L_q(fast)
        if local:                                   # that pass has no gradient through keys
            h = model(support.ids)
        if c.msl:                                   # MAML++: every inner step answers
            steps = fast.steps
            for k in range(1, len(steps)):
                fast.steps = steps[:k]
                loss = loss + c.msl * L_q(fast)
    joint = joint_loss(model, c, support, h) / sizes.joint_targets
    numbers = {"L_q": loss.detach(), "joint": joint.detach()}
    return c.joint * joint + (loss if loss.requires_grad else 0), numbers

def joint_loss(model, c, support, h):
    """The in-context loss of the support's rows, summed; h: their hidden states at theta."""
    if c.context_grad == "full":
        return model.score(h, support.joint).sum()
    # Eq. 8 in context without its second-order path: the answer is learned behind a trajectory
    # whose keys and values pass no gradient.
    behind = support.section == 2
    loss = model.score(h, support.joint.masked_fill(behind, text.IGNORE)).sum()
    answer = support.joint.masked_fill(~behind, text.IGNORE)
    h = model(support.ids, detach=support.section == 1)
    return loss + model.score(h, answer).sum()

def leave_moves(model, inner, fast, questions):
    """Reptile (1803.02999): theta - theta', averaged over the questions, as the gradient."""
    for name, path in linear_layers(model).items():
        if name not in inner.names:
            continue
        move = 0
        for k, step in enumerate(fast.steps):
            X, D = step[name]
            move = move + inner.rate(name, k).detach() * torch.einsum("gpo,gpi->oi", D, X)
        weight = model.get_parameter(path)
        move = (move / questions).to(weight.dtype)
        weight.grad = move if weight.grad is None else weight.grad + move

def meta_steps(c, model, inner, learned, run):
    """Meta-steps: each leaves the clipped meta-gradient and yields numbers to log."""
    everything, device = [*model.parameters(), *learned], run.device
    first_order = c.algo in ("fomaml", "reptile", "none")
    for i in run:
        order = 1 if first_order or i < c.first_order * c.steps else 2
        tasks = sorted(tasks_at(i, c), key=length)
        share, sizes = tasks[RANK::WORLD], sizes_of(tasks)
        total = {"L_q": 0.0, "joint": 0.0}
        size = max(1, math.ceil(len(share) / c.chunks))
        for j in range(0, len(share), size):
            loss, numbers = meta_loss(model, inner, c, share[j:j + size], device, order, sizes)
            loss.backward()
            total = {k: total[k] + v for k, v in numbers.items()}
        total = machine.together(everything, total)
        norm = torch.nn.utils.clip_grad_norm_(everything, c.clip)
        yield {"L_q": float(total["L_q"]), "joint": float(total["joint"]), "norm": float(norm),
               "rate": float(inner.log_alpha.detach().exp().max())}

def length(task):
    return len(task.question.text) + max(map(len, task.thinks))

def meta(c, given):
    """Meta-trains, evaluates, writes c.out. -> summary"""
    c = prepare(configure(c, given), given)
    device = machine.device_of(c)
    model, inner = start(c, device)
    dtype = machine.precision_of(c, device)
    opts = optim.optimisers(model, c.lr, c.lr_adam, dtype)
    learns = c.alpha and c.algo not in ("none", "reptile")
    learned = [p for p in inner.parameters() if p.requires_grad and learns]
    if learned:
        opts.append(torch.optim.Adam(learned, 4 * c.lr_adam))

    with locked(c.out):
        keeps = {c.domain: score.CELLS[c.domain]}   # can theta still think?
        before = None if RANK else score.exact_match(model, keeps, c.questions)[0]
        with Run(c, model, opts, inner) as run, machine.computing_in(model, dtype):
            for numbers in meta_steps(c, model, inner, learned, run):
                run.update(numbers)
        if RANK:
            return {}
        after = score.exact_match(model, keeps, c.questions)[0]
        summary = {"before": before, "after": after, **evaluate(c, model, inner)}
        summary |= provenance(c, model, run)
        write(Path(c.out) / "summary.json", summary)
    return summary

def evaluate(c, model, inner):
    """Prints and returns what held-out questions say of theta and theta'."""
    cells = {c.domain: (*c.counts, max(c.counts) + 1)}
    tested = None if c.algo == "none" else inner
    table = score.averaged(meta_test(model, tested, cells, c.questions, c.inner))
    print(show_table(table))
    rates = {name: [round(r, 4) for r in row.exp().tolist()]
             for name, row in zip(inner.names, inner.log_alpha)}
    return {"exact_match": table, "rates": rates}

def start(c, device):
    """-> (theta from --init, trained first if that is the default and missing; its Inner). A run
    that is resumed starts from its own checkpoint."""
    path = Path(c.out) / "ckpt.pt" if c.resume else Path(c.init)
    if not path.exists() and c.init == Meta.init:
        print("training the model to start from")
        train.train(*flags.flags(train.Train, [f"--device={c.device}"]))
    model, state = train.load_model(path, device)
    planned = state["config"].get("steps", 0)
    if state["step"] < planned and not c.resume:
        print(f"note: {c.init} is a run that stopped at step {state['step']} of {planned}",
              file=sys.stderr)
    torch.manual_seed(c.seed)
    try:
        tasks_at(0, c)                              # are there so many trajectories?
        return model, inner_of(model, c, device)
    except ValueError as e:
        fail(e)

def inner_of(model, c, device):
    layers = fast_layers(model, c.fast, c.algo)
    inner = Inner(layers, c.K, c.alpha, c.tau, c.weigh).to(device)
    if c.unclosed:
        inner.heeded[text.END_THINK] = 0.0
    return inner

def load_meta(path, device="cpu"):
    """A checkpoint of `meta` -> (model, inner, the checkpoint). Exits 2 with a line if it is
    none."""
    model, state = train.load_model(path, device)
    extra = state.get("extra")
    if not isinstance(extra, dict) or "log_alpha" not in extra:
        fail(f"{path} is a checkpoint, but not one of meta.py")
    config = flags.from_file(Meta, state["config"], path)
    try:
        inner = inner_of(model, config, device)
        inner.load_state_dict(state["extra"])
    except (ValueError, RuntimeError) as e:
        fail(f"{path} does not fit itself: {str(e).splitlines()[-1].strip()}")
    return model, inner, state


# ------------------------------------------------------------------------------------- meta-test

CONDITIONS = ("further", "further_other", "further_wrong", "whole", "own", "cut", "cut2", "other",
              "corrupted_early", "corrupted_last")

class Trial(NamedTuple):
    """What a question is tried with: a trajectory as text, the question that it solves, and the
    answer that follows if one believes it, or copies it: not the right one, or None."""
    think: str
    solved: arithmetic.Question
    implied: str = None

def answers(model, questions, thinks, inner=None, where="theta_prime", mode="whole", size=256,
            solved=None):
    """Greedy answers (texts) of Questions, one trajectory text each (or a list of texts: several).

    where: 'theta' answers after `<think></think>`; 'theta_prime' too, but from weights moved along
    the trajectory, which is not in the context; 'in_context' answers after the trajectory.
    solved: the questions behind which theta_prime reads the trajectories, default those asked."""
    out = []
    for i in range(0, len(questions), size):
        qs, ts = questions[i:i + size], thinks[i:i + size]
        fast = None
        if where == "theta_prime":
            tasks = [Task(q, [t] if isinstance(t, str) else t, solved=behind)
                     for q, t, behind in zip(qs, ts, (solved or questions)[i:i + size])]
            fast = adapted(model, inner, tasks, mode)[0]
        shown = ts if where == "in_context" else [""] * len(qs)
        prompts = [text.prompt(q.text, t) for q, t in zip(qs, shown)]
        rows = model.generate(prompts, text.EOS, 4, pad=text.PAD, hook=fast)
        out += map(text.decode, rows)
    return out

def adapted(model, inner, tasks, mode="whole"):
    """theta' of tasks, as constants -> (Fast, Query). mode: an --inner."""
    support, query = tensors(tasks, model.head.weight.device)
    steps = by_step(support) * inner.K if mode == "step" else None
    pairs, local = [(support.ids, support.inner)], mode == "token"
    fast, _ = adapt(model, inner, pairs, len(tasks), steps, order=1, local=local)
    return fast, query

def trial(q, others, condition, rng):
    """-> the Trial of a question under a condition, or None where there is none.

    further: a whole trajectory of the question less its last operation, which nothing but the
    question says; implied is what that came to, a copy. further_other: such a one of another
    question. further_wrong: its last result is wrong; implied is the last operation on that.
    cut, cut2: the question's own without the last 1, 2 results. other: another question's whole
    one. corrupted_*: one result wrong, consistent after it."""
    if condition.startswith("further"):
        return further_trial(q, others, condition, rng)
    if condition.startswith("corrupted"):
        early = condition.endswith("early")
        if early and q.operands == 2:
            return None
        slip = arithmetic.corrupt(q, rng, rng.randrange(q.operands - 2) if early else -1)
        return slip and Trial(";".join(slip[0]), q, slip[1])
    if condition == "other":
        other = another(q, others, rng)
        return other and Trial(arithmetic.trajectory(other, rng), q, other.answer)
    n = int(condition[3:] or 1) if condition.startswith("cut") else 0
    steps = arithmetic.steps(q, rng)[0]
    return Trial(without_results(";".join(steps), n), q) if n <= len(steps) else None

def further_trial(q, others, condition, rng):
    solved = arithmetic.part(q)
    if not solved:
        return None
    if condition == "further_wrong":
        slip = arithmetic.corrupt(solved, rng, -1)
        implied = slip and arithmetic.onward(q, int(slip[1]))
        return Trial(";".join(slip[0]), solved, implied) if implied else None
    if condition == "further_other":
        solved = another(solved, list(filter(None, map(arithmetic.part, others))), rng)
        return solved and Trial(arithmetic.trajectory(solved, rng), solved)
    implied = solved.answer if solved.answer != q.answer else None
    return Trial(arithmetic.trajectory(solved, rng), solved, implied)

def another(q, questions, rng):
    """One of the questions with another answer; None if there is none."""
    others = [o for o in questions if o.answer != q.answer]
    return rng.choice(others) if others else None

def outcomes(model, inner, questions, condition, mode="whole", seed=0, written=None,
             at_theta=None):
    """Answers under a condition -> {theta, theta_prime, in_context: list of bool, right or not;
    implied, implied_in_context: is it what the trajectory implies, where that is not right?}

    written: the trajectories that the model wrote itself, for `own`. at_theta: {question: theta's
    answer, which knows no trajectory}, if it has answered before. {} if there is no trial."""
    rng = random.Random(f"{seed}/{questions[0].text}/{condition}")
    if condition == "own":
        trials = [(q, Trial(t, q)) for q, t in zip(questions, written) if t and text.plain(t)]
    else:
        trials = [(q, trial(q, questions, condition, rng)) for q in questions]
        trials = [(q, t) for q, t in trials if t]
    if not trials:
        return {}
    qs, thinks = [q for q, _ in trials], [t.think for _, t in trials]
    row = {}
    for where in ("theta", "theta_prime", "in_context"):
        if where == "theta_prime" and inner is None:
            continue
        if where == "theta" and at_theta:
            got = [at_theta[q] for q in qs]
        else:
            solved = [t.solved for _, t in trials]
            got = answers(model, qs, thinks, inner, where, mode, solved=solved)
        row[where] = [arithmetic.verify(q, a) for q, a in zip(qs, got)]
        implied = [a == t.implied for (_, t), a in zip(trials, got) if t.implied]
        if implied and where != "theta":
            row["implied" if where == "theta_prime" else "implied_in_context"] = implied
    return row

def meta_test(model, inner, cells, n, mode="whole", seed=0):
    """{domain: {operands: {condition: `outcomes`}}} of n held-out questions a cell."""
    table = {}
    for domain, counts in cells.items():
        for k in counts:
            qs = score.held_out(domain, k, n)
            written = [t for t, _ in score.respond(model, qs)]
            at_theta = dict(zip(qs, answers(model, qs, [""] * len(qs), where="theta")))
            rows = {condition: outcomes(model, inner, qs, condition, mode, seed, written, at_theta)
                    for condition in CONDITIONS}
            rows = {condition: row for condition, row in rows.items() if row}
            table.setdefault(domain, {})[str(k)] = rows
    return table

def show_table(table):
    """Exact match as text, a line a cell and condition."""
    columns = {"theta": 7, "theta_prime": 12, "in_context": 11, "implied": 24}
    titles = ("theta", "theta_prime", "in context", "implied, by theta_prime")
    head = [f"{title:>{width}}" for title, width in zip(titles, columns.values())]
    lines = [f"{'domain':7} {'operands':>8} {'trajectory':16} {' '.join(head)}"]
    for d, ks in table.items():
        for k, conditions in ks.items():
            for name, row in conditions.items():
                shares = [f"{row[key]:>{width}.1%}" if key in row else f"{'-':>{width}}"
                          for key, width in columns.items()]
                lines.append(f"{d:7} {k:>8} {name:16} {' '.join(shares)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- command line

def configure(c, given):
    """Exits 2 with a line where flags contradict each other or make no sense; looks at no file.
    -> c"""
    counts = list(map(str, arithmetic.TRAINED[c.domain]))
    if not set(c.operands.split(",")) <= set(counts):
        fail(f"--operands={c.operands}: {c.domain} is trained on {', '.join(counts)}; a list of "
             "them is expected, such as 3,4")
    if c.algo == "reptile" and c.inner != "whole":
        fail(f"--algo=reptile steps on whole trajectories: leave --inner={c.inner} out")
    return c

def main():
    meta(*flags.flags(Meta))

if __name__ == "__main__":
    command(main)
