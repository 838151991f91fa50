"""One page to project: the two readings of a trajectory side by side, the landscape with its path,
accuracies, and every claim with its verdict in a few words. Drawn from the JSON of all experiments.
"""
import textwrap

from experiments import explicit, landscape
from lab.figure import COLOURS, INK, mosaic

SHOWN = ("further", "further_wrong", "further_other", "cut")
INKS = {"supported": COLOURS["weights"], "refuted": COLOURS["wrong"]}


def draw(results):
    """{experiment: what its JSON holds} -> a figure"""
    layout = [["curves", "implicit", "explicit"], ["bars", "claims", "claims"]]
    fig, axes = mosaic(layout, (14, 14), height_ratios=(1, 2.3))
    if "explicit" in results:
        numbers = results["explicit"]["numbers"]
        explicit.draw_curves(axes["curves"], numbers)
        explicit.draw_bars(axes["bars"], numbers, SHOWN)
        axes["bars"].set(title="share right after a trajectory that is ...")
        axes["bars"].legend(ncols=1, loc="upper right", fontsize=8)
    if "landscape" in results:
        titles = {"implicit": "its path in the context: exact patches",
                  "explicit": r"its path in the weights: $\theta'_i$"}
        for kind, path in results["landscape"]["numbers"]["paths"].items():
            landscape.draw_path(fig, axes[kind], path, size=1.25)
            axes[kind].set(title=titles[kind], xticks=[], yticks=[],
                           xlabel=r"the path's principal plane; plus: $\theta$, star: its end")
    for ax in axes.values():
        if not ax.has_data():
            ax.set_axis_off()
    claims = {name: r for name, r in results.items() if r["verdict"] != "measured"}
    draw_claims(axes["claims"], claims)
    fig.suptitle("Reasoning as an inner loop: the same trajectory in the context and in the "
                 "weights (after arXiv 2505.19815)", fontsize=13)
    return fig

def draw_claims(ax, results):
    """A row a claim, as high as its text: its name, what it says, its verdict."""
    rows = []
    for name, result in results.items():
        claim, verdict = textwrap.fill(result["claim"], 72), result["verdict"].replace("; ", "\n")
        lines = 1 + max(claim.count("\n"), verdict.count("\n"))
        rows.append((name, claim, verdict, lines + 0.5))
    whole, above = sum(lines for *_, lines in rows), 0
    ax.set(xlim=(0, 1), ylim=(0, 1))
    for name, claim, verdict, lines in rows:
        y = 1 - (above + lines / 2) / whole
        above += lines
        ax.text(0, y, name, weight="bold", va="center", fontsize=8)
        ax.text(0.17, y, claim, va="center", fontsize=7.5)
        ax.text(0.71, y, verdict, va="center", fontsize=7.5, color=ink(verdict))

def ink(verdict):
    """Green or red where a verdict is of one kind."""
    words = {word for word in ("supported", "refuted", "inconclusive") if word in verdict}
    return INKS.get(words.pop(), INK) if len(words) == 1 else INK
