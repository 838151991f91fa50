"""Is the trajectory's implicit update a gradient step on L_q? (Eq. 4, which asserts it)

The exact patch dW_i makes the weights answer without a trajectory as they do behind its first i
tokens. Here: the cosine of each increment dW_{i+1} - dW_i, for all tokens of a correct trajectory,
with -grad L_q at theta + dW_i. The answer keeps its true places, i tokens behind <think> for dW_i,
without the trajectory too, so that L_q there is L_hat[i] of `curve`. From i to i + 1 two things
change, then: a token more is read, and the answer stands one place further on.

A cosine above 0 says little more than that the loss falls: roughly, it is the fall over the norms
of increment and gradient. So conditions are compared at equal falls L_hat[i] - L_hat[i+1]: above
0.3 nats and in bins, each counting as often as both conditions have tokens there. Controls: the
trajectory's tokens shuffled; another question's trajectory; and an untrained model at the same
tokens, whatever its loss does, since it never falls so far.

Nor is the patch unique. Two of the exact family, each in the weights that it moves:
    every layer     a rank-1 change of every `up`, a bias behind every `down`
    last bias       a bias behind the last block, and nothing else

aligned: the cosine is above 0, and above every control at equal falls.
a gradient step: at such falls it is above 0.5.

Supported where all 95 % bootstrap intervals over questions lie above 0 for both patches, refuted
where one lies below for both, else inconclusive; not testable here where too few losses fall so
far. The yardstick, without a verdict: the cosine of a question's gradient at theta with another's,
which a step of SGD follows, and with the mean of all others', which it estimates. (Against the loss
of 2507.16003, linear in W and defined by these increments themselves, the cosine is 1.)
"""
import random
from typing import NamedTuple

import numpy as np
import torch

from analyze import Layout, as_ids, cell_of, exact_patches, layout, patch_hook, untrained
from data import text
from lab.figure import COLOURS, INK, band, panels, whiskers, zero_line
from lab.verdict import bootstrap, decide, interval, spoken

CLAIM = "Eq. 4: the exact patch of a trajectory's token lies along -grad L_q"
MEMBERS = ("every layer", "last bias")
CONDITIONS = {"trained": COLOURS["correct"], "shuffled": COLOURS["filler"],
              "another question's": COLOURS["other"], "untrained": COLOURS["light"]}
YARDSTICKS = {"another's gradient": ":", "mean of all others'": "--"}
FALL = (0.3, 0.45, 0.7, 1.1, 1.7, 99)       # bins of falls that count as equal, nats a token
BINS = (-99, -0.7, -0.3, -0.1, 0, 0.1, *FALL)
ENOUGH = 20                                 # tokens, to compare anything


# --------------------------------------------------------------------------------------- measure

class Tokens(NamedTuple):
    """Of every token, (K,) each."""
    question: np.ndarray                    # the number of its question
    fall: np.ndarray                        # L_hat[i] - L_hat[i+1]
    cosine: dict                            # {member: ...}


def measure(c, model):
    """-> (title, {condition: Tokens}, {member: {yardstick: cosines, one a question}})"""
    cell, rng = cell_of(c), random.Random(c.seed)
    shuffled = ["".join(rng.sample(t, len(t))) for t in cell.thinks]
    trials = {
        "trained": (model, cell.thinks), "shuffled": (model, shuffled),
        "another question's": (model, cell.others), "untrained": (untrained(model), cell.thinks)}
    found = {name: tokens(m, cell.questions, thinks) for name, (m, thinks) in trials.items()}
    return cell.title, found, yardsticks(model, cell.questions[:200])

def tokens(model, questions, thinks, size=25):
    rows = []
    for j in range(0, len(thinks), size):
        rows += increments(model, questions[j:j + size], thinks[j:j + size])
    question = np.repeat(np.arange(len(rows)), [len(t) for t in thinks])
    fall, *cosines = np.concatenate(rows, 1)
    return Tokens(question, fall, dict(zip(MEMBERS, cosines)))

