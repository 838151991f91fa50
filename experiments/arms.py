"""Training comparisons: a hypothesis is a list of arms, each a string of flags, over seeds.

    --arm="--steps=300 --style=short"
    --arm="--steps=500 | --method=grpo --steps=50"      # `|`: each stage starts from the last
    --arm="meta.py --algo=fomaml --steps=100"           # flags of another script

`run_arms` trains what is missing, as processes of their own that can be interrupted and resumed,
asks all arms the same held-out questions, and gives a number a seed and question to `judge`.
"""
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from analyze import cells_of
from data import arithmetic
from lab import machine
from lab.figure import bars, panels
from lab.flags import flags
from lab.run import ROOT, checksum, load, read_log, write
from lab.score import held_out, mg_pass_at_k, pass_at_k, respond, sampled
from lab.verdict import crossed
from meta import load_meta, outcomes
from train import load_model

METRICS = {
    "exact": "exact match", "pass": "Pass@8", "mg": "mG-Pass@8", "form": "share in form",
    "further": "theta', an operation beyond", "copied": "theta' copies the last result",
    "further, theta": "theta, no trajectory", "weights, cut": "theta', last result cut",
    "weights": "theta', whole trajectory", "theta": "theta, no trajectory",
    "context, cut": "in context, last result cut"}


class Arm(NamedTuple):
    """What became of an arm."""
    scores: dict                            # {metric: (seeds, questions)}
    facts: dict                             # flags, seconds, tokens, ... for the JSON


def run_arms(c, arms, cells="expr:3,4", n=32):
    """Trains and evaluates arms {name: flags} on the same questions -> {name: Arm}"""
    cells = cells_of(c.cells or cells)
    folders = train_arms(c, arms)
    return {name: Arm(*judge_runs(c, arms[name], folders[name], cells, n)) for name in arms}

def judge_runs(c, arm, folders, cells, n):
    """The runs of an arm, one a seed -> (scores, facts)"""
    rows = [evaluate(c, folder, cells, n) for folder in folders]
    first = next(iter(rows[0].values()))
    scores = {}
    for metric in [m for m in METRICS if m in first]:
        per_seed = [sum((row[cell][metric] for cell in row), []) for row in rows]
        scores[metric] = np.array(per_seed, dtype=float)
    chains = [[read_log(stage.folder) for stage in stages(c, arm, seed)] for seed in range(c.seeds)]
    times = [sum(map(cost, chain)) for chain in chains]
    tokens = [sum(line.get("tokens", 0) for log in chain for line in log) for chain in chains]
    by_cell = {cell: round(float(np.mean([row[cell]["exact"] for row in rows])), 4)
               for cell in rows[0]}
    facts = {"flags": arm, "by_cell": by_cell, **trends([chain[-1] for chain in chains]),
             "checksums": [checksum(folder / "ckpt.pt") for folder in folders],
             "seconds": round(min(times), 1),       # of the seed that was disturbed least
             "tokens": round(float(np.mean(tokens)))}
    return scores, facts

def cost(log):
    """Seconds of a run: steps times the median step, since what else ran beside it is not its
    own."""
    return len(log) * float(np.median(np.diff([0.0, *(line["seconds"] for line in log)])))

def trends(logs):
    """What a method improves on its own samples: means of the first and last ten steps, a pair a
    seed."""
    trend = {}
    for key in ("reward", "preferred"):
        if key in logs[0][0]:
            values = [[line[key] for line in log] for log in logs]
            trend[key] = [[round(float(np.mean(part)), 4) for part in (v[:10], v[-10:])]
                          for v in values]
    return trend


# -------------------------------------------------------------------------------------- training

class Stage(NamedTuple):
    """One run of a chain."""
    module: str                             # of the script
    folder: Path
    words: list                             # its flags

    def parse(self):
        """Exits 2 with a line where the script would refuse its flags: train.Train, meta.Meta."""
        script = importlib.import_module(self.module)
        command_line = getattr(script, self.module.split(".")[-1].capitalize())
        script.configure(*flags(command_line, self.words))


