"""Is what a token of the trajectory does to the weights a gradient step on L_q? (Eq. 4 itself)

With the exact patch dW_i (`patch`) weights answer without a trajectory as they do after i of its
tokens. By Eq. 4, dW_{i+1} - dW_i lies along -grad L_q at theta + dW_i. Here is their cosine, for
every token of a correct trajectory, in the weights of `</think>`, which reads the answer off. Two
exact patches: every layer (each `up`, a bias after each `down`), last bias (after all blocks).

aligned: for tokens that lower L_q by more than 0.3 nats the cosine is above 0, which says little
    more than that the loss falls; and above that of an untrained model at the same tokens; and
    above that at equal falls (the next larger one, by a tenth at most) along the trajectory's
    tokens shuffled, and along another question's trajectory.
a gradient step: for the same tokens the cosine is above 0.5.

Supported where all 95 % intervals over questions lie above 0 for both patches, refuted where one
lies below for both, else inconclusive; not testable here where too few losses fall so far. Black
lines: the cosine of a question's gradient with another's, and with that of all others together.
"""
import random

import numpy as np
import torch

from analyze import untrained
from data import arithmetic, text
from experiments import cell_of, others_of
from experiments.figure import BESIDE, COLOURS, INK, band, panels
from lab.verdict import decide_all, interval

CLAIM = "Eq. 4: the exact patch of a trajectory's token lies along -grad L_q"
MEMBERS = ("every layer", "last bias")
COLOUR = {"trained": "correct", "untrained": "light", "shuffled": "filler", "another's": "other"}
LEAST = 0.3                                 # nats: a fall that counts


def measure(c, runs):
    """-> (title, {condition: an array (4, tokens): the number of its question, its fall
    L_hat[i] - L_hat[i+1], a cosine for each member}, {member: {yardstick: one per question}})"""
    model, rng = runs.sft(), random.Random(c.seed)
    questions, title = cell_of(c)
    thinks = [arithmetic.trajectory(q, rng) for q in questions]
    trials = {"trained": (model, thinks), "untrained": (untrained(model), thinks),
              "shuffled": (model, ["".join(rng.sample(t, len(t))) for t in thinks]),
              "another's": (model, others_of(questions, thinks, rng))}
    found = {}
    for name, (m, ts) in trials.items():
        rows = []
        for i, (q, t) in enumerate(zip(questions, ts)):
            layers, nll = at_patched(m, q, t)
            rows.append([np.full(len(t), i), -np.diff(nll), *map(cosine, layers.values())])
        found[name] = np.concatenate(rows, 1)
    found["untrained"][1] = found["trained"][1]         # it is held against the same tokens
    return title, found, yardsticks(model, questions)

def at_patched(model, q, think):
    """Asks at theta + dW_i, without a trajectory, for all N prefixes of one -> ({member: [p (N,
    out), z (N, in), gradient D at the outputs (N, out), of every layer]}, NLL (N,)). dW is p z^T,
    in `last bias` but for a constant. All stands in one row: an aside after every token, then as
    many that see the question alone, to be patched as in `analyze.exact_patches`."""
    head, trunk, n = text.prompt(q.text), text.prompt(q.text) + text.encode(think), len(think) + 1
    places = [*range(len(head), len(trunk) + 1), *[len(head)] * n]
    batch = text.batch([text.asked_after(trunk, places)], model.device)
    first, bare, end = (batch.trunk + i * n for i in range(3))      # of the two kinds of asides
    wanted, layers, outputs = {}, [], []

    def patch(name, x, y):
        block, kind = name.split(".")
        z, lack = x[0, bare:end], (y[0, first:bare] - y[0, bare:end]).detach()
        wanted[name] = y[0, first:bare].detach(), lack
        if kind in ("qkv", "out"):
            return y
        if kind == "down":
            z, lack = torch.ones_like(z[:, :1]), wanted[f"{block}.out"][1]
        p = lack / z.detach().square().sum(1, keepdim=True)
        layers.append((p, z.detach()))
        outputs.append(y[0, bare:end] + (z * z.detach()).sum(1, keepdim=True) * p)
        return torch.cat((y[:, :bare], outputs[-1][None], y[:, end:]), 1)

    h = model(**batch.inputs(), hook=patch)[0, bare:end]
    nll = -model.logits(h).log_softmax(-1)[:, int(q.answer)]
    gradients = torch.autograd.grad(nll.sum(), outputs)
    every = [[v.double() for v in (*layer, D)] for layer, D in zip(layers, gradients)]
    bias = sum(y.double() for name, (y, _) in wanted.items() if name.endswith((".out", ".down")))
    return dict(zip(MEMBERS, (every, [[bias, *every[-1][1:]]]))), nll.detach().cpu().numpy()