def increments(model, questions, thinks):
    """-> [(3, |t|) array a question: its tokens' falls, cosines of both members].

    Every position of an answer has weights of its own, where an increment meets -D z^T, the
    gradient of that answer's summed NLL."""
    heads, ts, tails = as_ids(questions, thinks)
    rows = branches(model, heads, ts, tails)
    patches, outputs, nll, gradients = at_patched(model, rows, heads, ts, tails)
    losses = rows.by_copy(nll).sum(-1) / rows.by_copy(rows.valid)[:, :1].sum(-1)        # (B, J)
    every = sum(products(rows, *patch, gradients[name]) for name, patch in patches.items())
    last = list(patches)[-1]
    bias = products(rows, *last_bias(model, rows, outputs), gradients[last])
    falls = losses[:, :-1] - losses[:, 1:]
    table = torch.stack((falls, cosine(*every), cosine(*bias))).double().cpu().numpy()
    return [table[:, row, :len(t)] for row, t in enumerate(ts)]


class Branches(Layout):
    """Rows `head t tail tail ...`, a copy of the tail behind every prefix of t: copy i, at the
    places behind i tokens, sees the head, of t at most the first i, and itself."""

    def by_copy(self, x):
        """(B, n, ...) -> (B, J, N, ...)"""
        return x.unflatten(1, (self.t.stop - self.t.start + 1, -1))

    def mask(self, seen):
        at = torch.arange(self.ids.size(1), device=self.ids.device)
        width = self.by_copy(self.valid).size(-1)
        copy = (at - self.t.stop).div(width, rounding_mode="floor")     # below 0: no copy
        read = at - self.t.start < copy[:, None]
        own = copy[:, None] == copy
        return super().mask(seen) & (read | own | (copy < 0)[:, None])

def branches(model, heads, ts, tails):
    rows = layout(model, heads, ts, tails)
    N, J = rows.n, rows.t.stop - rows.t.start + 1
    ids, pos, real = (torch.cat((x[:, :-N], x[:, -N:].repeat(1, J)), 1) for x in rows[:3])
    i = torch.arange(J, device=ids.device).repeat_interleave(N)
    whole = torch.tensor([[len(t)] for t in ts], device=ids.device)
    pos[:, -J * N:] += i - whole
    real[:, -J * N:] &= i <= whole
    return Branches(ids, pos, real, rows.t, J * N)


