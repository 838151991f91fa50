"""Can weights do without the trajectory what the model does with it? (Proposition 2.1)

some weights do it: logits without the trajectory equal those with it, after a change of every MLP
    matrix that is each position's own (`analyze.exact_patches`), or a bias after `down`; and with
    one theta' for the whole row. The largest error is below 1e-4 in float32 and 1e-10 in float64,
    in an untrained model as well: it is a theorem. In float32 it is a hundred times smaller than
    without a patch, and than with another question's.
the printed proof: its construction, in a random layer, is right to 1e-10.
the rank-1 repair: so is ours.

A margin is the orders of magnitude to spare. Supported where all 95 % intervals lie above 0,
refuted where one lies below, else inconclusive. Whether a patch goes down the loss: see `gradient`.
"""
import copy
import random

import numpy as np
import torch

from analyze import TAIL, exact_patches, patch_hook, tails, untrained
from data import arithmetic, text
from experiments import cell_of
from experiments.figure import panels
from lab.verdict import decide_all

CLAIM = "Prop. 2.1: some weights do without the trajectory what the model does with it"


def measure(c, runs):
    """-> (title, {condition: largest error of the logits, per question}, {construction: relative
    errors of random layers})."""
    model, rng = runs.sft(), random.Random(c.seed)
    questions, title = cell_of(c)
    rows = questions, [arithmetic.trajectory(q, rng) for q in questions]
    double, never = copy.deepcopy(model).double(), untrained(model).double()
    plain, wide, never = (exact_patches(m, *rows) for m in (model, double, never))
    bare = exact_patches(double, *rows, bias=True)
    rolled = {name: (p.roll(1, 0), z.roll(1, 0)) for name, (p, z) in plain.patches.items()}
    other = without_trajectory(model, questions, patch_hook(rolled))
    errors = {
        "no patch": largest(plain.plain, plain.full),
        "another question's patch": largest(other, plain.full),
        "float32": largest(plain.patched, plain.full),
        "float64": largest(wide.patched, wide.full),
        "float64, bias after `down`": largest(bare.patched, bare.full),
        "float64, one theta' per row": largest(one_theta_prime(double, *rows), wide.full),
        "float64, untrained model": largest(never.patched, never.full)}
    return title, errors, proposition()

def largest(a, b):
    """The largest difference of rows' logits (B, TAIL, V) -> an array (B,)."""
    return (a - b).abs().amax((1, 2)).double().cpu().numpy()

@torch.no_grad()
def without_trajectory(model, questions, hook):
    """The tail's logits (B, TAIL, V)."""
    ids, mask = tails(model, questions, [""] * len(questions))
    return model.logits(model(ids, mask=mask, hook=hook)[:, -TAIL:])

@torch.no_grad()
def one_theta_prime(model, questions, thinks):
    """The tail's logits (B, TAIL, V) without the trajectory, from weights theta' that all tokens of
    the row share, the question's included, and that equal theta but for every `up` and `down`.

    Layer by layer, dW is the smallest matrix that makes the wanted changes Y (T, out), 0 at the
    question's tokens, of inputs Z (T, in): dW^T = Z^+ Y. That takes inputs of the tail that do not
    depend linearly on the others. Hidden units may all be silent: the n-th token wakes the n-th."""
    ids, mask = tails(model, questions, thinks)
    real = tails(model, questions, [""] * len(questions))[0] != text.PAD        # (B, T)
    with_t, change = {}, {}

    def record(name, x, y):
        with_t[name] = y[:, -TAIL:]
        return y

    def patch(name, x, y):
        kind, wanted = name.split(".")[1], with_t[name] - y[:, -TAIL:]
        if kind in ("qkv", "out"):
            change[kind] = wanted
            return y
        if kind == "up":
            wake = torch.eye(TAIL, y.size(-1), dtype=y.dtype, device=y.device)
            wanted += wake * (1 - with_t[name]).clamp(min=0)
        else:
            wanted += change["out"]
        Z, Y = x * real[..., None], torch.zeros_like(y)
        Y[:, -TAIL:] = wanted
        return y + Z @ (torch.linalg.pinv(Z) @ Y)

    model(ids, mask=mask, hook=record)
    return without_trajectory(model, questions, patch)


