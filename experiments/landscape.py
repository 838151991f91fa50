"""Does the trajectory lead into a low and wide basin of the answer's loss? (Figs. 2, 12-16)

L_q over two filter-normalised random directions around theta, without the trajectory and with it;
and around the meta-trained theta, and its theta' with the trajectory in the weights. The drawn
paths are parameter motions, projected on their own two principal directions through theta: the
exact patches as tokens enter the context, and the inner loop's theta'_i.

lower at theta: the trajectory in context lowers L_q, and more than another question's does, which
    restates that it helps.
wider at a radius: its relative sharpness there, (L_ring - L_theta) / (1 + L_theta), is smaller than
    without a trajectory, and than with another question's (after 1609.04836, with the mean over a
    ring in place of the maximum).

A ring is eight points in each of three random planes; radii are in filter norms. Each part is
supported if its 95 % intervals over questions lie above 0, refuted if one lies below 0, else
inconclusive. A loss that is high can fall on a ring, and one near 0 only rise: where another
question's trajectory counts as wider, this measure shows no basin of the right one's.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call

from analyze import (as_ids, cell_of, directions, exact_patches, layout, principal, queries,
                     row_loss, surface)
from data import text
from data.tasks import Task, tensors
from lab.figure import COLOURS, mosaic, path_on, scale, whiskers
from lab.flags import fail
from lab.verdict import decide, interval, spoken
from meta import adapted, linear_layers, theta_prime

CLAIM = "Figs. 2, 12-16: with the trajectory the answer's loss is low at theta, and wide around it"
RADII, REACH = (0.1, 0.25, 0.5, 1.0), 0.5   # in the filters' norms: of rings, of the drawn planes
PLANES, RINGED = 3, 50                      # planes, questions of which rings are measured
CONDITIONS = {                              # {condition: (label, colour)}
    "without": ("no trajectory", COLOURS["theta"]),
    "context": ("in the context", COLOURS["correct"]),
    "other": ("another question's", COLOURS["other"])}
LABELS = {"without": r"$\theta$, no trajectory", "context": r"$\theta$, in the context",
          "meta": r"meta-trained $\theta$, no trajectory",
          "weights": r"its $\theta'$, in the weights"}
PATHS = {"implicit": "in the context: the exact patches",
         "explicit": r"in the weights: $\theta'_i$ of the inner loop"}


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    loss: dict                              # {condition: L_q (1 + radii, questions), theta first}
    title: str                              # of the question that is drawn
    sheets: dict                            # {condition: L_q over the plane (grid, grid)}
    paths: dict                             # {kind: Path}


class Path(NamedTuple):
    sheet: np.ndarray                       # L_q over the path's plane (grid, grid)
    sides: list                             # its coordinates, two arrays (grid,)
    points: np.ndarray                      # (points, 2)
    held: float                             # share of the path's squared length in the plane


def measure(c, run, model):
    if run.config["inner"] != "whole":
        fail(f"{c.meta} was trained with --inner={run.config['inner']}: its path is not drawn here")
    cell = cell_of(c)
    plane, *further = [directions(model, c.seed + k) for k in range(PLANES)]
    nothing = [""] * len(cell.questions)
    conditions = {"without": nothing, "context": cell.thinks, "other": cell.others}
    loss = {}
    for name, thinks in conditions.items():
        rows = queries(model, cell.questions[:RINGED], thinks[:RINGED])
        loss[name] = around(model, [plane, *further], *rows)

    e = c.seed % len(cell.questions)        # the question that is drawn
    q, think = cell.questions[e], cell.thinks[e]
    side = torch.linspace(-REACH, REACH, c.grid, device=model.head.weight.device)
    fast, _ = adapted(run.model, run.inner, [Task(q, [think])])
    asked, own_plane = queries(run.model, [q], [""]), directions(run.model, c.seed)
    sheets = {
        "without": sheet(model, *queries(model, [q], [""]), plane, (side, side)),
        "context": sheet(model, *queries(model, [q], [think]), plane, (side, side)),
        "meta": sheet(run.model, *asked, own_plane, (side, side)),
        "weights": sheet(run.model, *asked, own_plane, (side, side), fast)}
    paths = {"implicit": implicit_path(c, model, q, think),
             "explicit": explicit_path(c, run, q, think)}
    return Raw(loss, f"{q.text} = {q.answer}", sheets, paths)

@torch.no_grad()
def around(model, planes, ids, targets):
    """-> L_q at theta, and its mean on every ring (1 + radii, questions). All questions share a
    point's weights, so that they are written out once."""
    paths = linear_layers(model)
    theta = {name: model.get_parameter(path) for name, path in paths.items()}
    angles = [k * math.pi / 4 for k in range(8)]
    rings = [row_loss(model, ids, targets)]
    for radius in RADII:
        losses = []
        for first, second in planes:
            for angle in angles:
                a, b = radius * math.cos(angle), radius * math.sin(angle)
                moved = {paths[name]: w + a * first[name] + b * second[name]
                         for name, w in theta.items()}
                h = functional_call(model, moved, (ids,))
                losses.append(model.score(h, targets).sum(1) / (targets >= 0).sum(1))
        rings.append(torch.stack(losses).mean(0))
    return torch.stack(rings).cpu().numpy()

