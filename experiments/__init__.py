"""One file a figure, each of the same four parts, to be read from top to bottom:

    docstring   the question, and its criterion in words
    measure     models -> raw numbers, one per question or run; or yields them as they grow
    judge       raw numbers -> ({part of the claim: verdict}, what the JSON keeps); needs no model
    draw        the JSON's numbers -> a figure; needs neither model nor raw numbers

`run` puts them together. A new experiment is a new file here, with a CLAIM, and nothing else.
Comparisons of trainings are entries of a table in `trainings.py`.
"""
import importlib
import inspect
import re
import shlex
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import meta
import train
from data import arithmetic
from lab.flags import chosen, fail, flag, flags
from lab.run import checksum, device_of, revision, write
from lab.score import held_out

TOUR = ("curve", "explicit", "step", "patch", "gradient")       # what runs unasked


@dataclass
class Analyze:
    """Experiments on a trained model; each writes a figure, its data and a verdict to --out."""
    names: tuple = flag((), "experiments; none: the tour", words=True)
    sft: str = flag("out/sft", "runs of train.py to look at; the default one is made")
    meta: str = flag("out/meta", "runs of meta.py to look at; the default one is made")
    out: str = flag("out", "figures go to OUT/figures, runs of comparisons to OUT/runs")
    tag: str = flag("", "a suffix of the figure's name: NAME-TAG")
    redraw: bool = flag(False, "draw from OUT/figures/NAME.json, without a model")
    questions: int = flag(200, "held-out questions per cell", 20, 1e5)
    cells: str = flag("", "of questions, such as 'expr:5,6 sum:5'; empty: as NAME says")
    seed: int = flag(0, "of trajectories and corruptions")
    seeds: int = flag(5, "runs per arm, where an experiment trains", 1, 1000)
    jobs: int = flag(0, "of those at a time; 0: one per CPU core, or one GPU", 0, 1000)
    arm: tuple = flag((), "compare: an arm's flags; give it once per arm")
    ask: str = flag("", "walk, byhand: a question of your own, of 3 to 6 operands")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "cuda where there is one; a Mac: cpu")
    threads: int = flag(0, "CPU threads; 0: as many as torch chooses", 0, 1000)

    script = "analyze.py"


# ------------------------------------------------------------------------- models and questions

class Runs:
    """The runs that a command line names, loaded when asked for. The default ones are trained first
    where they are missing. `checkpoints`: {folder: checksum} of what an experiment looked at;
    others: of what it had looked at before."""

    def __init__(self, c, device, others: dict):
        self.c, self.device, self.others, self.checkpoints = c, device, others, {}

    def sft(self):
        return self.get(self.c.sft, train, train.load_model)[0]

    def meta(self):
        """The run of --meta -> (model, inner, its config)."""
        if self.c.meta == Analyze.meta:
            self.sft()
        init = f"--init={Path(self.c.sft) / 'ckpt.pt'}"
        found = self.get(self.c.meta, meta, meta.load_meta, init)
        if not found[2].moves:
            fail(f"{self.c.meta} was trained with --algo={found[2].algo}: there is no theta' in it")
        return found

    def get(self, folder, script, load, *init):
        path, name = Path(folder) / "ckpt.pt", script.__name__
        made = folder == {"train": Analyze.sft, "meta": Analyze.meta}[name]
        if made and not (Path(folder) / "summary.json").exists():
            print(f"{'going on with' if path.exists() else 'training'} the model in {folder}")
            words = [f"--out={folder}", f"--device={self.c.device}"]
            words += ["--resume"] if path.exists() else [*init, "--overwrite"]
            getattr(script, name)(*flags(getattr(script, name.capitalize()), words))
        found = load(path, self.device)
        weights = self.checkpoints[folder] = checksum(found[0])
        if weights in self.others.values():
            fail(f"{folder} has the same weights as another of these models, and would count twice")
        return found


