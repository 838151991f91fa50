"""Does the trajectory lead into a low and wide basin of the answer's loss? (Figs. 2, 12-16)

L_q, the NLL of the answer's digit, over two random directions around theta (Algorithm 4), each
scaled row by row to the weights' norms. Theta itself stands in the middle of the grid.

lower at theta: the trajectory in the context lowers L_q, and more than another question's does,
    which restates that it helps.
wider at a radius: its relative sharpness there, (L_ring - L_theta) / (1 + L_theta), is smaller than
    without a trajectory (after 1609.04836, with the mean over a ring in place of the maximum). A
    ring is eight points in each of three random planes.

Each part is supported where its 95 % intervals over questions lie above 0, refuted where one lies
below, else inconclusive. Another question's trajectory is shown without a vote: its loss is so high
that on a ring it can only fall.
"""
import copy
import random

import numpy as np
import torch

from analyze import direct_logp, directions, nll_of, surface
from data import arithmetic
from experiments import cell_of, others_of
from experiments.figure import COLOURS, chance_line, mosaic, scale, whiskers, zero_line
from lab.verdict import decide, interval
from meta import linear_layers

CLAIM = "Figs. 2, 12-16: with the trajectory the answer's loss is low at theta, and wide around it"
RADII, REACH = (0.1, 0.25, 0.5, 1.0), 0.5   # of rings, and of the drawn plane, in rows' norms
PLANES, RINGED, GRID = 3, 30, 21            # planes, questions that have rings, points of a side
CONDITIONS = {"without": ("no trajectory", "theta"), "context": ("after its trajectory", "correct"),
              "other": ("after another question's", "other")}               # label, colour


# --------------------------------------------------------------------------------------- measure

def measure(c, runs):
    """-> (the drawn question, {condition: L_q (1 + radii, questions), theta first}, {condition: L_q
    of the drawn one (GRID, GRID)})"""
    model, rng = runs.sft(), random.Random(c.seed)
    questions, _ = cell_of(c)
    thinks = [arithmetic.trajectory(q, rng) for q in questions]
    conditions = {"without": [""] * len(questions), "context": thinks,
                  "other": others_of(questions, thinks, rng)}
    planes = [directions(model, c.seed + k) for k in range(PLANES)]
    e = c.seed % len(questions)             # the question that is drawn
    loss, sheets = {}, {}
    for name, ts in conditions.items():
        loss[name] = around(model, planes, questions[:RINGED], ts[:RINGED])
        sheets[name] = sheet(model, questions[e], ts[e], planes[0])
    return f"{questions[e].text} = {questions[e].answer}", loss, sheets

def around(model, planes, questions, thinks):
    """L_q at theta, and its mean on every ring -> (1 + radii, questions). A point's weights, which
    all questions share, are written anew from theta: nothing drifts."""
    moved, paths = copy.deepcopy(model), linear_layers(model)

    def at(a, b, plane):
        with torch.no_grad():
            for name, path in paths.items():
                change = plane[0][name] * a + plane[1][name] * b
                moved.get_parameter(path).copy_(model.get_parameter(path) + change)
        return nll_of(direct_logp(moved, questions, thinks=thinks), questions)

    rings = [at(0, 0, planes[0])]
    for radius in RADII:
        losses = [at(radius * np.cos(angle), radius * np.sin(angle), plane)
                  for plane in planes for angle in np.arange(8) * np.pi / 4]
        rings.append(np.mean(losses, 0))
    return np.stack(rings)

def sheet(model, q, think, plane):
    """L_q of one question over the plane -> (b, a)."""
    side = torch.linspace(-REACH, REACH, GRID, device=model.device)
    points = torch.cartesian_prod(side, side).flip(1)                   # a runs first
    losses = surface(model, [q] * len(points), [think] * len(points), plane, points)
    return losses.reshape(GRID, GRID)


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    title, loss, sheets = raw
    verdicts, gaps = {}, {}
    for part, found in margins(loss).items():
        verdicts[part], gaps[part] = decide(found)
    return verdicts, {
        "gaps": gaps, "title": title, "questions": loss["without"].shape[1],
        "L_q": {name: [interval(row) for row in L] for name, L in loss.items()},
        "sharpness": {name: [interval(row) for row in sharpness(L)] for name, L in loss.items()},
        "sheets": {name: L.astype(float).round(3).tolist() for name, L in sheets.items()}}

def sharpness(L):
    """How much L_q (1 + radii, questions) rises on every ring, relatively -> (radii, questions)."""
    return (L[1:] - L[0]) / (1 + L[0])

def margins(loss):
    """{condition: L_q (1 + radii, questions)} -> {part of the claim: margins}"""
    without, context, other = (loss[name] for name in CONDITIONS)
    parts = {"lower at theta": {"without - in context": without[0] - context[0],
                                "another's - in context": other[0] - context[0]}}
    for radius, bare, own in zip(RADII, *map(sharpness, (without, context))):
        parts[f"wider at {radius:g}"] = {"sharpness without - in context": bare - own}
    return parts


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    layout = [["without"] * 2 + ["context"] * 2 + ["other"] * 2, ["L_q"] * 3 + ["sharpness"] * 3]
    fig, axes = mosaic(layout, (11, 6.6))
    side, top = np.linspace(-REACH, REACH, GRID), 2 * np.log(10)
    for name, (label, colour) in CONDITIONS.items():
        ax, sheet = axes[name], np.minimum(numbers["sheets"][name], top)
        shade = ax.contourf(side, side, sheet, np.linspace(0, top, 15), cmap="cividis")
        ax.plot(0, 0, "P", color="white", ms=8, mec="black")
        ax.set(title=label.capitalize(), xlabel="direction 1", ylabel="direction 2")
        whiskers(axes["L_q"], (0, *RADII), numbers["L_q"][name], COLOURS[colour])
        whiskers(axes["sharpness"], RADII, numbers["sharpness"][name], COLOURS[colour], label=label)
    scale(fig, shade, axes["other"])
    axes["L_q"].set(title=f"{numbers['questions']} questions: low at theta, not for long",
                    xlabel="distance from theta, in norms", ylabel="loss of the answer (nats)")
    axes["sharpness"].set(title="Relative sharpness: smaller is wider", xlabel="radius of the ring",
                          ylabel=r"$(L_{ring} - L_\theta) / (1 + L_\theta)$")
    chance_line(axes["L_q"])
    zero_line(axes["sharpness"])
    axes["sharpness"].legend(fontsize=8)
    fig.suptitle(f"Around theta: the loss of {numbers['title']}")
    return fig
