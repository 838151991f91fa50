"""Can weights do without the trajectory what the model does with it? (Proposition 2.1)

`analyze.exact_patches` replaces the trajectory by a rank-1 change of every MLP matrix, or a bias
where every hidden unit is silent, layer by layer and another one for every position of the answer.
`one_theta_prime` finds a single theta' for the whole row, which is the proposition itself.
`proposition` tries the paper's own construction in its own setting, as printed and mended.

Supported if the largest error of the answer's logits is below 1e-4 in float32 and 1e-10 in float64,
for a theta' a position and for the single one, and a hundred times smaller than both the unpatched
error and that of another question's patch: mean orders of magnitude to spare, 95 % intervals above
0; refuted if one lies below 0. It holds for an
untrained model as well: a theorem on what weights can do, not on what they were trained for.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from analyze import as_ids, cell_of, exact_patches, layout, patch_hook, untrained
from lab.figure import COLOURS, boxes, panels, whiskers
from lab.flags import fail
from lab.verdict import decide, interval
from meta import linear_layers

CLAIM = "Prop. 2.1: some weights do without the trajectory what the model does with it"
LABELS = {
    "float32": "patched, float32", "float64": "patched, float64",
    "float64, bias": "bias behind `down`\ninstead, float64",
    "float64, one theta'": "one $\\theta'$ for\nall, float64",
    "untrained, float64": "untrained model,\npatched, float64",
    "unpatched": "unpatched", "other": "another\nquestion's patch"}
CONSTRUCTIONS = {
    "printed": "as printed", "direction mended": "direction of P\nmended",
    "rank-1 repair": "rank-1 repair\nof $W_v$"}


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    title: str
    errors: dict                            # {condition: largest error of the logits, a question}
    proposition: dict                       # {construction: errors of random layers}
    sizes: dict                             # {layer: |dW| / |W|, a question that has a dW}
    silent: dict                            # {layer: does it need a bias instead? a question}
    ranks: dict                             # {layer: effective rank of all questions' patches}


def measure(c, model):
    if torch.get_float32_matmul_precision() != "highest":
        fail("a patch is exact in full float32 only: TF32 would refute a theorem")
    cell = cell_of(c)
    ids = as_ids(cell.questions, cell.thinks)
    double = type(model).load(model.state()).double().to(model.head.weight.device)
    bare = exact_patches(double, *ids, bias=True)
    wide, plain = exact_patches(double, *ids), exact_patches(model, *ids)
    never = exact_patches(untrained(model).double(), *ids)
    errors = {
        "float64, bias": largest(bare.patched, bare.full, bare.valid),
        "float64, one theta'": largest(one_theta_prime(double, *ids), wide.full, wide.valid),
        "float64": largest(wide.patched, wide.full, wide.valid),
        "float32": largest(plain.patched, plain.full, plain.valid),
        "unpatched": largest(plain.plain, plain.full, plain.valid),
        "other": swapped(model, ids, plain),
        "untrained, float64": largest(never.patched, never.full, never.valid)}
    return Raw(cell.title, errors, proposition(), *at_the_delimiter(model, plain.patches))

def largest(a, b, valid):
    """Largest error of every row's logits, over the answer's positions."""
    return ((a - b).abs().amax(-1) * valid).amax(-1).double().cpu().numpy()

@torch.no_grad()
def swapped(model, ids, plain):
    """The error with every question's patch given to the next one."""
    rows = layout(model, *ids)
    rolled = {name: (p.roll(1, 0), z.roll(1, 0)) for name, (p, z) in plain.patches.items()}
    h = model(rows.ids, pos=rows.pos, mask=rows.mask(rows.nothing()),
              hook=patch_hook(rolled, rows.n))
    wrong = model.logits(h[:, -rows.n:])
    return largest(wrong, plain.full, rows.valid & rows.valid.roll(1, 0))

