"""The instruments of every figure, and the command line that runs experiments with them.

    python analyze.py                            # the tour: trains what is missing, draws, reports
    python analyze.py curve --questions=400      # one experiment, experiments/curve.py
    python analyze.py curve --redraw             # its figure again, from its JSON alone
    python analyze.py --help                     # all experiments

`prefix_nll` is the answer's loss after every token of a trajectory in the context (Algorithm 3),
`explicit_curves` the same for a trajectory in the weights; `exact_patches` turns a context into
weights (Proposition 2.1); `cosines` holds one against the other; `surface` is the loss over a plane
through theta.
"""
from lab import flags                               # first: Ctrl-C from here on is quiet

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import meta
import train
from data import arithmetic, tasks, text
from lab import machine, score
from lab.flags import fail
from lab.run import Run, command

# What runs unasked, on a trained model.
TOUR = ("curve", "explicit", "readout", "patch", "gradient", "landscape", "tokens")
# After so many steps of its training a first curve is drawn, of so many questions; later again.
FIRST_LOOK, FIRST_QUESTIONS = 600, 50


@dataclass
class Analyze:
    """Experiments on a trained model; each writes a figure, its data and a verdict to --out."""
    names: tuple = ()               # ... experiments, or report; none: the tour
    sft: str = "out/sft"            # runs of train.py to look at; the default one is made
    meta: str = "out/meta"          # runs of meta.py to look at; the default one is made
    out: str = "out"                # figures go to OUT/figures, runs of comparisons to OUT/runs
    tag: str = ""                   # a suffix of the figure's name: NAME-TAG
    redraw: bool = False            # draw from OUT/figures/NAME.json, without a model
    questions: int = 200            # [1, 1e5] held-out questions a cell
    cells: str = ""                 # of questions, such as "expr:3,4 sum:5"; empty: as NAME says
    seed: int = 0                   # [0, 1e9] of trajectories and corruptions
    grid: int = 31                  # [1, 1001] landscape: points a side, odd: theta is one of them
    seeds: int = 5                  # [1, 1000] runs an arm, where an experiment trains
    jobs: int = 0                   # [0, 1000] of those at a time; 0: one a CPU core, or one GPU
    arm: tuple = ()                 # compare: an arm's flags; give it once an arm
    device: str = "auto"            # {auto, cpu, cuda} auto: cuda where there is one
    threads: int = 0                # [0, 1000] CPU threads, 0: as many as torch chooses


# ------------------------------------------------------------------------ questions, trajectories

class Cell(NamedTuple):
    """Held-out questions of one domain and size; a list entry a question."""
    questions: list
    thinks: list                    # a correct trajectory, as text
    others: list                    # another question's
    title: str

def cells_of(spec):
    """'expr:3,4 sum:5' -> [(domain, operands)]. Exits 2 with a line for anything else."""
    cells = []
    for part in spec.split():
        domain, _, counts = part.partition(":")
        known = (*arithmetic.TRAINED.get(domain, ()), *arithmetic.OOD.get(domain, ()))
        for k in counts.split(","):
            if k not in map(str, known):
                fail(f"--cells={spec}: {part!r} is not a domain and its operand counts, such as "
                     "expr:3,4")
            cells.append((domain, int(k)))
    if not cells:
        fail("--cells is empty: name some, such as 'expr:3,4 sum:5'")
    return cells

def questions_of(c, domain, operands):
    """Held-out questions, of which at least two have different answers."""
    questions = score.held_out(domain, operands, c.questions)
    if len({q.answer for q in questions}) < 2:
        fail(f"--questions={c.questions}: the controls need two questions with different answers")
    return questions