def cells_of(spec: str) -> list:
    """Reads 'expr:5,6 sum:5' -> [(domain, operands)]. Exits 2 with a line for anything else."""
    cells = []
    for part in spec.split():
        domain, _, counts = part.partition(":")
        for k in counts.split(","):
            if k not in map(str, arithmetic.TESTED.get(domain, ())):
                fail(f"--cells={spec}: {part!r} is not a domain and its operand counts, such as "
                     f"expr:5,6; tested are {arithmetic.TESTED}")
            cells.append((domain, int(k)))
    if not cells:
        fail("--cells is empty: name some, such as 'expr:5,6 sum:5'")
    return cells

def cell_of(c, default: str = "expr:6"):
    """The one cell of --cells -> (Questions, its title)."""
    cells = cells_of(c.cells or default)
    if len(cells) > 1:
        fail(f"--cells={c.cells}: this experiment looks at one cell only, such as {default}")
    (domain, k), = cells
    questions = held_out(domain, k, c.questions)
    return questions, f"{domain}, {k} operands, {len(questions)} questions"

def others_of(questions: list, things: list, rng) -> list:
    """For every question the thing (such as a trajectory) of one that has another answer."""
    pairs = list(zip(questions, things))
    return [rng.choice([thing for o, thing in pairs if o.answer != q.answer]) for q in questions]


# --------------------------------------------------------------------------------- experiments

def known() -> dict:
    """{name of an experiment: the first sentence of its docstring}."""
    names = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if re.search(r"^CLAIM = ", source, re.M):
            names[path.stem] = " ".join(source[3:].split("\n\n")[0].split()).rstrip('"')
    trainings = importlib.import_module("experiments.trainings")
    return names | {name: one.__doc__.split("\n")[0] for name, one in trainings.TABLE.items()}

def experiment_of(name: str):
    """What has CLAIM, measure, judge, draw: a file of this folder, or an entry of a table."""
    trainings = importlib.import_module("experiments.trainings")
    return trainings.TABLE.get(name) or importlib.import_module(f"experiments.{name}")

def run(name: str, c, device) -> dict:
    """Runs one experiment: its verdicts, numbers and figure in OUT/figures -> what the JSON holds.

    Where --sft and --meta name several runs, it is repeated on each: numbers and figure are of the
    first, verdicts of all."""
    experiment = experiment_of(name)
    trains = getattr(experiment, "TRAINS", False)
    judged, checkpoints, began = [], {}, time.perf_counter()
    path = Path(c.out) / "figures" / f"{name}{'-' * bool(c.tag)}{c.tag}.json"

    for i, one in enumerate([c] if trains else each_model(c)):
        runs = Runs(one, device, checkpoints)
        measured = experiment.measure(one, runs)
        row_by_row = inspect.isgenerator(measured)
        for raw in measured if row_by_row else [measured]:
            judged[i:] = [experiment.judge(raw)]
            checkpoints = checkpoints | runs.checkpoints
            result = {
                "experiment": name, "claim": experiment.CLAIM,
                "criterion": inspect.getdoc(experiment) or "",      # none under python -OO
                "verdicts": [verdicts for verdicts, _ in judged], "numbers": judged[0][1],
                "gaps": [{f"{part}, {margin}": gap
                          for part, margins in numbers.get("gaps", {}).items()
                          for margin, gap in margins.items() if gap} for _, numbers in judged],
                "checkpoints": checkpoints,
                "seeds": trains and getattr(experiment, "SEEDS", c.seeds),
                "command": typed(name, c), "config": asdict(replace(c, device=device.type)),
                "revision": revision(), "seconds": round(time.perf_counter() - began, 1)}
            if row_by_row:                          # one that is cut short counts, too
                write(path, result)
    write(path, result)
    paint(experiment, result["numbers"], path)
    print(f"{path.stem} ({result['seconds']} s)   {path.with_suffix('.png')}")
    shown = getattr(experiment, "show", lambda numbers: [])(result["numbers"])
    for line in [*shown, *spoken(result["verdicts"])]:
        print(f"    {line}")
    return result