def at_patched(model, rows, heads, ts, tails):
    """The answer at theta + dW_i, without a trajectory -> {layer: patch (p, z)}, {layer: outputs
    (B, S, out)}, NLL of its tokens (B, n), {layer: the gradient D at its outputs (B, n, out)}"""
    patches = exact_patches(model, heads, ts, tails, bias=True, rows=rows).patches
    h, outputs = without_trajectory(model, rows, patches)
    targets = text.padded([tail[1:] for tail in tails], text.IGNORE, h.device)
    nll = model.score(h, targets.repeat(1, rows.n // targets.size(1)))
    found = torch.autograd.grad(nll.sum(), list(outputs.values()))
    gradients = {name: D[:, -rows.n:] for name, D in zip(outputs, found)}
    return patches, outputs, nll.detach(), gradients

def without_trajectory(model, rows, patches):
    """-> the tail's hidden states (B, n, C), {layer: its outputs}"""
    change, outputs = patch_hook(patches, rows.n), {}

    def keep(name, x, y):
        outputs[name] = change(name, x, y)
        return outputs[name]

    h = model(rows.ids, pos=rows.pos, mask=rows.mask(rows.nothing()), hook=keep)
    return h[:, -rows.n:], outputs

@torch.no_grad()
def last_bias(model, rows, patched):
    """A bias alone behind the last block -> (b (B, n, C), 1): what all blocks write at the patched
    weights, and so with the trajectory, less what they write without either."""
    _, plain = without_trajectory(model, rows, {})
    writes = [name for name in plain if name.endswith((".out", ".down"))]
    b = sum(patched[name] - plain[name] for name in writes)[:, -rows.n:]
    return b, torch.ones_like(b[..., :1])

def products(rows, p, z, D):
    """Of one layer's increments, from dW_i = p z^T / |z|^2 to the next, r y^T / |y|^2, and its
    -gradients at i: the inner product and both squares, summed over an answer -> (3, B, J - 1)"""
    p = rows.by_copy(p / dot(z, z).clamp(min=1e-30)[..., None])
    z, D, valid = rows.by_copy(z), rows.by_copy(D)[:, :-1], rows.by_copy(rows.valid)[:, :-1]
    p, r, z, y = p[:, :-1], p[:, 1:], z[:, :-1], z[:, 1:]
    along = dot(p, D) * dot(z, z) - dot(r, D) * dot(y, z)
    squared = dot(p, p) * dot(z, z) + dot(r, r) * dot(y, y) - 2 * dot(p, r) * dot(z, y)
    gradient = dot(D, D) * dot(z, z)
    sums = [(v * valid).sum(-1) for v in (along, squared.clamp(min=0), gradient)]
    return torch.stack(sums)

def dot(a, b):
    return (a * b).sum(-1)

def cosine(along, squared, gradient):
    return along / (squared * gradient).sqrt().clamp(min=1e-30)

def yardsticks(model, questions):
    """Cosines of every question's gradient at theta with those of the others, of the weights that a
    member moves, at an answer's positions as there -> {member: {yardstick: one a question}}"""
    sequences = as_ids(questions, [""] * len(questions))
    # Patches of no trajectory are 0; z is what the layer takes in, 1 for a bias.
    patches, _, _, gradients = at_patched(model, layout(model, *sequences), *sequences)
    grams = []
    for name, (_, z) in patches.items():
        matrices = torch.einsum("qno,qni->qoi", gradients[name], z).flatten(1)
        grams.append((matrices @ matrices.T).double().cpu().numpy())
    return {"every layer": with_others(sum(grams)), "last bias": with_others(grams[-1])}

def with_others(gram):
    """From the inner products of any two gradients."""
    square, whole = gram.diagonal(), gram.sum(1)
    cosines = gram / np.sqrt(np.outer(square, square))
    rest = gram.sum() - 2 * whole + square                  # |sum of all others'|^2
    return dict(zip(YARDSTICKS, ((cosines.sum(1) - 1) / (len(gram) - 1),
                                 (whole - square) / np.sqrt(square * rest))))


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    title, found, yardstick = raw
    aligned = verdict_of({member: margins_aligned(found, member) for member in MEMBERS})
    step = verdict_of({member: margins_step(found, member) for member in MEMBERS})
    numbers = {
        "gaps": {"aligned": aligned[1], "a gradient step": step[1]}, "title": title,
        "tokens": {name: len(v.fall) for name, v in found.items()},
        "tokens above 0.3 nats": {n: int((v.fall > FALL[0]).sum()) for n, v in found.items()}}
    for member in MEMBERS:
        numbers[member] = {
            "all tokens": {name: mean_above(BINS[0], v, member) for name, v in found.items()},
            "above 0.3 nats": {name: mean_above(FALL[0], v, member) for name, v in found.items()},
            "by fall": {name: by_fall(v, member) for name, v in found.items()},
            "SGD": {name: interval(v) for name, v in yardstick[member].items()}}
    return spoken({"aligned": aligned[0], "a gradient step": step[0]}), numbers

def verdict_of(members):
    """{member: margins} -> (the verdict that all of them agree on, {member: intervals})"""
    pairs = [rows for margins in members.values() for rows in margins.values()]
    if min(in_common(rows).sum() for rows in pairs) < ENOUGH:
        return "not testable here", {}
    decided = {member: decide(margins, gap) for member, margins in members.items()}
    verdicts = {verdict for verdict, _ in decided.values()}
    agreed = verdicts.pop() if len(verdicts) == 1 else "inconclusive"
    return agreed, {member: intervals for member, (_, intervals) in decided.items()}

def margins_aligned(found, member):
    """{condition: Tokens} -> margins for `gap`"""
    trained, cosine = found["trained"], {name: v.cosine[member] for name, v in found.items()}
    own = by_bin(trained, cosine["trained"])
    controls = {
        "0": by_bin(trained, np.zeros(len(trained.fall))),
        "shuffled": by_bin(found["shuffled"], cosine["shuffled"]),
        "another question's": by_bin(found["another question's"], cosine["another question's"]),
        "untrained, same tokens": by_bin(trained, cosine["untrained"])}
    return {f"above {name}": np.stack((own, rows), 1) for name, rows in controls.items()}

def margins_step(found, member):
    trained = found["trained"]
    half = by_bin(trained, np.full(len(trained.fall), 0.5))
    return {"above 0.5": np.stack((by_bin(trained, trained.cosine[member]), half), 1)}

def by_bin(tokens, values, edges=FALL):
    """-> (questions, 2, bins): sums of a question's values in bins of falls, and how many."""
    bins = np.arange(tokens.question.max() + 2), edges
    sums, counts = (np.histogram2d(tokens.question, tokens.fall, bins, weights=w)[0]
                    for w in (values, None))
    return np.stack((sums, counts), 1)

def gap(pairs, axis=0):
    """(questions, 2: a condition and its control, 2, bins) -> how much larger its mean cosine is at
    equal falls, over bins that count as often as both have tokens there."""
    means, weight = mean_of(pairs, axis), in_common(pairs, axis)
    gaps = means[..., 0, :] - means[..., 1, :]
    return (weight * gaps).sum(-1) / np.maximum(weight.sum(-1), 1)

def in_common(pairs, axis=0):
    """How many tokens a bin has on the side that has fewer."""
    return pairs[..., 1, :].sum(axis).min(-2)

def mean_of(rows, axis=0):
    """Rows of `by_bin` -> a mean a bin"""
    sums = rows.sum(axis)
    return sums[..., 0, :] / np.maximum(sums[..., 1, :], 1)

def mean_above(fall, tokens, member):
    rows = by_bin(tokens, tokens.cosine[member], (fall, FALL[-1]))              # a single bin
    rows = rows[rows[:, 1, 0] > 0]
    return interval(rows, lambda rows, axis: mean_of(rows, axis)[..., 0])

def by_fall(tokens, member):
    """The curve of mean cosines over falls, where there are enough tokens."""
    rows = by_bin(tokens, tokens.cosine[member], BINS)
    falls, there = mean_of(by_bin(tokens, tokens.fall, BINS)), rows[:, 1].sum(0) >= ENOUGH
    curve = zip(("fall", "mean", "low", "high"), (falls, *bootstrap(rows, mean_of, draws=500)))
    return {key: np.round(v[there], 4).tolist() for key, v in curve}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    """The curves of both patches, each beside SGD; and both at once."""
    fig, ((*axes, both),) = panels(1, 3, width=4.6, heights=[3.8], width_ratios=(1, 1, 0.7))
    for i, (ax, member) in enumerate(zip(axes, MEMBERS)):
        for name, curve in numbers[member]["by fall"].items():
            band(ax, curve, CONDITIONS[name], name, "o-", x=curve["fall"])
        for k, (name, row) in enumerate(numbers[member]["above 0.3 nats"].items()):
            if row:
                whiskers(both, [i + 0.1 * k], [row], CONDITIONS[name])
        for name, (mean, _, _) in numbers[member]["SGD"].items():
            ax.axhline(mean, ls=YARDSTICKS[name], color=INK, lw=1, label=f"SGD: {name}")
            both.plot([i - 0.1, i + 0.4], [mean] * 2, YARDSTICKS[name], color=INK, lw=1)
        ax.axvline(FALL[0], color="#cccccc", lw=0.8, zorder=0)
        ax.set(title=f"the patch: {member}", xlabel="fall of $L_q$ by a token (nats a token)")
        zero_line(ax)
    axes[0].set(ylabel=r"cosine of a token's update and $-\nabla L_q$")
    axes[0].legend(fontsize=7)
    both.axhline(0.5, color=COLOURS["wrong"], lw=1, label="a gradient step")
    both.set(xticks=[0.15, 1.15], xticklabels=MEMBERS, ylim=(0, 0.55))
    both.set(title=f"falls above 0.3 nats\n{numbers['title']}")
    both.legend(fontsize=7)
    return fig
