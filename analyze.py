"""The instruments of every figure. Started as a script, it runs experiments with them:

    python analyze.py                            # the tour: trains what is missing, draws, reports
    python analyze.py curve --questions=400      # one experiment, experiments/curve.py
    python analyze.py curve --redraw             # its figure again, from its JSON alone
    python analyze.py --help                     # all experiments

`prefix_logp` is the answer's distribution after every token of a trajectory in the context
(Algorithm 3), `explicit_curves` the loss for a trajectory in the weights; `exact_patches` turns a
context into weights (Proposition 2.1); `cosines` holds one against the other.

An answer is one digit, so every loss here is the NLL of a digit in nats. Who knows nothing has ln
10 = 2.30.
"""
from typing import NamedTuple

import numpy as np
import torch

import meta
from data import text
from data.tasks import Task, support
from model import left_mask, left_padded

DIGITS = 10                         # their ids are 0 to 9
CHANCE = float(np.log(DIGITS))


# ------------------------------------------- L_hat, the implicit inner loop (Eq. 4, Algorithm 3)

@torch.no_grad()
def prefix_logp(model, questions: list, thinks: list, size: int = 64) -> list:
    """Gives the answer's log-probabilities after every prefix of trajectories (texts), in one pass
    -> an array (|t| + 1, 10) per question, entry i after its first i tokens (Algorithm 3).

    An aside `</think>` after every token asks for the answer there, and nobody sees it
    (data/text.py)."""
    out = []
    for first in range(0, len(questions), size):
        rows = []
        for q, think in zip(questions[first:first + size], thinks[first:first + size]):
            head, trunk = text.prompt(q.text), text.prompt(q.text) + text.encode(think)
            rows.append(text.asked_after(trunk, range(len(head), len(trunk) + 1)))
        batch = text.batch(rows, model.device)
        at_asides = model(**batch.inputs())[:, batch.trunk:]                # (B, T, C)
        logp = model.logits(at_asides).log_softmax(-1)[..., :DIGITS].cpu().numpy()
        out += [logp[i, :len(row.asides)] for i, row in enumerate(rows)]
    return out

def curves_of(model, questions: list, thinks: list) -> list:
    """L_hat[i] = NLL of the answer after the first i tokens of a trajectory, i = 0..|t| -> an array
    (|t| + 1,) per question."""
    logps = prefix_logp(model, questions, thinks)
    return [-logp[:, int(q.answer)] for logp, q in zip(logps, questions)]

def at_states(curve, think: str):
    """Keeps of a curve over tokens what stands after 0, 1, 2, ... whole states."""
    ends = [i for i, c in enumerate(think) if c == ";"]
    return curve[[0, *ends, len(think)]]

@torch.no_grad()
def direct_logp(model, questions: list, hook=None, thinks: list = None) -> torch.Tensor:
    """Gives the answer's log-probabilities after `<think> t </think>`, without any trajectory by
    default -> (N, 10)."""
    thinks = thinks or [""] * len(questions)
    prompts = [text.prompt(q.text, t) for q, t in zip(questions, thinks)]
    ids, real = left_padded(prompts, model.device)
    h = model(ids, mask=left_mask(real), hook=hook)
    return model.logits(h[:, -1]).log_softmax(-1)[:, :DIGITS]

def nll_of(logp: torch.Tensor, questions: list) -> np.ndarray:
    """L_q of the true answers, from (N, 10) -> (N,)."""
    answers = torch.tensor([int(q.answer) for q in questions], device=logp.device)
    return -logp.gather(1, answers[:, None])[:, 0].cpu().numpy()


# ------------------------------------------------ L_q(theta'_i), the explicit inner loop (Eq. 4)

def explicit_logp(model, inner, batch: list, size: int = 128) -> torch.Tensor:
    """Gives theta's answer after it was moved along a Task's trajectory; every Task has one query
    -> (N, 10)."""
    out = []
    for i in range(0, len(batch), size):
        part = batch[i:i + size]
        hook = meta.adapt(model, inner, support(part, model.device), order=1).hook
        out.append(direct_logp(model, [task.queries[0] for task in part], hook))
    return torch.cat(out)

def explicit_curves(model, inner, questions: list, trajectories: list, solved: list = None):
    """L_q(theta'_i) for i = 0..n, theta'_i from the inner loop on the first i states of a
    trajectory (a list of steps), the question asked without any: the counterpart of `at_states`
    -> an array (n + 1,) per question. solved: whose trajectories they are, default the questions'
    own."""
    at_theta = nll_of(direct_logp(model, questions), questions)
    solved = solved or questions
    places = [(k, i) for k, t in enumerate(trajectories) for i in range(1, len(t) + 1)]
    batch = [Task(solved[k], trajectories[k][:i], [questions[k]]) for k, i in places]
    losses = nll_of(explicit_logp(model, inner, batch), [questions[k] for k, _ in places])
    curves = [[at_theta[k]] for k in range(len(questions))]
    for (k, _), loss in zip(places, losses):
        curves[k].append(loss)
    return [np.array(curve) for curve in curves]


# ------------------------------------------------------ a context as weights (Proposition 2.1)

TAIL = 2                            # `</think> a`: the positions whose outputs are looked at