def paint(experiment, numbers, path):
    """Draws the figure, and the moving picture of an experiment that has one, beside its JSON."""
    experiment.draw(numbers).savefig(path.with_suffix(".png"))
    if hasattr(experiment, "film"):
        experiment.film(numbers, path.with_suffix(".gif"))

def each_model(c) -> list:
    """The command line for every pair of runs that --sft and --meta name, between commas."""
    sft, moved = c.sft.split(","), c.meta.split(",")
    if len(moved) > 1 and len(sft) != len(moved):
        fail(f"{len(sft)} runs in --sft and {len(moved)} in --meta: they are looked at in pairs")
    return [replace(c, sft=s, meta=moved[min(i, len(moved) - 1)]) for i, s in enumerate(sft)]

def spoken(verdicts: list) -> list:
    """[{part: verdict}], one per model -> a line per part."""
    lines = []
    for part in verdicts[0]:
        counts = Counter(row[part] for row in verdicts if part in row).most_common()
        words = ", ".join(f"{word} in {n}" for word, n in counts)
        lines.append(f"{part}: " + (f"{words} of {len(verdicts)} models" if len(verdicts) > 1
                                    else counts[0][0]))
    return lines

def typed(name: str, c) -> str:
    """What to type to run it again."""
    given = [f"--{key}={value}" for key, value in chosen(c).items()
             if key not in ("names", "out", "arm")]
    return shlex.join(["python", "analyze.py", name, *given, *(f"--arm={arm}" for arm in c.arm)])


# --------------------------------------------------------------------------------- command line

def redraw(c):
    """Draws the named figures of OUT/figures, or all, from their JSON."""
    from experiments import page
    folder = Path(c.out) / "figures"
    found = page.results(folder)
    for name in c.names or found:
        if name not in found:
            fail(f"there is no {folder / name}.json to draw from")
        paint(experiment_of(found[name]["experiment"]), found[name]["numbers"],
              folder / f"{name}.json")
        print(folder / f"{name}.png")

def check(c):
    """Refuses, with a line, what no experiment can do anything with."""
    for name in c.names:
        if not c.redraw and name not in known():
            fail(f"there is no experiment {name!r}: choose from {', '.join(known())}")
    if len(set(c.names)) < len(c.names):
        fail("an experiment is named twice")
    if c.cells:
        cells_of(c.cells)
    if c.tag and not re.fullmatch(r"[\w-]+", c.tag, re.ASCII):
        fail(f"--tag={c.tag}: letters, digits, - and _ are expected")
    if c.ask and (c.redraw or not set(c.names) <= {"walk", "byhand"} or not c.names):
        fail("--ask is for walk and byhand: python analyze.py walk --ask='(3+5)*2-7'")
    wanted = "compare" in c.names and not c.redraw
    if wanted != bool(c.arm) or len(c.arm) == 1:
        fail('compare needs two arms or more, and nothing else takes any: --arm="--steps=300" '
             '--arm="--steps=300 --style=short"')

def main():
    lines = [f"  {name:12} {line}" for name, line in known().items()]
    epilog = "\n".join(["experiments:", *lines, "", f"the tour: {', '.join(TOUR)}"])
    c, _ = flags(Analyze, epilog=epilog)
    check(c)
    if c.redraw:
        redraw(c)
        return
    device = device_of(c)
    for name in c.names or TOUR:
        try:
            run(name, c, device)
        except SystemExit as e:                     # it has said why; the others of a tour go on
            if c.names or e.code != 2:
                raise
    from experiments import page
    write(Path(c.out) / "report.md", page.page(Path(c.out) / "figures", "figures/"))
    print(f"report: {Path(c.out) / 'report.md'}")
