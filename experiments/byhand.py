"""One inner step by hand, with its numbers, to be read beside `theta_prime` in meta.py.

The gradient of the inner loss at a layer y = W x is a sum over tokens, each the gradient d at the
layer's output times its input x. So every token moves the layer by a dW = -alpha d x^T of its own;
the question's tokens do, too, as far as the trajectory's read them. theta' is theta plus all of
these. --ask="(3+5)*2-7" takes a question of yours.
"""
import random

import torch

import meta
from analyze import direct_logp
from data import arithmetic, text
from data.tasks import Task, support
from experiments.figure import COLOURS, panels
from experiments.walk import question_of
from lab.flags import fail

CLAIM = "one inner step, done by hand, is theta_prime"


def measure(c, runs):
    """-> what is told, as lines; far: |dW| of every token of `reads`; off: how far a weight is from
    theta_prime's at most."""
    q = question_of(c.ask or "(3+5)*2-7")
    model, inner, _ = runs.meta()
    if len(inner.names) * inner.K > 1 or inner.update != "gradient":
        fail(f"--meta={c.meta}: one inner step of one layer, by a gradient, is expected")
    (name,), tape = inner.names, {}
    states = arithmetic.steps(q, random.Random(0))[0]
    row = support([Task(q, states, [q])], model.device)
    hook = meta.recording(tape, inner.names, lambda name, x, y: y)
    losses = model.score(model(**row.inputs(), hook=hook), inner.asked(row), inner.tau)
    X, Y = tape[name]
    d, = torch.autograd.grad(losses.sum(), Y)
    losses = losses[0].tolist()
    X, step = X[0].detach(), -inner.rate(name, 0).detach() * d[0]       # (P, in), (P, out)
    W, dW = model.get_parameter(meta.linear_layers(model)[name]).detach(), step.T @ X
    far = (step.norm(dim=1) * X.norm(dim=1)).tolist()                   # |step x^T| = |step| |x|
    reads = [text.decode([i]) for i in row.ids[0]]
    lines = [f"{q.text}, trajectory {';'.join(states)}", f"1. every token at temperature "
             f"{inner.tau:g}: what to write after it, the loss, how far it moves {name} (|dW|)"]
    for i in (row.inner[0] >= 0).nonzero()[:, 0].tolist():
        writes = text.decode([row.inner[0, i]])
        lines.append(f"   {reads[i]:8} {writes:9} {losses[i]:5.2f}   {far[i]:.3f}")
    lines.append(f"   all together {float(dW.norm()):.3f}, where the weights are "
                 f"{float(W.norm()):.3f}")

    hook = meta.recording(tape, inner.names,
                          lambda layer, x, y: y + x @ dW.T if layer == name else y)
    before, after = direct_logp(model, [q]), direct_logp(model, [q], hook)
    x = tape[name][0][0, -1]
    lines.append(f"2. {name} at </think>, asked without the trajectory: the first 6 numbers")
    for what, v in (("x", x), ("y  = W x", W @ x), ("dW x", dW @ x),
                    ("y' = (W + dW) x", (W + dW) @ x)):
        lines.append(f"   {what:16}" + "".join(f"{number:7.2f}" for number in v[:6].tolist()))
    lines.append(f"3. the answer ({q.answer} is right): how likely each digit is")
    lines.append(f"   {'':16}" + "".join(f"{digit:6}" for digit in range(10)))
    for what, logp in (("theta", before), ("theta'", after)):
        shares = logp[0].exp().tolist()
        lines.append(f"   {what:16}" + "".join(f"{share:6.2f}" for share in shares))
    right, = meta.theta_prime(model, inner, row).values()
    off = float((W + dW - right.detach()).abs().max())
    lines.append(f"4. W + dW equals theta_prime: no weight differs by more than {off:.0e}")
    return {"question": q.text, "layer": name, "lines": lines, "far": far, "reads": reads,
            "off": off}

def judge(numbers):
    return {"equal to rounding": "supported" if numbers["off"] < 1e-5 else "refuted"}, numbers

def draw(numbers):
    fig, ax = panels(1, 7, 2.4)
    ax.bar(range(len(numbers["far"])), numbers["far"], color=COLOURS["weights"])
    ax.set_xticks(range(len(numbers["reads"])), numbers["reads"], fontsize=6, rotation=90)
    ax.set(title=f"How far every token moves {numbers['layer']}: {numbers['question']}",
           ylabel="|dW|")
    return fig

def show(numbers):
    return numbers["lines"]
