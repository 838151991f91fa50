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

matplotlib.rcdefaults()                             # whatever a matplotlibrc says
matplotlib.rcParams.update({
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "figure.dpi": 150, "savefig.dpi": 150, "figure.constrained_layout.use": True,
    "legend.frameon": False, "lines.linewidth": 1.6})

# Okabe and Ito's palette (colour-blind safe), by what is drawn: the same everywhere. Arms of a
# comparison, whose labels name them, are all light.
COLOURS = {
    "correct": "#0072B2",           # the right trajectory, in the context
    "weights": "#009E73",           # ... in the weights: theta'
    "theta": "#CC79A7",             # no trajectory
    "other": "#E69F00",             # another question's trajectory
    "wrong": "#D55E00",             # a trajectory with a mistake in it
    "filler": "#999999",            # no content
    "light": "#56B4E9"}             # anything else
INK = "#333333"


def panels(rows, columns, width=3.7, heights=None, **options):
    """-> (figure, axes (rows, columns))."""
    heights = heights or [2.7] * rows
    fig = Figure(figsize=(width * columns, sum(heights)))
    return fig, fig.subplots(rows, columns, squeeze=False, height_ratios=heights, **options)

def band(ax, x, summaries, colour, label=None, style="-"):
    """A mean curve with its interval, summaries a [mean, low, high] per x."""
    mean, low, high = np.transpose(summaries)
    ax.plot(x, mean, style, color=colour, label=label, ms=3)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)

def boxes(ax, rows, least=1e-17):
    """A horizontal box of numbers per row, {label: numbers}, on a logarithmic axis."""
    values = [np.maximum(v, least) for v in rows.values()]
    ax.boxplot(values, orientation="horizontal", tick_labels=list(rows), widths=0.6,
               flierprops={"markersize": 2})
    ax.set(xscale="log")

def bars(ax, rows, **labels):
    """A horizontal bar per row, {label: {"mean": [mean, low, high], "seeds": [a value per
    seed]}, or None: not measured}."""
    for i, row in enumerate(rows.values()):
        if row is None:
            continue
        mean, low, high = row["mean"]
        ax.barh(i, mean, 0.7, color=COLOURS["light"])
        ax.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="none", ecolor=INK, lw=0.8)
        ax.plot(row.get("seeds", []), [i] * len(row.get("seeds", [])), ".", color=INK, ms=3)
    ax.set_yticks(range(len(rows)), [textwrap.fill(name, 40) for name in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), **labels)

def chance_line(ax):
    """ln 10: the loss of a digit for somebody who knows nothing."""
    ax.axhline(np.log(10), color="#999999", lw=0.8, ls=":", zorder=0)
    ax.text(1, np.log(10), "ln 10", transform=ax.get_yaxis_transform(), va="bottom", ha="right",
            fontsize=7, color="#777777")
