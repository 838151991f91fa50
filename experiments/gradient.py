"""Is the trajectory's implicit update a gradient step on L_q? (Eq. 4, which asserts it)

Cosine of each increment of the exact patch with -grad L_q at the current patched weights, four
random tokens of a correct trajectory a question, averaged. Three controls: the trajectory's tokens
shuffled, another question's trajectory, an untrained model.

aligned: the cosine is above 0 and above every control (paired over questions).
a gradient step: it is above 0.5.

Supported where all 95 % bootstrap intervals lie above 0, refuted where one lies below, else
inconclusive. (Against the loss of 2507.16003, linear in W and defined by these increments
themselves, the cosine is 1 by construction, for any model and any text.)
"""
import random

import numpy as np
import torch

from analyze import as_ids, cell_of, exact_patches, layout, patch_hook, untrained
from data import text
from lab.figure import COLOURS, panels, whisker, whiskers, zero_line
from lab.verdict import decide, interval, spoken

CLAIM = "Eq. 4: the exact patch of a trajectory's token lies along -grad L_q"
TOKENS = 4                                  # drawn a question
CONDITIONS = {"trained": COLOURS["correct"], "shuffled": COLOURS["filler"],
              "another question's": COLOURS["other"], "untrained": COLOURS["light"]}


# --------------------------------------------------------------------------------------- measure

def measure(c, model, size=200):
    """-> (title, {condition: {layer or 'all': cosine, a question}})"""
    cell, rng, cosines = cell_of(c), random.Random(c.seed), {}
    qs = cell.questions
    shuffled = ["".join(rng.sample(t, len(t))) for t in cell.thinks]
    trials = {
        "trained": (model, cell.thinks), "shuffled": (model, shuffled),
        "another question's": (model, cell.others), "untrained": (untrained(model), cell.thinks)}
    for name, (m, thinks) in trials.items():
        rows = cosines[name] = {}
        for _ in range(TOKENS):
            drawn = [rng.randrange(len(t)) for t in thinks]
            for j in range(0, len(qs), size):
                part = slice(j, j + size)
                by_layer = increments(m, qs[part], thinks[part], drawn[part])
                for layer, v in by_layer.items():
                    mean = rows.setdefault(layer, np.zeros(len(qs)))
                    mean[part] += v / TOKENS
    return cell.title, cosines

def increments(model, questions, thinks, i):
    """Does the implicit patch, when one more token than i is read, move along -grad L_q at the
    weights patched so far?

    Increment dW_{i+1} - dW_i of every `up` and of the bias behind every `down`, at every position
    of the answer, each with weights of its own, against -D z^T, the gradient of the answer's summed
    NLL there. The answer keeps its positions. -> {layer or 'all': cosines (questions,)}"""
    heads, ts, tails = as_ids(questions, thinks)
    now = exact_patches(model, heads, ts, tails, i, bias=True)
    then = exact_patches(model, heads, ts, tails, [j + 1 for j in i], bias=True)
    inputs, gradients = at_patched(model, layout(model, heads, ts, tails), tails, now.patches)
    total, parts = 0, {}
    for name, D in gradients.items():
        z = inputs[name]
        p, x = unit(*now.patches[name])             # dW_i = p x^T
        r, y = unit(*then.patches[name])            # dW_{i+1} = r y^T
        along = -(dot(r, D) * dot(y, z) - dot(p, D) * dot(x, z))
        squared = dot(p, p) * dot(x, x) + dot(r, r) * dot(y, y) - 2 * dot(p, r) * dot(x, y)
        gradient = dot(D, D) * dot(z, z)
        sums = [(v * now.valid).sum(-1) for v in (along, squared.clamp(min=0), gradient)]
        parts[name] = torch.stack(sums)             # (3, questions)
        total = total + parts[name]
    return {name: cosine(*v) for name, v in {"all": total, **parts}.items()}

def at_patched(model, rows, tails, patches):
    """The answer's gradient at the patched weights, without the trajectory -> ({layer: its inputs
    z}, {layer: gradients D at its outputs}), (questions, n, ...) each."""
    n, change = rows.n, patch_hook(patches, rows.n)
    targets = text.padded([tail[1:] for tail in tails], text.IGNORE, rows.ids.device)
    inputs, outputs = {}, {}

    def keep(name, x, y):
        y = change(name, x, y)
        if name in patches:
            z = patches[name][1]
            inputs[name] = x.detach()[:, -n:] if z.size(-1) > 1 else z      # a bias: z = 1
            outputs[name] = y
        return y

    h = model(rows.ids, pos=rows.pos, mask=rows.mask(rows.nothing()), hook=keep)[:, -n:]
    grads = torch.autograd.grad(model.score(h, targets).sum(), list(outputs.values()))
    return inputs, {name: g[:, -n:] for name, g in zip(outputs, grads)}

def dot(a, b):
    return (a * b).sum(-1)

def unit(p, z):
    """A patch as p' z^T; 0 where z = 0."""
    return p / dot(z, z).clamp(min=1e-30)[..., None], z

def cosine(along, squared, gradient):
    return (along / (squared * gradient).sqrt().clamp(min=1e-30)).double().cpu().numpy()


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    title, cosines = raw
    over_layers = {name: v["all"] for name, v in cosines.items()}
    aligned = decide(margins_aligned(over_layers))
    step = decide(margins_step(over_layers))
    return spoken({"aligned": aligned[0], "a gradient step": step[0]}), {
        "gaps": {"aligned": aligned[1], "a gradient step": step[1]}, "title": title,
        "cosine": {name: {layer: interval(x) for layer, x in v.items()}
                   for name, v in cosines.items()}}

def margins_aligned(cosine):
    """{condition: cosines, one a question} -> margins"""
    above = {f"above {name}": cosine["trained"] - v
             for name, v in cosine.items() if name != "trained"}
    return {"above 0": cosine["trained"], **above}

def margins_step(cosine):
    return {"cosine above 0.5": cosine["trained"] - 0.5}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, ((whole, layers),) = panels(1, 2, width=5, heights=[3.6], width_ratios=(1, 1.6))
    for i, (name, colour) in enumerate(CONDITIONS.items()):
        rows = dict(numbers["cosine"][name])
        whisker(whole, i, rows.pop("all"), colour)
        whiskers(layers, np.arange(len(rows)) + 0.08 * i, list(rows.values()), colour, label=name)
    whole.set_xticks(range(len(CONDITIONS)), [name.replace(" ", "\n") for name in CONDITIONS])
    whole.set(ylabel=r"cosine of a token's update and $-\nabla L_q$", title=numbers["title"])
    layers.set_xticks(range(len(rows)), list(rows), rotation=45)
    layers.set(title="by layer", ylabel="cosine", xlabel="layer")
    layers.legend(fontsize=8)
    for ax in (whole, layers):
        zero_line(ax)
    return fig
