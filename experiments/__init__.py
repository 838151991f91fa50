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
from dataclasses import asdict
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
    those before it. -> what the JSON holds"""
    experiment = importlib.import_module(f"experiments.{name}")
    began, given, checkpoints = time.perf_counter(), {"c": c}, {}
    makers = {"model": (analyze.sft_model, c.sft), "run": (analyze.meta_run, c.meta)}
    for key in inspect.signature(experiment.measure).parameters:
        if key in makers:
            make, folder = makers[key]
            if key not in models:
                models[key] = make(c, device)
                began = time.perf_counter()         # training is not the experiment's time
            given[key] = models[key]
            checkpoints[folder] = checksum(Path(folder) / "ckpt.pt")
    verdict, numbers = experiment.judge(experiment.measure(**given))
    result = {
        "experiment": name, "claim": experiment.CLAIM, "verdict": verdict,
        "criterion": inspect.getdoc(experiment) or "",      # none under python -OO
        "numbers": numbers, "checkpoints": checkpoints,
        "seeds": c.seeds if hasattr(experiment, "ARMS") or name == "compare" else None,
        "command": typed(name, c), "config": asdict(c), "revision": revision(),
        "seconds": round(time.perf_counter() - began, 1)}
    path = Path(c.out) / "figures" / f"{name}{'-' * bool(c.tag)}{c.tag}.json"
    write(path, result)
    draw(path, result)
    print(f"{path.stem}: {verdict} ({result['seconds']} s)   {path.with_suffix('.png')}")
    if hasattr(experiment, "show"):
        experiment.show(numbers)
    for what, (mean, low, high) in page.deciding(numbers):
        print(f"    {what}: {mean:.3g} [{low:.3g}, {high:.3g}]")
    return result

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