def at_the_delimiter(model, patches):
    """Patches at </think>, where the answer's first digit is chosen -> ({layer: |dW| / |W|, a
    question that has one}, {layer: has it none? a question}, {layer: effective rank
    (sum s)^2 / sum s^2 of the questions' patches})"""
    sizes, silent, ranks = {}, {}, {}
    paths = linear_layers(model)
    for name, (p, z) in patches.items():
        p, z, W = p[:, 0], z[:, 0], model.get_parameter(paths[name]).detach()
        none = z.norm(dim=-1) == 0
        sizes[name] = (p.norm(dim=-1) / z.norm(dim=-1) / W.norm())[~none].cpu().numpy()
        silent[name] = none.cpu().numpy()
        unit_p, unit_z = F.normalize(p, dim=-1), F.normalize(z, dim=-1)
        values = torch.linalg.eigvalsh((unit_p @ unit_p.T) * (unit_z @ unit_z.T))
        ranks[name] = float(values.sum() ** 2 / values.square().sum().clamp(min=1e-12))
    return sizes, silent, ranks


@torch.no_grad()
def one_theta_prime(model, heads, ts, tails):
    """The tail's logits (B, n, V) without the trajectory, from weights theta' that are the same for
    every token of the row, the question's included, and equal theta but for every `up` and `down`.

    Layer by layer, dW is the smallest matrix that changes a layer's outputs at the tail as wanted
    and leaves those of the question alone: dW^T = Z^+ Y, with Z (S, in) the inputs and Y (S, out)
    the changes. It exists where the tail's inputs do not depend linearly on the others; to make the
    hidden units so, which may all be silent, the n-th token of the tail wakes the n-th of them."""
    rows, with_t, change = layout(model, heads, ts, tails), {}, {}
    n, seen = rows.n, torch.tensor([len(t) for t in ts], device=rows.ids.device)
    keep = rows.real.clone()
    keep[:, rows.t] = False

    def record(name, x, y):
        with_t[name] = y[:, -n:]
        return y

    def patch(name, x, y):
        kind, Y = name.split(".")[1], torch.zeros_like(y)
        if kind == "out":
            change["u"] = with_t[name] - y[:, -n:]
        if kind in ("qkv", "out"):
            return y
        Y[:, -n:] = with_t[name] - y[:, -n:]
        if kind == "up":
            awake = torch.eye(n, y.size(-1), dtype=torch.bool, device=y.device)
            Y[:, -n:] += (1 - with_t[name]).clamp(min=0) * awake
        else:
            Y[:, -n:] += change["u"]
        Z = x * keep[..., None]
        return y + Z @ (torch.linalg.pinv(Z) @ Y)

    model(rows.ids, pos=rows.pos, mask=rows.mask(seen), hook=record)
    h = model(rows.ids, pos=rows.pos, mask=rows.mask(rows.nothing()), hook=patch)
    return model.logits(h[:, -n:])


# --------------------------------------------------- Proposition 2.1 in its own setting (Eqs. 5-19)

class Layer(NamedTuple):
    """Eqs. 5, 6: one layer without norm, residual or scale, row vectors."""
    Wq: torch.Tensor
    Wk: torch.Tensor
    Wv: torch.Tensor
    W1: torch.Tensor
    W2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor

    def weights(self, q, K):
        """Attention of query inputs over key inputs."""
        return (q @ self.Wq @ (K @ self.Wk).T).softmax(-1)

    def mlp(self, o):
        return (o @ self.W1 + self.b1).relu() @ self.W2 + self.b2

    def output(self, q, K):
        return self.mlp(self.weights(q, K) @ K @ self.Wv)


