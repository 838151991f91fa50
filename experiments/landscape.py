"""Does the trajectory lead into a low and wide basin of the answer's loss? (Figs. 2, 12-16)

L_q over two filter-normalised random directions around theta, without the trajectory and with it;
and around the meta-trained theta, and its theta' with the trajectory in the weights. The drawn
paths are parameter motions, projected on their own two principal directions through theta: the
exact patches as tokens enter the context, and the inner loop's theta'_i.

Supported if, over questions, the trajectory in context lowers L_q at theta more than another
question's does, and so far that all around, on a ring of radius 0.25, it stays below L_q at theta
without a trajectory: 95 % intervals above 0; refuted if one lies below 0; else inconclusive.
"""
from typing import NamedTuple

import numpy as np
import torch

from analyze import (as_ids, cell_of, directions, exact_patches, layout, principal, queries,
                     surface)
from data import text
from data.tasks import Task, tensors
from lab.figure import mosaic, path_on, scale
from lab.flags import fail
from lab.verdict import decide, interval
from meta import adapted, theta_prime

CLAIM = "Figs. 2, 12-16: with the trajectory the answer's loss is low at theta and around it"
RING, REACH = 0.25, 0.5                     # of the filters' norms
LABELS = {"without": r"$\theta$, no trajectory", "context": r"$\theta$, in the context",
          "meta": r"meta-trained $\theta$, no trajectory",
          "weights": r"its $\theta'$, in the weights"}
PATHS = {"implicit": "in the context: the exact patches",
         "explicit": r"in the weights: $\theta'_i$ of the inner loop"}


# --------------------------------------------------------------------------------------- measure

class Raw(NamedTuple):
    loss: dict                              # {condition: (at theta, on the ring), a question}
    title: str                              # of the question that is drawn
    sheets: dict                            # {condition: L_q over the plane (grid, grid)}
    paths: dict                             # {kind: Path}


class Path(NamedTuple):
    sheet: np.ndarray                       # L_q over the path's plane (grid, grid)
    sides: list                             # its coordinates, two arrays (grid,)
    points: np.ndarray                      # (points, 2)
    held: float                             # share of the path's squared length in the plane


def measure(c, model, run):
    if run.config["inner"] != "whole":
        fail(f"{c.meta} was trained with --inner={run.config['inner']}: its path is not drawn here")
    cell, plane = cell_of(c), directions(model, c.seed)
    nothing = [""] * len(cell.questions)
    conditions = {"without": nothing, "context": cell.thinks, "other": cell.others}
    loss = {name: around(model, plane, *queries(model, cell.questions, thinks))
            for name, thinks in conditions.items()}

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

def around(model, plane, ids, targets):
    """-> (L_q at theta, mean over eight points of the ring), a number a question each"""
    angle = torch.arange(8, device=ids.device) * (2 * np.pi / 8)
    ring = RING * torch.stack((angle.cos(), angle.sin()), 1)
    points = torch.cat((torch.zeros_like(ring[:1]), ring))              # (9, 2)
    rows = [v.repeat_interleave(len(points), 0) for v in (ids, targets)]
    L = surface(model, *rows, plane, points.repeat(len(ids), 1))
    L = L.view(-1, len(points)).cpu().numpy()
    return L[:, 0], L[:, 1:].mean(1)

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
    verdict, gaps = decide(margins(raw.loss))
    return verdict, {
        "gaps": gaps, "title": raw.title,
        "L_q": {name: {"at theta": interval(centre), "on the ring": interval(ring)}
                for name, (centre, ring) in raw.loss.items()},
        "sheets": {name: np.round(L, 3).tolist() for name, L in raw.sheets.items()},
        "paths": {kind: {"sheet": np.round(path.sheet, 3).tolist(),
                         "sides": [np.round(v, 4).tolist() for v in path.sides],
                         "points": np.round(path.points, 4).tolist(),
                         "share of squared length in the plane": round(path.held, 3)}
                  for kind, path in raw.paths.items()}}

def margins(loss):
    """{condition: (at theta, on the ring)}, a number a question each -> margins"""
    (without, _), (centre, ring), (other, _) = loss["without"], loss["context"], loss["other"]
    return {"without - in context, at theta": without - centre,
            "another's - in context, at theta": other - centre,
            "without, at theta - in context, on the ring": without - ring}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    sheets = {name: np.array(L) for name, L in numbers["sheets"].items()}
    side = np.linspace(-REACH, REACH, len(sheets["without"]))
    middle = len(side) // 2
    top = 2.5 * max(0.1, sheets["without"][middle, middle])
    layout = [["without", "context", "implicit"], ["meta", "weights", "explicit"]]
    fig, axes = mosaic(layout, (12.5, 7.2))
    for name, L in sheets.items():
        shade = draw_sheet(axes[name], L, side, top)
        axes[name].set(title=LABELS[name])
        scale(fig, shade, axes[name])
    for kind, path in numbers["paths"].items():
        draw_path(fig, axes[kind], path)
        held = path["share of squared length in the plane"]
        axes[kind].set(title=f"{PATHS[kind]}\n{held:.0%} of its squared length in this plane",
                       xlabel="principal direction 1", ylabel="principal direction 2")
    fig.suptitle(f"{numbers['title']}   (plus: the middle, or where a path begins; star: its end)")
    return fig

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