def stages(c, arm, seed):
    """An arm's runs for one seed, each starting from the one before -> [Stage]

    A folder belongs to the whole chain up to it, and to the weights that the chain starts from, so
    that arms share stages."""
    chain, names = [], []
    for part in arm.split("|"):
        words = part.split()
        named = words and words[0].endswith(".py")
        script = words.pop(0) if named else "train.py"
        module = script.removesuffix(".py").replace("/", ".")
        names.append(" ".join([module, *words]))
        for word in words:
            if word.startswith("--init=") and Path(word[7:]).exists():
                names[-1] += f" {checksum(word[7:])}"
        name = " ".join(names)
        short = "_".join(re.findall(r"[\w.=,]+", name))[:60]
        digest = hashlib.blake2b(name.encode(), digest_size=3).hexdigest()
        if chain:
            words = [f"--init={chain[-1].folder / 'ckpt.pt'}", *words]
        folder = Path(c.out) / "runs" / f"{short}-{digest}" / str(seed)
        chain.append(Stage(module, folder, words))
    return chain

def train_arms(c, arms):
    """Trains what is missing, c.jobs runs at a time, one progress bar for the lot -> {name: [folder
    of a seed]}"""
    levels = {}                             # {depth in a chain: {folder: (stage, seed)}}
    for seed in range(c.seeds):
        for arm in arms.values():
            for depth, stage in enumerate(stages(c, arm, seed)):
                levels.setdefault(depth, {})[stage.folder] = stage, seed
    runs = [run for level in levels.values() for run in level.values()]
    for stage, _ in runs:                   # all flags are looked at before any run begins
        stage.parse()
    with Workers(c, len(runs)) as workers:
        for depth in sorted(levels):        # a stage begins when those before it are there
            workers.all(levels[depth].values())
    return {name: [stages(c, arm, seed)[-1].folder for seed in range(c.seeds)]
            for name, arm in arms.items()}