# --------------------------------------------------- Proposition 2.1 in its own setting (Eqs. 5-19)

def attend(q, K, Wq, Wk, Wv):
    """The attention of Eqs. 5, 6, for row vectors. The MLP after it stays as it is (Eq. 10)."""
    return (q @ Wq @ (K @ Wk).T).softmax(-1) @ K @ Wv

def proposition(n=200, width=32, words=8, seed=0):
    """Tries the proposition in random layers, float64 -> {construction: n errors}, each relative to
    the change by a token t_0 that new weights should reproduce: 1 is as bad as doing nothing."""
    generator, errors = torch.Generator().manual_seed(seed), {}

    def new(rows):
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    for _ in range(n):
        E, t, layer = new(words), new(1), [new(width) / width ** 0.5 for _ in range(3)]
        before, after = attend(E[-1:], E, *layer), attend(t, torch.cat((E, t)), *layer)
        for name, changed in constructions(E, t, *layer).items():
            error = (attend(E[-1:], E, *changed) - after).norm() / (after - before).norm()
            errors.setdefault(name, []).append(float(error))
    return errors

def constructions(E, t, Wq, Wk, Wv):
    """{construction: new weights}: the proof's (Eqs. 13-19; the product of Eq. 19 does not
    type-check, so M stands between E^+ and M^T), the same with E_last P = t, and a change of W_v
    alone, with a the attended input and o the output after t."""
    last, one = E[-1:], torch.eye(len(Wq), dtype=E.dtype)
    C = t @ torch.linalg.pinv(E)                                        # (1, |l|), Eq. 16
    M = torch.cat((torch.eye(len(E), dtype=E.dtype), C.T), 1)           # (|l|, |l| + 1)
    through = torch.linalg.pinv(E) @ M @ M.T @ E                        # Eq. 19
    P_printed = t.T @ last / t.square().sum()                           # Eq. 13: t P = E_last
    P_mended = last.T @ t / last.square().sum()
    a, o = attend(last, E, Wq, Wk, one), attend(t, torch.cat((E, t)), Wq, Wk, Wv)
    return {"as printed": (P_printed @ Wq, through @ Wk, through @ Wv),
            "P the other way round": (P_mended @ Wq, through @ Wk, through @ Wv),
            "rank-1 repair": (Wq, Wk, Wv + a.T @ (o - a @ Wv) / a.square().sum())}


def judge(raw):
    title, errors, layers = raw
    e = {name: np.log10(np.maximum(v, 1e-30)) for name, v in (errors | layers).items()}
    margins = {f"{name}: below {limit:g}": np.log10(limit) - e[name]
               for kind, limit in (("float32", 1e-4), ("float64", 1e-10))
               for name in errors if kind in name}
    for name in ("no patch", "another question's patch"):
        margins[f"{name}: above 100 times float32"] = e[name] - e["float32"] - 2
    verdicts, gaps = decide_all({"some weights do it": margins,
                                 "the printed proof": {"below 1e-10": -10 - e["as printed"]},
                                 "the rank-1 repair": {"below 1e-10": -10 - e["rank-1 repair"]}})
    rounded = {name: {what: [float(f"{x:.3g}") for x in row] for what, row in rows.items()}
               for name, rows in (("errors", errors), ("proposition", layers))}
    return verdicts, {"title": title, "gaps": gaps} | rounded


def draw(numbers):
    fig, *axes = panels(2, 4.8, 3.2)
    texts = {"errors": ("largest error of the logits",
                        f"Patched weights need no trajectory\n{numbers['title']}", (1e-4, 1e-10)),
             "proposition": ("error / the change to be made",
                             "As printed it fails, repaired it is exact\n200 random layers", (1,))}
    for ax, (name, (xlabel, title, lines)) in zip(axes, texts.items()):
        rows = dict(reversed(numbers[name].items()))
        ax.boxplot([np.maximum(v, 1e-17) for v in rows.values()], orientation="horizontal",
                   tick_labels=list(rows), widths=0.6, flierprops={"markersize": 2})
        ax.set(xscale="log", xlabel=xlabel, title=title)
        for x in lines:
            ax.axvline(x, color="#999999", lw=0.8, ls=":")
    return fig