def cell_of(c, default="expr:4"):
    """The cell of --cells, with its trajectories."""
    cells = cells_of(c.cells or default)
    if len(cells) > 1:
        fail(f"--cells={c.cells}: this experiment looks at one cell only, such as {default}")
    (domain, k), = cells
    questions, rng = questions_of(c, domain, k), random.Random(f"{c.seed}/{domain}/{k}")
    thinks = [arithmetic.trajectory(q, rng) for q in questions]
    others = others_of(questions, thinks, rng)
    title = f"{domain}, {k} operands, {len(questions)} questions"
    return Cell(questions, thinks, others, title)

def others_of(questions, thinks, rng):
    """For every question the trajectory of one that has another answer."""
    pairs = list(zip(questions, thinks))
    return [rng.choice([t for o, t in pairs if o.answer != q.answer]) for q in questions]

def tail_of(q, answer=None):
    """Ids of `</think> a <eos>`."""
    return [text.END_THINK, *text.answer(q.answer if answer is None else answer)]

def as_ids(questions, thinks):
    """-> ids of heads `<bos> q <think>`, of trajectories, of tails `</think> a <eos>`."""
    heads = [text.prompt(q.text) for q in questions]
    return heads, [text.encode(t) for t in thinks], [tail_of(q) for q in questions]

def queries(model, questions, thinks):
    """Rows `<think> t </think> a <eos>` -> (ids, targets: the answer). t = '' asks without a
    trajectory."""
    prompts = [text.prompt(q.text, t) for q, t in zip(questions, thinks)]
    answers = [text.answer(q.answer) for q in questions]
    return text.shifted(prompts, answers, model.head.weight.device)

def row_loss(model, ids, targets, **kw):
    """L_q: mean NLL (nats) of every row's targets -> (B,)."""
    return model.nll(ids, targets, **kw).sum(1) / (targets >= 0).sum(1)

def untrained(model, seed=0):
    """A model of the same shape with random weights, none of them zero."""
    torch.manual_seed(seed)
    new = type(model)(model.config)
    for block in new.blocks:
        for layer in (block.out, block.down):
            torch.nn.init.kaiming_uniform_(layer.weight, a=5 ** 0.5)
    return new.to(model.head.weight.device)


# --------------------------------------------- L_hat, the implicit inner loop (Eq. 4, Algorithm 3)

@torch.no_grad()
def prefix_nll(model, heads, trajectories, tails, width=128):
    """L_hat[i] of the paper's Algorithm 3 for i = 0..|t|, of many sequences, in one pass.

    heads: ids up to <think>; trajectories: ids of t; tails: ids of `</think> a <eos>`. -> list of
    float arrays (|t| + 1,), entry i the mean NLL (nats) of `a <eos>` when the tail follows the
    first i tokens of t.

    One copy of the tail stands behind every prefix as a branch: branch i sees the prefix up to i
    and itself, at positions i+1, i+2, ... The prefix is computed once, into the cache; branches
    follow `width` at a time, so that none pays for the others' columns."""
    device, B = model.head.weight.device, len(heads)
    prefix = text.padded([h + t for h, t in zip(heads, trajectories)], device=device)     # (B, P)
    branch = text.padded([tail[:-1] for tail in tails], device=device)                    # (B, N)
    target = text.padded([tail[1:] for tail in tails], text.IGNORE, device)               # (B, N)
    head = torch.tensor([[len(h)] for h in heads], device=device)
    P, N, J = prefix.size(1), branch.size(1), max(map(len, trajectories)) + 1

    # Slots of the cache: first the branches', then the prefix's.
    W = min(width, J) * N
    cache, at = model.new_cache(B, W + P), torch.arange(P, device=device)
    unseen = torch.zeros(P, W, dtype=torch.bool, device=device)
    causal = torch.cat((unseen, at[:, None] >= at), 1)[None, None]
    model(prefix, mask=causal, cache=cache, slot=slice(W, W + P))

    chunks = []
    for j in range(0, J, width):
        i = torch.arange(j, min(j + width, J), device=device)
        b = i.repeat_interleave(N)                          # every token's branch ...
        n = torch.arange(N, device=device).repeat(len(i))   # ... and its place there
        end = head + b                                      # (B, w N): where its prefix ends
        same_branch = torch.zeros(len(b), W, dtype=torch.bool, device=device)
        same_branch[:, :len(b)] = (b[:, None] == b) & (n[:, None] >= n)
        furthest = int(head.max()) + int(i[-1])
        past = at[:furthest] < end[..., None]
        mask = torch.cat((same_branch.expand(B, -1, -1), past), -1)[:, None]
        nll = model.nll(branch.repeat(1, len(i)), target.repeat(1, len(i)), pos=end + n,
                        cache=cache, mask=mask, slot=slice(0, len(b)))
        chunks.append(nll.view(B, len(i), N).sum(-1))
    curves = torch.cat(chunks, 1) / (target >= 0).sum(1, keepdim=True)
    return [y[:len(t) + 1].cpu().numpy() for y, t in zip(curves, trajectories)]

