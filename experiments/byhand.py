"""One inner step by hand, with its numbers, to be read beside `theta_prime` in meta.py.

The gradient of the inner loss at a layer y = W x is a sum over tokens, each the gradient d at the
layer's output times its input x. So every token moves every fast layer by a dW = -alpha d x^T of
its own; the question's tokens do, too, as far as the trajectory's read them. theta' is theta plus
all of these. --ask="(3+5)*2-7" takes a question of yours.
"""
import random

import torch
from torch.func import functional_call

import meta
from data import arithmetic, text
from data.tasks import Task, support
from experiments.figure import panels
from experiments.walk import question_of
from lab.flags import fail

CLAIM = "one inner step, done by hand, is theta_prime"


def measure(c, runs):
    """-> what is told, as lines; far: {layer: |dW| of every token of `reads`}; off: how far a
    weight is from theta_prime's at most."""
    q = question_of(c.ask or "(3+5)*2-7")
    model, inner, _ = runs.meta()
    if inner.K > 1 or inner.matrices is not None:
        fail(f"--meta={c.meta}: one inner step by a gradient is expected")
    states = arithmetic.steps(q, random.Random(0))[0]
    row, tape = support([Task(q, states, [q])], model.device), {}

    def record(name, x, y):
        tape[name] = x, y
        return y
    losses = model.score(model(**row.inputs(), hook=record), inner.asked(row), inner.tau)
    grads = torch.autograd.grad(losses.sum(), [tape[name][1] for name in inner.names])
    paths, far, dW = meta.linear_layers(model), {}, {}
    for name, d in zip(inner.names, grads):
        x, step = tape[name][0][0], -inner.rate(name, 0) * d[0]         # (P, in), (P, out)
        dW[name] = (step.T @ x).detach()                                # (out, in)
        far[name] = (step.norm(dim=1) * x.norm(dim=1)).tolist()         # |step x^T| = |step| |x|
    reads, writes = ([text.decode([i]) if i >= 0 else "" for i in ids[0]]
                     for ids in (row.ids, row.inner))
    lines = [f"{q.text}, trajectory {';'.join(states)}", f"1. every token at temperature "
             f"{inner.tau:g}: what to write after it, the loss, what moves most (|dW|)"]
    for i in (row.inner[0] >= 0).nonzero()[:, 0].tolist():
        most = sorted(far, key=lambda name: -far[name][i])[:3]
        lines.append(f"   {reads[i]:8} {writes[i]:9} {losses[0, i]:5.2f}   " + "   ".join(
            f"{name} {far[name][i]:.3f}" for name in most))
    theta = {name: model.get_parameter(paths[name]).detach() for name in dW}
    share = {name: float(dW[name].norm() / theta[name].norm()) for name in dW}
    lines.append("2. all tokens together: |dW| / |W|")
    lines += [f"   {name:8} {part:.4f}" for name, part in share.items()]

    ids = torch.tensor([text.prompt(q.text, "")], device=model.device)  # asked without trajectory
    moved = {paths[name]: theta[name] + dW[name] for name in dW}
    before, after = (functional_call(model, weights, (ids,), {"hook": hook})[0, -1].detach()
                     for weights, hook in (({}, record), (moved, None)))
    most = max(share, key=share.get)
    x = tape[most][0][0, -1].detach()
    lines.append(f"3. {most}, which moved most, at one x: the first 6 numbers")
    for name, v in (("x", x), ("y  = W x", theta[most] @ x), ("dW x", dW[most] @ x),
                    ("y' = (W + dW) x", moved[paths[most]] @ x)):
        lines.append(f"   {name:16}" + "".join(f"{number:7.2f}" for number in v[:6].tolist()))
    lines.append(f"4. the answer ({q.answer} is right): how likely each digit is")
    lines.append(f"   {'':16}" + "".join(f"{digit:6}" for digit in range(10)))
    for name, h in (("theta", before), ("theta'", after)):
        shares = model.logits(h).softmax(-1)[:10].tolist()
        lines.append(f"   {name:16}" + "".join(f"{share:6.2f}" for share in shares))
    right = meta.theta_prime(model, inner, row)
    off = max(float((moved[path] - W).detach().abs().max()) for path, W in right.items())
    lines.append(f"5. W + dW equals theta_prime: no weight differs by more than {off:.0e}")
    return {"question": q.text, "lines": lines, "far": far, "reads": reads, "off": off}

def judge(numbers):
    return {"equal to rounding": "supported" if numbers["off"] < 1e-5 else "refuted"}, numbers

def draw(numbers):
    fig, ((ax,),) = panels(1, 1, width=7, heights=[3])
    shade = ax.imshow(list(numbers["far"].values()), aspect="auto")
    ax.set_xticks(range(len(numbers["reads"])), numbers["reads"], fontsize=6, rotation=90)
    ax.set_yticks(range(len(numbers["far"])), numbers["far"])
    ax.set(title=f"How far every token moves every layer: {numbers['question']}")
    fig.colorbar(shade, ax=ax, label="|dW|")
    return fig

def show(numbers):
    return numbers["lines"]
