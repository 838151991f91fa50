"""The results page: claim, verdict, picture, criterion and the intervals that decided, from the
JSON of a folder. All other numbers stay in the JSON.

    python -m lab.page assets               # writes assets/README.md
"""
import json
import sys
import textwrap
from pathlib import Path

from lab.run import write

PARTS = ("experiment", "claim", "verdict", "criterion", "numbers", "checkpoints", "command",
         "config", "revision", "seconds")

# Tables that no experiment has written: {file: what they are}
NOTES = {
    "robust": "`python tests/robust.py --long`, an attack on runs and files:",
    "tried": "What was tried while the recipes of `train.py` and `meta.py` were chosen, what did "
             "not help too. A run each (two numbers: two seeds), on one core: percent of 200 to "
             "400 *validation* questions. Differences below four points are noise. What was "
             "chosen is measured in `race` and `further`."}


def results(folder):
    """{name: what an experiment left}, in alphabetical order."""
    by_name = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            by_name[path.stem] = read(path)
        except ValueError as e:
            print(f"note: {path} is left out: {e}", file=sys.stderr)
    return by_name

def read(path):
    """What an experiment left. ValueError if it is damaged."""
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(result, dict) or not set(PARTS) <= set(result):
        raise ValueError("it is not an experiment's JSON of this version")
    return result

def page(folder, pictures=""):
    """The page as text; pictures: where they lie, seen from it."""
    parts, found = ["# Results"], results(folder)
    parts.append(textwrap.fill(
        "Written by `lab/page.py` from the JSON beside each figure. Intervals are of 95 %: "
        "Wilson's for shares, a bootstrap over questions, and over seeds and questions a t "
        "interval with Satterthwaite's degrees of freedom; before one refutes, it is widened "
        "for the number of margins (Bonferroni).", 100))
    mixed = runs_that_changed(found)
    if mixed:
        parts.append(f"**Not all of one model:** {', '.join(mixed)} had other weights when some of "
                     "these figures were made; each says which.")
    parts += [section(*row, pictures) for row in found.items()]
    for name, line in NOTES.items():
        note = Path(folder) / f"{name}.md"
        if note.exists():
            table = note.read_text(encoding="utf-8").strip()
            parts += [f"## {name}", textwrap.fill(line, 100), table]
    return "\n\n".join(parts) + "\n"

def runs_that_changed(results):
    """Folders of which figures name more than one checksum."""
    digits = {}
    for result in results.values():
        for folder, checksum in result["checkpoints"].items():
            digits.setdefault(folder, set()).add(checksum)
    return [f"`{folder}`" for folder, found in digits.items() if len(found) > 1]

def section(name, result, pictures):
    others = result.get("models", [])[1:]
    head = ["margin, above 0 where the claim holds", "95 % interval", "other models"]
    if result["verdict"] == "measured":
        head[0] = "what"
    rows = []
    for what, (mean, low, high) in deciding(result["numbers"]):
        means = ", ".join(f"{model[what][0]:.3g}" for model in others if what in model)
        rows.append([what, f"{mean:.3g} [{low:.3g}, {high:.3g}]", means])
    columns = 3 if others else 2
    rows = [head, ["---"] * 3, *rows]
    table = "\n".join(f"| {' | '.join(row[:columns])} |" for row in rows)
    verdict = textwrap.fill(f"**{result['verdict']}**: {result['claim']}", 100)
    parts = [f"## {name}", verdict, f"![{name}]({pictures}{name}.png)", result["criterion"],
             table if len(rows) > 2 else "", origin(name, result)]
    return "\n\n".join(part for part in parts if part)

def origin(name, result):
    """The command, the weights it looked at, the revision, the time."""
    weights = [f"`{folder}` ({digits})" for folder, digits in result["checkpoints"].items()]
    if result.get("seeds"):
        weights.append(f"{result['seeds']} seeds an arm")
    looked_at = [f"at most {result['config']['questions']} questions a cell", *weights]
    line = (f"`{result['command']}`: {', '.join(looked_at)}; `{name}.json`, revision "
            f"{result['revision']}, evaluated in {result['seconds']} s.")
    return textwrap.fill(line, 100, break_on_hyphens=False)

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