def curves_of(model, questions, thinks, answers=None, size=64):
    """L_hat of one trajectory text a question -> list of arrays; `answers`: of other answers than
    the true ones."""
    heads, trajectories, tails = as_ids(questions, thinks)
    if answers:
        tails = [tail_of(q, a) for q, a in zip(questions, answers)]
    curves = []
    for i in range(0, len(heads), size):
        part = slice(i, i + size)
        curves += prefix_nll(model, heads[part], trajectories[part], tails[part])
    return curves


# ------------------------------------------------ L_q(theta'_i), the explicit inner loop (Eq. 4)

def explicit_curves(model, inner, questions, thinks, mode="whole", size=128, solved=None):
    """L_q(theta'_i) for i = 0..|t|: theta'_i from the inner loop on the first i tokens, the query
    without any trajectory. The counterpart of `prefix_nll`.

    Every prefix runs its own inner loop, as one more question of a batch (i = 0: theta itself).
    solved: the questions that the trajectories solve, default those asked."""
    with torch.no_grad():
        at_theta = row_loss(model, *queries(model, questions, [""] * len(questions))).tolist()
    curves = [np.full(1 + len(t), first) for first, t in zip(at_theta, thinks)]
    # Prefixes of about one length side by side: little is padded.
    places = sorted((i, k) for k, t in enumerate(thinks) for i in range(1, len(t) + 1))
    solved = solved or questions
    for start in range(0, len(places), size):
        part = places[start:start + size]
        prefixes = [tasks.Task(questions[k], [thinks[k][:i]], solved=solved[k]) for i, k in part]
        fast, query = meta.adapted(model, inner, prefixes, mode)
        with torch.no_grad():
            losses = row_loss(model, query.ids, query.targets, hook=fast).tolist()
        for (i, k), loss in zip(part, losses):
            curves[k][i] = loss
    return curves


# ------------------------------------------------------ a context as weights (Proposition 2.1)

class Layout(NamedTuple):
    """Rows `head t tail[:-1]`, every section padded to a width of its own, so that the tail stands
    at the end, at its true positions."""
    ids: torch.Tensor               # (B, S)
    pos: torch.Tensor               # (B, S)
    real: torch.Tensor              # (B, S) bool: no padding
    t: slice                        # where trajectories stand
    n: int                          # width of the tail

    @property
    def valid(self):
        """(B, n) bool: tokens of the tail."""
        return self.real[:, -self.n:]

    def mask(self, seen):
        """(B, 1, S, S): the tail of a row sees its head, the first seen[row] tokens of its t, and
        itself. With seen < |t| the context shrinks while the tail's positions stay."""
        at = torch.arange(self.ids.size(1), device=self.ids.device)
        in_tail, in_t = at >= self.t.stop, (at >= self.t.start) & (at < self.t.stop)
        late = at - self.t.start >= seen[:, None]                       # (B, S)
        hidden = in_tail[None, :, None] & (in_t & late)[:, None]
        itself = torch.eye(len(at), dtype=torch.bool, device=at.device)
        return ((at[:, None] >= at) & (self.real[:, None] | itself) & ~hidden)[:, None]

    def nothing(self):
        """`seen` of rows that see no trajectory."""
        return torch.zeros_like(self.ids[:, 0])

