"""Writes the results page from the JSON of a folder: a table of claims, then for each the verdict,
picture, criterion and the intervals that decided. All other numbers stay in the JSON.

    python -m experiments.page assets       # writes assets/README.md

What somebody made of the results stands in words.md, if the folder has one: a table of claims, then
a section per experiment. `{curve: the law}` in it becomes that verdict, `{curve: direction, falls}`
that number.
"""
import json
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

from experiments import experiment_of, known, spoken
from lab.flags import fail
from lab.run import write

SAID = {"supported": "holds", "refuted": "does not hold", "inconclusive": "undecided",
        "not testable here": "cannot be tested here"}
PARTS = ("experiment", "claim", "verdicts", "criterion", "numbers", "gaps", "checkpoints",
         "command", "config", "revision", "seconds")


def read(path) -> dict:
    """Reads what an experiment left. ValueError if it is damaged."""
    def refuse(word):
        raise ValueError(f"it has {word} for a number")
    result = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    if not isinstance(result, dict) or not set(PARTS) <= set(result) or not result["config"]:
        raise ValueError("it is not an experiment's JSON of this version")
    if result["experiment"] not in known():
        raise ValueError(f"there is no experiment {result['experiment']!r} in this version")
    return result

def results(folder) -> dict:
    """{name: what an experiment left}, in alphabetical order."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found[path.stem] = read(path)
        except ValueError as e:
            print(f"note: {path} is left out: {e}", file=sys.stderr)
    if not found:
        fail(f"there is nothing in {folder} to report")
    return found

def page(folder, pictures: str = "") -> str:
    """The page as text; pictures: where they lie, seen from it."""
    found, words = results(folder), Path(folder) / "words.md"
    rows = ["| figure | claim | verdict |", "|---|---|---|"]
    for name, result in found.items():
        verdicts = "<br>".join(spoken(result["verdicts"]))
        rows.append(f"| [{name}](#{name}) | {result['claim']} | {verdicts} |")
    text = filled(words.read_text(encoding="utf-8"), found) if words.exists() else "\n".join(rows)
    table, *more = re.split(r"^## (.+)\n", text, flags=re.M)
    written = dict(zip(more[::2], map(str.strip, more[1::2])))
    parts = ["# Results", textwrap.fill(
        "Written by `python -m experiments.page assets` from the JSON beside each figure. "
        "Intervals are of 95 %: Wilson's for shares, a bootstrap over questions, and Student's "
        "over seeds. Before one refutes, it is widened for the number of margins "
        "(Bonferroni).", 100),
        table.strip(), *(section(*row, pictures, written.pop(row[0], "")) for row in found.items()),
        *(f"## {name}\n\n{rest}" for name, rest in written.items())]
    return "\n\n".join(parts) + "\n"

def filled(text: str, found: dict) -> str:
    """Puts verdicts and numbers where a text wants them."""
    def value(match):
        result, what = found[match[1]], match[2]
        if what in result["verdicts"][0]:
            counts = Counter(SAID[row[what]] for row in result["verdicts"]).most_common()
            n = len(result["verdicts"])
            return ", ".join(word if times == n else f"{word} ({times} of {n} models)"
                             for word, times in counts)
        numbers = result["numbers"] | result["numbers"].get("says", {}) | result["gaps"][0]
        return "{:.3g} [{:.3g}, {:.3g}]".format(*numbers[what])
    return re.sub(r"\{(\w+): ([^}]+)\}", value, text)

def section(name: str, result: dict, pictures: str, words: str) -> str:
    first, *others = result["gaps"]
    head = ["margin, above 0 where the claim holds", "95 % interval", "other models"]
    rows = []
    for what, (mean, low, high) in first.items():
        ends = ", ".join("none" if end is None else f"{end:.3g}" for end in (low, high))
        means = ", ".join(f"{model[what][0]:.3g}" for model in others if what in model)
        rows.append([what, f"{mean:.3g} [{ends}]", means])
    columns = 3 if others else 2
    table = "\n".join(f"| {' | '.join(row[:columns])} |" for row in [head, ["---"] * 3, *rows])
    verdicts = "\n".join(f"- **{line}**" for line in spoken(result["verdicts"]))
    words = words or f"{result['claim']}.\n\n{verdicts}"
    show = getattr(experiment_of(result["experiment"]), "show", lambda numbers: [])
    shown = "\n".join(f"    {line}" for line in show(result["numbers"]))
    weights = [f"`{folder}` ({digits})" for folder, digits in result["checkpoints"].items()]
    if result.get("seeds"):
        weights.append(f"{result['seeds']} seeds per arm")
    looked_at = [f"at most {result['config']['questions']} questions per cell", *weights]
    origin = (f"`{result['command']}`: {', '.join(looked_at)}; `{name}.json`, revision "
              f"{result['revision']}, {result['seconds']} s.")
    parts = [f"## {name}", words, f"![{name}]({pictures}{name}.png)", shown,
             result["criterion"], table if rows else "",
             textwrap.fill(origin, 100, break_on_hyphens=False)]
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    write(Path(sys.argv[1]) / "README.md", page(sys.argv[1]))
