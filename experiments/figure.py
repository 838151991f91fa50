"""How every figure looks: colours, bands, bars, a trajectory written under its curve.

A figure is drawn from an experiment's JSON and from nothing else, so a new label needs no new run:

    python analyze.py curve --redraw
"""
import os
import textwrap

os.environ.pop("MPLBACKEND", None)                  # a notebook's, which may not exist here

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette (colour-blind safe), by what is drawn: the same everywhere. Arms of a
# comparison, whose labels name them, are all light, or take these colours in turn.
COLOURS = {
    "correct": "#0072B2",           # the right trajectory, in the context
    "other": "#E69F00",             # another question's trajectory
    "weights": "#009E73",           # the right one, in the weights: theta'
    "theta": "#CC79A7",             # no trajectory
    "wrong": "#D55E00",             # a trajectory with a mistake in it
    "light": "#56B4E9",             # anything else
    "ink": "#333333",
    "filler": "#999999"}            # no content
INK = COLOURS["ink"]
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}        # where a legend may stand

matplotlib.rcdefaults()                             # whatever a matplotlibrc says
matplotlib.rcParams.update({
    "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 7, "lines.linewidth": 1.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=[*COLOURS.values()]),
    "figure.dpi": 150, "savefig.dpi": 150, "figure.constrained_layout.use": True})


def panels(columns=1, width=3.7, height=2.7, rows=1):
    """-> (figure, its axes, row by row)."""
    fig = Figure(figsize=(width * columns, height * rows))
    return fig, *fig.subplots(rows, columns, squeeze=False).flat

def band(ax, x, summaries, colour, label=None, style="-"):
    """A mean curve with its interval, summaries a [mean, low, high] per x."""
    mean, low, high = np.transpose(summaries)
    ax.plot(x, mean, style, color=colour, label=label, ms=3)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)

def bars(ax, rows, **labels):
    """A horizontal bar per row, {label: {"mean": [mean, low, high], "seeds": [one per seed]}}."""
    for i, row in enumerate(rows.values()):
        mean, low, high = row["mean"]
        ax.barh(i, mean, 0.7, color=COLOURS["light"])
        ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="none", ecolor=INK, lw=0.8)
        ax.plot(row.get("seeds", []), [i] * len(row.get("seeds", [])), ".", color=INK, ms=3)
    ax.set_yticks(range(len(rows)), [textwrap.fill(name, 40) for name in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), **labels)

def losses(ax, legend={}, **labels):
    """A digit's loss from 0 on, with that of somebody who knows nothing, and a legend."""
    ax.axhline(np.log(10), color="#999999", lw=0.8, ls=":", zorder=0)
    ax.text(1, np.log(10), "ln 10", transform=ax.get_yaxis_transform(), va="bottom", ha="right",
            fontsize=7, color="#777777")
    ax.set(**{"ylim": (0, None)} | labels)
    ax.legend(**legend)