def layout(model, heads, ts, tails):
    sections = heads, ts, [tail[:-1] for tail in tails]
    starts = [(0, len(h), len(h) + len(t)) for h, t in zip(heads, ts)]
    columns = []
    for k, section in enumerate(sections):
        places = [list(range(start[k], start[k] + len(part)))
                  for start, part in zip(starts, section)]
        ones = [[1] * len(part) for part in section]
        columns.append([text.padded(rows, 0) for rows in (section, places, ones)])
    ids, pos, real = (torch.cat(part, 1).to(model.head.weight.device) for part in zip(*columns))
    H, T, n = (part[0].size(1) for part in columns)
    return Layout(ids, pos, real.bool(), slice(H, H + T), n)


class Patched(NamedTuple):
    """What `exact_patches` found: patches, and the tail's logits (B, n, V)."""
    patches: dict
    full: torch.Tensor              # with the trajectory
    patched: torch.Tensor           # without it, patched
    plain: torch.Tensor             # without either
    valid: torch.Tensor             # (B, n) bool

def patch_hook(patches, n):
    """{layer: (p, z)} as a hook: at the last n positions, position j of a row has the weights
    W + p z^T / |z|^2 of its own. Where z is the number 1, or 0, p is a bias."""
    def hook(name, x, y):
        if name not in patches:
            return y
        p, z = patches[name]
        if z.size(-1) > 1:
            zz = z.square().sum(-1, keepdim=True)
            share = (x[:, -n:] * z).sum(-1, keepdim=True) / zz.clamp(min=torch.finfo(zz.dtype).tiny)
            p = p * torch.where(zz > 0, share, 1)
        return torch.cat((y[:, :-n], y[:, -n:] + p), 1)
    return hook

@torch.no_grad()
def exact_patches(model, heads, ts, tails, seen=None, bias=False, rows=None):
    """The implicit update as weights: {layer: (p (B, n, out), z (B, n, in))}, a rank-1 patch
    dW = p z^T / |z|^2 of every `up` and `down` for each position of the tail; with bias, a vector p
    added behind `down` instead of its patch, z = 1. rows: the sequences, where `layout` is not to
    lay them out. -> Patched

    With them, layer by layer, the tail's logits without the trajectory equal those with its first
    `seen` tokens (2507.16003; 2511.17864): u is the residual that enters the MLP, z = norm(u), h
    the MLP's hidden units, C marks "with trajectory", and

        dW_up = W_up (z_C - z) z^T / |z|^2        dW_down = (u_C - u) h^T / |h|^2

    Where all hidden units are silent, h = 0, no matrix can do it, and u_C - u is added as a bias;
    where they nearly are, the matrix is huge, and a bias always the tamer choice."""
    rows = rows or layout(model, heads, ts, tails)
    n, weight = rows.n, {m: model.get_parameter(p) for m, p in meta.linear_layers(model).items()}
    seen = [len(t) for t in ts] if seen is None else seen
    seen = torch.tensor(seen, device=rows.ids.device)
    with_t, patches, change = {}, {}, {}

    def record(name, x, y):
        with_t[name] = x[:, -n:], y[:, -n:]
        return y

    def patch(name, x, y):
        kind, z = name.split(".")[1], x[:, -n:]
        if kind == "out":                           # below it, patched and full residuals are equal
            change["u"] = with_t[name][1] - y[:, -n:]
        if kind == "up":
            patches[name] = (with_t[name][0] - z) @ weight[name].T, z
        if kind == "down":
            patches[name] = change["u"], torch.ones_like(z[..., :1]) if bias else z
        if kind in ("up", "down"):
            y = patch_hook({name: patches[name]}, n)(name, x, y)
        return y

    def logits(seen, hook):
        h = model(rows.ids, pos=rows.pos, mask=rows.mask(seen), hook=hook)
        return model.logits(h[:, -n:])

    full, patched = logits(seen, record), logits(rows.nothing(), patch)
    return Patched(patches, full, patched, logits(rows.nothing(), None), rows.valid)

