"""The results page: claim, verdict, picture, criterion and the intervals that decided, from the
JSON of a folder. All other numbers stay in the JSON.

    python -m experiments.page assets               # writes assets/README.md
"""
import json
import sys
from pathlib import Path

from lab.flags import fail
from lab.run import write


def results(folder):
    """{name: what an experiment left}, in alphabetical order."""
    by_name = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            by_name[path.stem] = json.loads(path.read_text())
        except json.JSONDecodeError as e:
            fail(f"{path} is damaged: {e}")
    return by_name

def page(folder, pictures=""):
    """The page as text; pictures: where they lie, seen from it."""
    head = ["# Results", "Written by `experiments/page.py` from the JSON beside each figure."]
    return "\n\n".join(head + [section(*r, pictures) for r in results(folder).items()]) + "\n"

def section(name, result, pictures):
    margins = [f"| {what} | {mean:.3g} [{low:.3g}, {high:.3g}] |"
               for what, (mean, low, high) in deciding(result["numbers"])]
    table = "\n".join(["| what decides | estimate [95 % interval] |", "|---|---|", *margins])
    parts = [f"## {name}", f"**{result['verdict']}**: {result['claim']}",
             f"![{name}]({pictures}{name}.png)", result["criterion"], table if margins else "",
             origin(name, result)]
    return "\n\n".join(part for part in parts if part)

def origin(name, result):
    """The command, the weights it looked at, the revision, the time."""
    config, models = result["config"], result["checkpoints"]
    if models:
        weights = ", ".join(f"`{folder}` ({digits})" for folder, digits in models.items())
        models = f"one model: {weights}"
    else:
        models = f"{config['seeds']} seeds an arm"
    return (f"`{result['command']}`: {config['questions']} questions a cell, {models}; "
            f"`{name}.json`, revision {result['revision']}, {result['seconds']} s.")

def deciding(node, name="", inside=False):
    """Every [estimate, low, high] under a key `margins` or `gaps` -> (its path in words, it)."""
    if isinstance(node, dict):
        for key, child in node.items():
            mark = key in ("margins", "gaps")
            path = name if mark else f"{name}, {key}".strip(", ")
            yield from deciding(child, path, inside or mark)
    elif inside and isinstance(node, list) and len(node) == 3:
        yield name, node


if __name__ == "__main__":
    write(Path(sys.argv[1]) / "README.md", page(sys.argv[1]))
