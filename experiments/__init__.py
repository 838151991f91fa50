"""One file a figure, each of the same four parts, to be read from top to bottom:

    docstring   the question, and its criterion in words
    measure     a model -> raw numbers, one a question or run
    judge       raw numbers -> verdict, and what the JSON keeps; needs no model
    draw        the JSON's numbers -> a figure; needs neither model nor raw numbers
    show        (if there is more to print than what decided) the JSON's numbers -> text

`run` puts them together. `measure` asks for what it needs by the names of its arguments: `c`, the
command line; `model`, that of --sft; `run`, that of --meta. A new experiment is a new file here,
with a CLAIM, and nothing else.
"""
import importlib
import inspect
import re
import shlex
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import analyze
from experiments import poster
from lab import page
from lab.flags import fail
from lab.run import checksum, revision, write

FOLDER = Path(__file__).parent


def known():
    """{name of an experiment: the first sentence of its docstring}."""
    names = {}
    for path in sorted(FOLDER.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if re.search(r"^CLAIM = ", source, re.M):
            names[path.stem] = " ".join(source[3:].split("\n\n")[0].split()).rstrip('"')
    return names

def run(name, c, device, models):
    """One experiment: its verdict, numbers and figure in OUT/figures. models: what was loaded for
    those before it. -> what the JSON holds

    Where --sft and --meta name several runs it is repeated on each: the numbers and the figure are
    of the first, the verdict is of all."""
    experiment = importlib.import_module(f"experiments.{name}")
    wanted = inspect.signature(experiment.measure).parameters
    judged, checkpoints, seconds = [], {}, 0.0
    for one in each_model(c, wanted):
        given = {"c": one}
        for key in [key for key in wanted if key in makers(one)]:
            make, folder = makers(one)[key]
            if folder not in models:
                models[folder] = make(one, device)
            given[key] = models[folder]
            checkpoints[folder] = checksum(Path(folder) / "ckpt.pt")
        began = time.perf_counter()                 # training is not the experiment's time
        judged.append(experiment.judge(experiment.measure(**given)))
        seconds += time.perf_counter() - began
    verdict, numbers = together([verdict for verdict, _ in judged]), judged[0][1]
    result = {
        "experiment": name, "claim": experiment.CLAIM, "verdict": verdict,
        "criterion": inspect.getdoc(experiment) or "",      # none under python -OO
        "numbers": numbers, "models": [dict(page.deciding(row)) for _, row in judged],
        "checkpoints": checkpoints,
        "seeds": c.seeds if hasattr(experiment, "ARMS") or name == "compare" else None,
        "command": typed(name, c), "config": asdict(c), "revision": revision(),
        "seconds": round(seconds, 1)}
    path = Path(c.out) / "figures" / f"{name}{'-' * bool(c.tag)}{c.tag}.json"
    write(path, result)
    draw(path, result)
    print(f"{path.stem}: {verdict} ({result['seconds']} s)   {path.with_suffix('.png')}")
    if hasattr(experiment, "show"):
        experiment.show(numbers)
    for what, (mean, low, high) in page.deciding(numbers):
        print(f"    {what}: {mean:.3g} [{low:.3g}, {high:.3g}]")
    return result

def makers(c):
    """{name of an argument of `measure`: (what makes it, the folder it comes from)}"""
    return {"model": (analyze.sft_model, c.sft), "run": (analyze.meta_run, c.meta)}

def each_model(c, wanted):
    """The command line for every run that --sft and --meta name, separated by commas, pair by
    pair."""
    sft, meta = c.sft.split(","), c.meta.split(",")
    if {"model", "run"} <= set(wanted) and len(sft) != len(meta):
        fail(f"{len(sft)} runs in --sft and {len(meta)} in --meta: they are looked at in pairs")
    n = max([1] + [len(folders) for key, folders in (("model", sft), ("run", meta))
                   if key in wanted])
    return [replace(c, sft=sft[min(i, len(sft) - 1)], meta=meta[min(i, len(meta) - 1)])
            for i in range(n)]

def together(verdicts):
    """Verdicts on several models, part by part: `a: supported in 3 of 3`."""
    if len(verdicts) == 1 or set(verdicts) == {"measured"}:
        return verdicts[0]
    spoken = []
    for parts in zip(*(verdict.split("; ") for verdict in verdicts)):
        name = parts[0].rpartition(": ")[0]
        counts = Counter(part.rpartition(": ")[2] for part in parts).most_common()
        words = ", ".join(f"{word} in {n}" for word, n in counts)
        spoken.append(f"{name}: {words}".removeprefix(": ") + f" of {len(verdicts)}")
    return "; ".join(spoken)

def typed(name, c):
    """What to type to run it again."""
    words = ["python analyze.py", name]
    for key, value in asdict(c).items():
        if value != getattr(analyze.Analyze, key) and key not in ("names", "out", "arm"):
            words.append(f"--{key}={shlex.quote(str(value))}")
    return " ".join([*words, *(f"--arm={shlex.quote(arm)}" for arm in c.arm)])

def draw(path, result):
    """The figure of an experiment, beside its JSON."""
    experiment = importlib.import_module(f"experiments.{result['experiment']}")
    experiment.draw(result["numbers"]).savefig(path.with_suffix(".png"))

def redraw(c):
    """The named figures of OUT/figures, or all and the poster, from their JSON."""
    folder = figures(c)
    paths = [folder / f"{name}.json" for name in c.names] or sorted(folder.glob("*.json"))
    for path in paths:
        if not path.exists():
            fail(f"there is no {path} to draw from")
        try:
            draw(path, page.read(path))
        except ValueError as e:
            fail(f"{path} is damaged: {e}")
        print(path.with_suffix(".png"))
    if not c.names:
        poster.draw(page.results(folder)).savefig(folder / "poster.png")

def report(c):
    """OUT/report.md and the poster, from whatever stands in OUT/figures."""
    folder = figures(c)
    poster.draw(page.results(folder)).savefig(folder / "poster.png")
    write(Path(c.out) / "report.md", page.page(folder, "figures/"))
    print(f"report: {Path(c.out) / 'report.md'}")

def figures(c):
    """The folder of figures. Exits 2 with a line where there is nothing in it."""
    folder = Path(c.out) / "figures"
    if not list(folder.glob("*.json")):
        fail(f"there is nothing in {folder} to draw from")
    return folder