class Patched(NamedTuple):
    """What `exact_patches` found: patches, and the tail's logits (B, TAIL, V)."""
    patches: dict
    full: torch.Tensor              # with the trajectory
    patched: torch.Tensor           # without it, patched
    plain: torch.Tensor             # without either

def tails(model, questions: list, thinks: list):
    """Rows `<bos> q <think> t </think> a`, padded on the left, so that all end alike -> (ids (B,
    T), mask)."""
    rows = [[*text.prompt(q.text, t), *text.encode(q.answer)] for q, t in zip(questions, thinks)]
    ids, real = left_padded(rows, model.device)
    return ids, left_mask(real)

def patch_hook(patches: dict):
    """{layer: (p, z)} as a hook: at the last TAIL positions, each row and position has weights W +
    p z^T / |z|^2 of its own. Where z is the number 1, or 0, p is a bias."""
    def hook(name, x, y):
        if name not in patches:
            return y
        p, z = patches[name]
        if z.size(-1) > 1:
            zz = z.square().sum(-1, keepdim=True)
            share = (x[:, -TAIL:] * z).sum(-1, keepdim=True)
            share = share / zz.clamp(min=torch.finfo(zz.dtype).tiny)
            p = p * torch.where(zz > 0, share, 1)
        return torch.cat((y[:, :-TAIL], y[:, -TAIL:] + p), 1)
    return hook

@torch.no_grad()
def exact_patches(model, questions: list, thinks: list, bias: bool = False) -> Patched:
    """The implicit update as weights: {layer: (p (B, TAIL, out), z (B, TAIL, in))}, a rank-1 patch
    dW = p z^T / |z|^2 of every `up` and `down` for each position of the tail; with bias, a vector p
    added after `down` instead of its patch, z = 1.

    With them, layer by layer, the tail's logits without the trajectory equal those with it
    (2507.16003; 2511.17864): u is the residual that enters the MLP, z = norm(u), h the MLP's hidden
    units, C marks "with trajectory", and

        dW_up = W_up (z_C - z) z^T / |z|^2        dW_down = (u_C - u) h^T / |h|^2

    Where all hidden units are silent, h = 0, no matrix can do it, and u_C - u is added as a bias;
    where they nearly are, the matrix is huge, and a bias always the tamer choice."""
    weight = {name: model.get_parameter(path) for name, path in meta.linear_layers(model).items()}
    with_t, patches, change = {}, {}, {}

    def record(name, x, y):
        with_t[name] = x[:, -TAIL:], y[:, -TAIL:]
        return y

    def patch(name, x, y):
        kind, z = name.split(".")[1], x[:, -TAIL:]
        if kind == "out":                           # below it, patched and full residuals are equal
            change["u"] = with_t[name][1] - y[:, -TAIL:]
        if kind == "up":
            patches[name] = (with_t[name][0] - z) @ weight[name].T, z
        if kind == "down":
            patches[name] = change["u"], torch.ones_like(z[..., :1]) if bias else z
        if kind in ("up", "down"):
            y = patch_hook({name: patches[name]})(name, x, y)
        return y

    def logits(thinks, hook):
        ids, mask = tails(model, questions, thinks)
        return model.logits(model(ids, mask=mask, hook=hook)[:, -TAIL:])

    nothing = [""] * len(questions)
    full, patched = logits(thinks, record), logits(nothing, patch)
    return Patched(patches, full, patched, logits(nothing, None))

def cosines(model, inner, trials: list) -> dict:
    """Cosine between the explicit update of every `up` and `down` (the inner loop's) and the
    implicit patch at </think> -> {layer: list}, where both are not zero.

    trials: (question, steps of the explicit update, of the implicit one). Neither matrix is built:
    with dW = -alpha X^T D and z^T p, the inner product is -(z X^T)(D p), and the norms follow from
    X X^T and D D^T."""
    by_layer = {}
    for q, for_weights, for_context in trials:
        adapted = meta.adapt(model, inner, support([Task(q, for_weights, [q])], model.device), 1)
        patches = exact_patches(model, [q], [";".join(for_context)]).patches
        for name in inner.names:
            if name not in patches:
                continue
            X = torch.cat([inner.rate(name, k).detach() * update[name][0][0]
                           for k, update in enumerate(adapted.updates)])
            D = torch.cat([update[name][1][0] for update in adapted.updates])
            p, z = (v[0, 0] for v in patches[name])
            explicit = ((X @ X.T) * (D @ D.T)).sum().clamp(min=0).sqrt()
            norm = explicit * p.norm() * z.norm()
            if norm > 0:
                by_layer.setdefault(name, []).append(float(-(X @ z) @ (D @ p) / norm))
    return by_layer

def untrained(model, seed: int = 0):
    """A model of the same shape with random weights, none of them zero."""
    torch.manual_seed(seed)
    new = type(model)(model.config)
    for block in new.blocks:
        for layer in (block.out, block.down):
            torch.nn.init.kaiming_uniform_(layer.weight, a=5 ** 0.5)
    return new.to(model.device)


if __name__ == "__main__":
    from experiments import main                    # the one look forward
    from lab.run import command
    command(main)