def sheet(model, ids, targets, plane, sides, fast=None, **kw):
    """L_q of one question over the plane -> (b, a)"""
    a, b = sides
    points = torch.stack(torch.meshgrid(a, b, indexing="xy"), -1).view(-1, 2)

    def spread(v):
        return v.expand(len(points), *v.shape[1:])
    kw = {key: spread(v) for key, v in kw.items()}
    L = surface(model, spread(ids), spread(targets), plane, points, fast, **kw)
    return L.view(len(b), len(a)).cpu().numpy()

def sides_of(points, grid):
    """Coordinates of a grid that holds a path with some room around it."""
    sides = []
    for v in points.T:
        low, high = v.min(), v.max() + 1e-6
        room = 0.35 * (high - low)
        sides.append(torch.linspace(float(low - room), float(high + room), grid, device=v.device))
    return sides

def as_planes(d, shapes):
    """Two flat directions -> [{layer: tensor}]"""
    sizes = [shape.numel() for shape in shapes.values()]
    return [{name: part.view(shape) for (name, shape), part in zip(shapes.items(), x.split(sizes))}
            for x in d]

def implicit_path(c, model, q, think):
    """The exact patches as one token after the other enters the context."""
    T = len(think)
    ids = as_ids([q] * (T + 1), [think] * (T + 1))
    patches = exact_patches(model, *ids, list(range(T + 1)), bias=True).patches
    matrices = {}
    for name, (p, z) in patches.items():
        zz = z.square().sum(-1)[..., None, None].clamp(min=1e-30)
        matrices[name] = p[..., None] * z[..., None, :] / zz            # (T + 1, n, out, in)
    d, points, held = principal(torch.cat([m.flatten(1) for m in matrices.values()], 1))
    plane = as_planes(d, {name: m.shape[1:] for name, m in matrices.items()})

    rows = layout(model, *as_ids([q], [think]))
    target = torch.full_like(rows.ids, text.IGNORE)
    target[0, -rows.n:] = torch.tensor(ids[2][0][1:])
    sides = sides_of(points, c.grid)
    L = sheet(model, rows.ids, target, plane, sides, pos=rows.pos, mask=rows.mask(rows.nothing()))
    return Path(L, [v.cpu().numpy() for v in sides], points.cpu().numpy(), held)

def explicit_path(c, run, q, think):
    """theta'_i of the inner loop on the first i tokens."""
    model, inner, _ = run
    steps = []
    for i in range(1, len(think) + 1):
        support, _ = tensors([Task(q, [think[:i]])], model.head.weight.device)
        moved = theta_prime(model, inner, [(support.ids, support.inner)], create_graph=False)
        change = [(w - model.get_parameter(path)).detach() for path, w in moved.items()]
        steps.append(torch.cat([d.flatten() for d in change]))
    d, points, held = principal(torch.stack([torch.zeros_like(steps[0]), *steps]))
    plane = as_planes(d, {name: w.shape for name, w in zip(inner.names, moved.values())})
    sides = sides_of(points, c.grid)
    L = sheet(model, *queries(model, [q], [""]), plane, sides)
    return Path(L, [v.cpu().numpy() for v in sides], points.cpu().numpy(), held)


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    verdicts, gaps = {}, {}
    for part, found in margins(raw.loss).items():
        verdicts[part], gaps[part] = decide(found)
    return spoken(verdicts), {
        "gaps": gaps, "title": raw.title, "questions": raw.loss["without"].shape[1],
        "L_q": {name: [interval(row) for row in L] for name, L in raw.loss.items()},
        "sharpness": {name: [interval(row) for row in sharpness(L)]
                      for name, L in raw.loss.items()},
        "sheets": {name: np.round(L, 3).tolist() for name, L in raw.sheets.items()},
        "paths": {kind: {"sheet": np.round(path.sheet, 3).tolist(),
                         "sides": [np.round(v, 4).tolist() for v in path.sides],
                         "points": np.round(path.points, 4).tolist(),
                         "share of squared length in the plane": round(path.held, 3)}
                  for kind, path in raw.paths.items()}}