class Workers:
    """Runs as processes, several at a time; they end with this one, and save first."""

    def __init__(self, c, total):
        cuda = c.device != "cpu" and torch.cuda.is_available()
        self.c, self.jobs = c, c.jobs or (1 if cuda else os.cpu_count())
        self.threads = c.threads or max(1, os.cpu_count() // self.jobs)
        self.bar = tqdm(total=total, unit="run", disable=None, dynamic_ncols=True)
        self.processes = []

    def __enter__(self):
        self.handler = signal.signal(signal.SIGTERM, end_with)
        self.pool = ThreadPoolExecutor(self.jobs)
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        signal.signal(signal.SIGTERM, self.handler)
        self.bar.close()

    def all(self, runs):
        list(self.pool.map(self.one, runs))

    def one(self, run):
        stage, seed = run
        if not (stage.folder / "summary.json").exists():
            self.start(stage, seed)
        self.bar.update()

    def start(self, stage, seed):
        if (stage.folder / "ckpt.pt").exists():
            words = ["--resume"]
        else:
            defaults = {"--device": self.c.device, "--threads": self.threads, "--seed": seed,
                        "--questions": 20}
            said = {word.split("=")[0] for word in stage.words}     # for itself: that stands
            words = [f"{k}={v}" for k, v in defaults.items() if k not in said]
            words = [*stage.words, *words, "--overwrite"]
        command = [sys.executable, "-m", stage.module, f"--out={stage.folder}", *words]
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.processes.append(process)
        lines = process.communicate()[1].splitlines()
        if process.returncode:
            raise OSError(f"{stage.folder}: {lines[-1] if lines else process.returncode}")


def end_with(number, _):
    sys.exit(128 + number)


# ------------------------------------------------------------------------------------ evaluation

def evaluate(c, folder, cells, n=32, k=8):
    """A run on held-out questions -> {cell: {metric: a number a question}}, kept beside the run
    under the checksum of its weights and what was asked.

    exact: greedy; pass, mg, form: Pass@k, mG-Pass@k and the share in form, from n samples. A run of
    meta.py also has theta, asked without a trajectory, theta' after whole trajectories, after those
    without their last result, and after those of the question less its last operation; a model
    trained to answer directly is asked directly."""
    path = folder / "compare.json"
    key = f"{checksum(folder / 'ckpt.pt')} {cells} {c.questions} {n} {k}"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if key not in kept:
        config = load(folder / "ckpt.pt")["config"]
        rows = {}
        for domain, operands in cells:
            questions = held_out(domain, operands, c.questions)
            rows[f"{domain} {operands}"] = score_cell(c, folder, config, questions, n, k)
        kept[key] = rows
        write(path, kept)
    return kept[key]

def score_cell(c, folder, config, questions, n, k):
    """Every metric of one run on one cell's questions."""
    device = machine.device_of(c)
    model, _ = load_model(folder / "ckpt.pt", device)
    mode = "direct" if config.get("direct") == 1 else "trajectory"
    right = sampled(model, questions, n, mode)
    answers = [a for _, a in respond(model, questions, mode)]
    cell = {"exact": [float(arithmetic.verify(q, a)) for q, a in zip(questions, answers)],
            "pass": [pass_at_k(n, r, k) for r, _ in right],
            "mg": [mg_pass_at_k(n, r, k) for r, _ in right], "form": [f / n for _, f in right]}
    if "algo" in config:
        inner = None
        if config["algo"] != "none":
            model, inner, _ = load_meta(folder / "ckpt.pt", device)
        whole, cut, further = (outcomes(model, inner, questions, condition, config["inner"])
                               for condition in ("whole", "cut", "further"))
        cell |= {"theta": cut["theta"], "context, cut": cut["in_context"],
                 "further, theta": further["theta"]}
        if inner:
            cell |= {"weights": whole["theta_prime"], "weights, cut": cut["theta_prime"],
                     "further": further["theta_prime"], "copied": further["implied"]}
    return cell


# ------------------------------------------------------------------------------- for judge, draw

def kept(arms):
    """{name: Arm} -> what the JSON keeps of every arm"""
    return {name: {**arm.facts, "scores": {metric: summary(v) for metric, v in arm.scores.items()}}
            for name, arm in arms.items()}

def summary(v):
    return {"mean": crossed(v, share=True), "seeds": [round(float(x), 4) for x in v.mean(1)]}

def difference(arms, a, b, metric="exact"):
    """{name: paired differences (seeds, questions)} of two arms."""
    gap = arms[a].scores[metric] - arms[b].scores[metric]
    return {f"{a} - {b}, {METRICS[metric]}": gap}

def differences(arms, pairs):
    """Intervals of the paired differences in every metric that both have."""
    gaps = {}
    for a, b in pairs:
        for metric in arms[a].scores:
            if metric in arms[b].scores:
                for name, gap in difference(arms, a, b, metric).items():
                    gaps[name] = crossed(gap)
    return gaps

def draw_arms(arms, title, metrics=("exact", "pass", "mg", "weights", "weights, cut")):
    """A panel a metric, a bar an arm that has it."""
    metrics = [m for m in metrics if any(m in arm["scores"] for arm in arms.values())]
    height = 0.42 * len(arms) + 1.1
    fig, (axes,) = panels(1, len(metrics), width=3.9, heights=[height])
    for ax, metric in zip(axes, metrics):
        rows = {name: arm["scores"].get(metric) for name, arm in arms.items()}
        bars(ax, rows, xlabel=METRICS[metric], xlim=(0, 1))
        if ax is not axes[0]:
            ax.set_yticklabels([])
    fig.suptitle(title, fontsize=10)
    return fig

def seeds_of(arms):
    """How many seeds, for a title."""
    return len(next(iter(arms.values()))["checksums"])