def cosines(model, inner, trials, mode="whole"):
    """Cosine between the explicit update of every `up` and `down` (the inner loop's) and the
    implicit patch at </think>, per question.

    trials: (question, trajectory of the explicit update, of the implicit one). Neither matrix is
    built: with dW = -alpha X^T D and z^T p, the inner product is -(z X^T)(D p), and the norms
    follow from X X^T and D D^T. -> {layer: list}, where both are not zero."""
    by_layer = {}
    for q, for_weights, for_context in trials:
        fast, _ = meta.adapted(model, inner, [tasks.Task(q, [for_weights])], mode)
        patches = exact_patches(model, *as_ids([q], [for_context])).patches
        for name in inner.names:
            if name not in patches:
                continue
            X = torch.cat([inner.rate(name, k).detach() * step[name][0][0]
                           for k, step in enumerate(fast.steps)])
            D = torch.cat([step[name][1][0] for step in fast.steps])
            p, z = (v[0, 0] for v in patches[name])
            explicit = ((X @ X.T) * (D @ D.T)).sum().clamp(min=0).sqrt()
            norm = explicit * p.norm() * z.norm()
            if norm > 0:
                by_layer.setdefault(name, []).append(float(-(X @ z) @ (D @ p) / norm))
    return by_layer


# -------------------------------------------------------------- planes through theta (Algorithm 4)

def directions(model, seed):
    """Two random directions of every matrix in the blocks, each row scaled to the norm of the
    weights' row ("per filter", 1712.09913) -> [{layer: (out, in)}]."""
    generator, planes = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        plane = {}
        for name, path in meta.linear_layers(model).items():
            W = model.get_parameter(path).detach()
            d = torch.randn(W.shape, generator=generator).to(W)
            plane[name] = d * W.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True)
        planes.append(plane)
    return planes

def step_along(d, x):
    """What a direction adds to a layer's outputs for inputs x (B, T, in) -> (B, T or n, out).

    d: (out, in), or (n, out, in) for the last n positions, each with weights of its own; in = 1: a
    bias."""
    if d.ndim == 2:
        return x @ d.T
    if d.size(-1) == 1:
        return d[..., 0]
    return torch.einsum("bti,toi->bto", x[:, -d.size(0):], d)

@torch.no_grad()
def surface(model, ids, targets, plane, points, fast=None, size=256, **kw):
    """L_q of every row at theta + a d1 + b d2, (a, b) = points[row], plane = (d1, d2) as in
    `step_along`. fast: around its theta' instead.

    Nothing is added to weights and taken away again: every row carries its own point."""
    losses = []
    for i in range(0, len(points), size):
        at = points[i:i + size]

        def hook(name, x, y):
            y = y if fast is None else fast(name, x, y)
            for k, d in enumerate(plane):
                if name in d:
                    n = d[name].size(0) if d[name].ndim == 3 else x.size(1)
                    move = at[:, k, None, None] * step_along(d[name], x)
                    y = torch.cat((y[:, :-n], y[:, -n:] + move), 1)
            return y
        chunk = {key: v[i:i + size] for key, v in kw.items()}
        losses.append(row_loss(model, ids[i:i + size], targets[i:i + size], hook=hook, **chunk))
    return torch.cat(losses)