def sharpness(L):
    """L_q (1 + radii, questions) -> how much it rises on every ring, relatively (radii,
    questions)"""
    return (L[1:] - L[0]) / (1 + L[0])

def margins(loss):
    """{condition: L_q (1 + radii, questions)} -> {part of the claim: margins}"""
    without, context, other = (loss[name] for name in CONDITIONS)
    parts = {"lower at theta": {"without - in context": without[0] - context[0],
                                "another's - in context": other[0] - context[0]}}
    sharp = sharpness(context)
    gaps = zip(RADII, sharpness(without) - sharp, sharpness(other) - sharp)
    for radius, gap, control in gaps:
        parts[f"wider at {radius:g}"] = {"sharpness without - in context": gap,
                                         "sharpness with another's - in context": control}
    return parts


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    sheets = {name: np.array(L) for name, L in numbers["sheets"].items()}
    side = np.linspace(-REACH, REACH, len(sheets["without"]))
    middle = len(side) // 2
    top = 2.5 * max(0.1, sheets["without"][middle, middle])
    layout = [["without", "context", "implicit", "loss"],
              ["meta", "weights", "explicit", "sharpness"]]
    fig, axes = mosaic(layout, (16, 7.2), width_ratios=(1.1, 1.1, 1.1, 1))
    for name, L in sheets.items():
        shade = draw_sheet(axes[name], L, side, top)
        axes[name].set(title=LABELS[name])
        scale(fig, shade, axes[name])
    for kind, path in numbers["paths"].items():
        draw_path(fig, axes[kind], path)
        held = path["share of squared length in the plane"]
        axes[kind].set(title=f"{PATHS[kind]}\n{held:.0%} of its squared length in this plane",
                       xlabel="principal direction 1", ylabel="principal direction 2")
    draw_rings(axes["loss"], numbers["L_q"], (0, *RADII))
    axes["loss"].set(title=f"around $\\theta$, {numbers['questions']} questions", ylim=(0, None),
                     ylabel="$L_q$ (nats a token)")
    axes["loss"].legend(fontsize=8)
    draw_rings(axes["sharpness"], numbers["sharpness"], RADII)
    axes["sharpness"].axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes["sharpness"].set(title="relative sharpness: smaller is wider",
                          ylabel=r"$(L_{ring} - L_\theta) / (1 + L_\theta)$")
    fig.suptitle(f"{numbers['title']}   (plus: the middle, or where a path begins; star: its end)")
    return fig

def draw_rings(ax, rows, radii):
    """A number a radius, with its interval, for every condition."""
    for name, (label, colour) in CONDITIONS.items():
        whiskers(ax, radii, rows[name], colour, label=label)
    ax.set(xlabel="radius (filter norms)")

def draw_sheet(ax, L, side, top):
    levels = np.linspace(0, top, 15)
    shade = ax.contourf(side, side, np.minimum(L, top), levels, cmap="cividis")
    ax.plot(0, 0, "P", color="white", ms=8, mec="black")
    ax.set(xlabel="direction 1 (filter norms)", ylabel="direction 2 (filter norms)")
    return shade

def draw_path(fig, ax, path, size=1.0):
    """A path over its plane, with the scale of the contours."""
    shade = path_on(ax, np.array(path["sheet"]), path["sides"], np.array(path["points"]), size)
    scale(fig, shade, ax)