def inner(layers, i, j):
    """Inner products (N, N) of matrices p z^T (0) or D z^T (2): (p . r)(z . y) for p z^T, r y^T."""
    return sum(layer[i] @ layer[j].T * (layer[1] @ layer[1].T) for layer in layers).cpu().numpy()

def cosine(layers):
    """Of dW_{i+1} - dW_i with the -gradient at i -> an array (N - 1,)."""
    K, C, G = inner(layers, 0, 0), inner(layers, 0, 2), inner(layers, 2, 2)
    along = C.diagonal()[:-1] - C.diagonal(-1)
    squared = K.diagonal()[1:] + K.diagonal()[:-1] - 2 * K.diagonal(1)
    return along / np.sqrt(np.maximum(squared * G.diagonal()[:-1], 1e-60))

def yardsticks(model, questions):
    """Cosines of gradients at theta -> {member: {with whose: one per question}}"""
    rows, found = [at_patched(model, q, "")[0] for q in questions], {}
    for member in MEMBERS:
        layers = zip(*(row[member] for row in rows))
        G = inner([[torch.cat(part) for part in zip(*layer)] for layer in layers], 2, 2)
        square, others = G.diagonal(), G.sum(1) - G.diagonal()
        rest = G.sum() - 2 * others - square                    # |sum of all others'|^2
        each = (G / np.sqrt(np.outer(square, square))).sum(1) - 1
        found[member] = {"another's gradient": each / (len(G) - 1),
                         "all others' gradient": others / np.sqrt(square * rest)}
    return found


def judge(raw):
    title, found, yardstick = raw
    verdicts, numbers = {}, {"title": title, "gaps": {}}
    decided = [decide_all(margins(found, k)) for k in (0, 1)]
    for part, one in decided[0][0].items():
        verdicts[part] = one if one == decided[1][0][part] else "inconclusive"
        numbers["gaps"][part] = {f"{member}, {name}": gap for member, (_, gaps) in
                                 zip(MEMBERS, decided) for name, gap in gaps[part].items()}
    for k, member in enumerate(MEMBERS):
        curves = {}
        for name, rows in found.items():
            groups = np.array_split(rows[[1, 2 + k]][:, np.argsort(rows[1])], 12, 1)
            curves[name] = {"fall": [round(float(fall.mean()), 4) for fall, _ in groups],
                            "cosine": [interval(cosines) for _, cosines in groups]}
        numbers[member] = {
            "by fall": curves, "SGD": {name: interval(v) for name, v in yardstick[member].items()}}
    return verdicts, numbers

def margins(found, k):
    """{condition: (4, tokens)} -> {part: {margin of member k: a mean per question}}"""
    number, fall, own = found["trained"][[0, 1, 2 + k]]

    def gap(control):
        """How much larger the cosine is, over a question's tokens that can be compared."""
        gaps, there = own - control, (fall > LEAST) & ~np.isnan(own - control)
        return np.array([gaps[there & (number == i)].mean() for i in np.unique(number[there])])

    aligned = {f"above {name}": gap(partners(fall, rows[1], rows[2 + k]))
               for name, rows in found.items() if name != "trained"}
    return {"aligned": aligned | {"above 0": gap(0)}, "a gradient step": {"above 0.5": gap(0.5)}}

def partners(fall, falls, cosines):
    """Cosines of a control's tokens with the next larger falls; NaN: over a tenth larger."""
    order = np.argsort(falls)
    near = order[np.searchsorted(falls[order], fall).clip(max=len(order) - 1)]
    above = falls[near] - fall
    return np.where((above >= 0) & (above <= 0.1 * fall), cosines[near], np.nan)

def draw(numbers):
    fig, *axes = panels(2, 5, 3.8)
    axes[1].axhline(0.5, color=COLOURS["wrong"], lw=1, label="a gradient step")
    for ax, member in zip(axes, MEMBERS):
        for name, curve in numbers[member]["by fall"].items():
            band(ax, curve["fall"], curve["cosine"], COLOURS[COLOUR[name]], name, "o-")
        for style, (name, (mean, _, _)) in zip(":-", numbers[member]["SGD"].items()):
            ax.axhline(mean, ls=style, color=INK, lw=1, label=f"SGD: {name}")
        ax.axvline(LEAST, color="#cccccc", lw=0.8, zorder=0)
        ax.set(title=f"{member.capitalize()}: a step down the gradient?\n{numbers['title']}",
               xlabel="fall of $L_q$ by the token (nats)", ylabel=r"cosine with $-\nabla L_q$")
        ax.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes[1].legend(**BESIDE)
    return fig