def principal(path):
    """A path of weights (points, parameters), the first of them 0 = theta -> (two orthonormal
    directions through theta, coordinates (points, 2), share of the path's squared length that they
    hold)."""
    u, s, _ = torch.linalg.svd(path @ path.T)
    s = s.clamp(min=0).sqrt()
    d = (u[:, :2] / s[:2].clamp(min=1e-12)).T @ path
    return d, path @ d.T, float(s[:2].square().sum() / s.square().sum())


# ---------------------------------------------------------------------------------- command line

class MetaRun(NamedTuple):
    """A run of meta.py."""
    model: object
    inner: meta.Inner
    config: dict

def sft_model(c, device):
    """The model of --sft; the default one is trained first if it is missing."""
    path = Path(c.sft) / "ckpt.pt"
    if not (Path(c.sft) / "summary.json").exists() and c.sft == Analyze.sft:
        half = path.exists()
        print(f"{'going on with' if half else 'training'} the model in {c.sft}")
        words = [f"--out={c.sft}", f"--device={c.device}", *["--resume"] * half]
        Run.look = FIRST_LOOK, lambda: first_look(c, device)
        train.train(*flags.flags(train.Train, words))
        Run.look = None
    model, state = train.load_model(path, device)
    if "style" not in state["config"]:
        fail(f"{path} is a checkpoint, but not one of train.py")
    return model

def first_look(c, device):
    """The tour's first figure: the curve of the model as it stands."""
    import experiments
    if "curve" in (c.names or TOUR):
        model, _ = train.load_model(Path(c.sft) / "ckpt.pt", device)
        few = replace(c, questions=min(c.questions, FIRST_QUESTIONS))
        experiments.run("curve", few, device, {c.sft: model})

def meta_run(c, device):
    """The run of --meta; the default one is trained first if it is missing -> MetaRun"""
    path = Path(c.meta) / "ckpt.pt"
    if not (Path(c.meta) / "summary.json").exists() and c.meta == Analyze.meta:
        begin = "--resume" if path.exists() else f"--init={Path(c.sft) / 'ckpt.pt'}"
        print(f"meta-training into {c.meta}")
        words = [f"--out={c.meta}", f"--device={c.device}", begin]
        meta.meta(*flags.flags(meta.Meta, words))
    model, inner, state = meta.load_meta(path, device)
    if state["config"]["algo"] == "none":
        fail(f"{c.meta} was trained with --algo=none: there is no theta' in it")
    return MetaRun(model, inner, state["config"])

def check_flags(c, known):
    """Refuses, with a line, what no experiment can do anything with."""
    if machine.WORLD > 1:
        fail("analyze.py runs in one process, without torchrun")
    for name in c.names:
        if not c.redraw and name not in (*known, "report"):
            fail(f"there is no experiment {name!r}: choose from {', '.join([*known, 'report'])}")
    if len(set(c.names)) < len(c.names):
        fail("an experiment is named twice")
    if c.cells:
        cells_of(c.cells)
    if c.grid % 2 == 0:
        fail(f"--grid={c.grid} is even, and an even grid does not hold theta itself: take "
             f"{c.grid + 1}")
    if ("compare" in c.names) != bool(c.arm) or len(c.arm) == 1:
        fail('compare needs two arms or more, and nothing else takes any: --arm="--steps=300" '
             '--arm="--steps=300 --style=short"')

def main():
    import experiments                              # the one look forward
    known = experiments.known()
    lines = [f"  {name:12} {line}" for name, line in known.items()]
    epilog = "\n".join(["experiments:", *lines, "", f"the tour: {', '.join(TOUR)}"])
    c, _ = flags.flags(Analyze, epilog=epilog)
    check_flags(c, known)
    if c.redraw:
        experiments.redraw(c)
        return
    device, models = machine.device_of(c), {}
    for name in [name for name in c.names or TOUR if name != "report"]:
        try:
            experiments.run(name, c, device, models)
        except SystemExit as e:                     # it has said why; the others of a tour go on
            if c.names or e.code != 2:
                raise
    experiments.report(c)

if __name__ == "__main__":
    command(main)
