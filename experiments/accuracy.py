"""How often is the model right, with a trajectory and without? (the premise of everything else)

Exact match of greedy answers to held-out questions. Nothing is claimed: several runs of one recipe
(`--sft=RUN,RUN,...`) say how far seeds differ.
"""
from analyze import cells_of
from lab.figure import COLOURS, panels, whisker
from lab.score import held_out, right
from lab.verdict import interval

CLAIM = "how often the model is right, with its own trajectory and without any"
CELLS = "expr:3,4 sum:4,5 modsum:3,4"
MODES = {"trajectory": COLOURS["correct"], "direct": COLOURS["theta"]}


def measure(c, model):
    """-> {cell: {mode: right? a question}}"""
    return {f"{domain} {k}": {mode: right(model, held_out(domain, k, c.questions), mode)
                              for mode in MODES}
            for domain, k in cells_of(c.cells or CELLS)}

def judge(cells):
    return "measured", {"gaps": {
        name: {mode: interval(v) for mode, v in row.items()} for name, row in cells.items()}}

def draw(numbers):
    fig, ((ax,),) = panels(1, 1, width=6, heights=[3])
    for i, row in enumerate(numbers["gaps"].values()):
        for j, (mode, colour) in enumerate(MODES.items()):
            whisker(ax, i + 0.36 * (j - 0.5), row[mode], colour, width=0.34,
                    label=mode if i == 0 else None)
    ax.set_xticks(range(len(numbers["gaps"])), list(numbers["gaps"]))
    ax.set(ylabel="share right", xlabel="domain, operands", ylim=(0, 1.25))
    ax.legend(ncols=2)
    return fig