def proposition(n=200, width=32, words=8, seed=0):
    """Proposition 2.1 in one random layer, float64 -> {construction: n errors}, each relative to
    the change that a token t_0 makes and the new weights should reproduce: 0 is exact, 1 as bad as
    doing nothing.

    `printed`: the proof's W_q' = P W_q with E_t P = E_last, W_k' and W_v' through the least-squares
    C (Eqs. 13-19; the product of Eq. 19 does not type-check, so M stands between E_l^+ and M^T).
    `direction mended`: P with E_last P = E_t. `rank-1 repair`: W_v' = W_v + a^T (o - a W_v) /
    |a|^2, with a the attended input and o the attention's output after t_0."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x / shape[0] ** 0.5

    errors = {name: [] for name in CONSTRUCTIONS}
    for _ in range(n):
        E, t = new(words, width) * 3, new(1, width) * 3
        layer = Layer(*(new(width, width) for _ in range(3)), new(width, 4 * width),
                      new(4 * width, width), new(1, 4 * width), new(1, width))
        last, longer = E[-1:], torch.cat((E, t))
        before, after = layer.output(last, E), layer.output(t, longer)
        for name, changed in constructions(layer, E, t).items():
            error = (changed.output(last, E) - after).norm() / (after - before).norm()
            errors[name].append(float(error))
    return errors

def constructions(layer, E, t):
    """{construction: the layer with its new weights}."""
    last, longer = E[-1:], torch.cat((E, t))
    C = t @ torch.linalg.pinv(E)                                        # (1, |l|), Eq. 16
    M = torch.cat((torch.eye(len(E), dtype=E.dtype), C.T), 1)           # (|l|, |l| + 1)
    through = torch.linalg.pinv(E) @ M @ M.T @ E
    through_all = layer._replace(Wk=through @ layer.Wk, Wv=through @ layer.Wv)      # Eq. 19
    P_printed = t.T @ last / t.square().sum()                           # Eq. 13: E_t P = E_last
    P_mended = last.T @ t / last.square().sum()                         # E_last P = E_t
    a = layer.weights(last, E) @ E
    o = layer.weights(t, longer) @ longer @ layer.Wv
    return {
        "printed": through_all._replace(Wq=P_printed @ layer.Wq),
        "direction mended": through_all._replace(Wq=P_mended @ layer.Wq),
        "rank-1 repair": layer._replace(
            Wv=layer.Wv + a.T @ (o - a @ layer.Wv) / a.square().sum())}


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    verdict, gaps = decide(margins(raw.errors))
    return verdict, {
        "gaps": gaps, "title": raw.title, "errors": rounded(raw.errors),
        "median error": {name: float(np.median(e)) for name, e in raw.errors.items()},
        "largest error": {name: float(np.max(e)) for name, e in raw.errors.items()},
        "proposition": rounded(raw.proposition),
        "median of the proposition": {n: float(np.median(e)) for n, e in raw.proposition.items()},
        "norm of dW / norm of W": {name: interval(v, np.median) for name, v in raw.sizes.items()},
        "a bias instead": {name: interval(v) for name, v in raw.silent.items()},
        "effective rank over questions": {name: round(v, 1) for name, v in raw.ranks.items()}}

def margins(errors):
    """Orders of magnitude to spare."""
    e = {name: np.log10(np.maximum(v, 1e-30)) for name, v in errors.items()}
    return {"float32 below 1e-4": -4 - e["float32"], "float64 below 1e-10": -10 - e["float64"],
            "float64, one theta', below 1e-10": -10 - e["float64, one theta'"],
            "unpatched": e["unpatched"] - e["float32"] - 2,
            "another question's patch": e["other"] - e["float32"] - 2}

def rounded(errors):
    return {name: [float(f"{x:.3g}") for x in e] for name, e in errors.items()}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((errors, construction, size),) = panels(1, 3, width=4.2, heights=[3.6])
    boxes(errors, {label: numbers["errors"][name] for name, label in LABELS.items()})
    errors.set(xlabel="largest error of the answer's logits", title=numbers["title"])

    rows = {label: numbers["proposition"][name] for name, label in CONSTRUCTIONS.items()}
    boxes(construction, rows)
    construction.set(xlabel="error / the change to be made",
                     title="Proposition 2.1, one random layer")

    norms, ranks = numbers["norm of dW / norm of W"], numbers["effective rank over questions"]
    there = [i for i, norm in enumerate(norms.values()) if norm]
    whiskers(size, there, [norm for norm in norms.values() if norm], COLOURS["correct"])
    biases = [share for share, _, _ in numbers["a bias instead"].values()]
    labels = [name + f"\n{share:.0%} bias" * (share > 0) for name, share in zip(norms, biases)]
    size.set_xticks(range(len(norms)), labels, rotation=45)
    size.set(title="patches at </think>", xlabel="layer", ylim=(0, None))
    size.set_ylabel("norm of dW / norm of W (median)", color=COLOURS["correct"])
    twin = size.twinx()
    twin.plot(range(len(ranks)), list(ranks.values()), "s--", color=COLOURS["other"], ms=3)
    twin.set_ylabel("effective rank of all patches", color="#9a6a00")
    twin.set(ylim=(0, None))
    twin.spines["right"].set_visible(True)
    return fig
