"""Training comparisons: a hypothesis is a list of arms, each a string of flags, over seeds.

    --arm="--steps=300 --style=short"
    --arm="--steps=500 | --method=grpo --steps=50"      # `|`: each stage starts from the last
    --arm="meta.py --algo=fomaml --steps=100"           # flags of meta.py

`run_arms` trains what is missing, as processes that can be interrupted and resumed, asks all arms
the same held-out questions, and gives one number per seed and question.
"""
import ctypes
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import meta
import train
from experiments import cells_of
from lab.flags import fail, flags
from lab.run import ROOT, checksum, device_of, read_log
from lab.score import held_out, mg_pass_at_k, pass_at_k, right, sampled
from lab.verdict import over_seeds


class Arm(NamedTuple):
    """What became of an arm."""
    scores: dict                    # {metric: (seeds, questions)}
    facts: dict                     # flags, seconds, tokens, number type, checksums


def run_arms(c, arms: dict, cells: str, samples: int = 0) -> dict:
    """Trains arms {name: flags} and asks them the held-out questions of cells -> {name: Arm}.
    samples: outputs per question for Pass@8 and mG-Pass@8; 0: without these."""
    cells, chains, found = cells_of(cells), train_arms(c, arms), {}
    for name, seeds in chains.items():
        bar = tqdm(seeds, desc=f"asking {name}", unit="run", disable=None, leave=False)
        rows = [ask(c, chain[-1], cells, samples) for chain in bar]
        scores = {metric: np.array([row[metric] for row in rows], float) for metric in rows[0]}
        found[name] = Arm(scores, facts_of(arms[name], seeds))
    return found

def facts_of(arm: str, seeds: list) -> dict:
    """Says what an arm cost: steps times the median step, of the seed that was disturbed least."""
    logs = [[read_log(stage.folder) for stage in chain] for chain in seeds]
    steps = [[np.diff([0, *(line["seconds"] for line in log)]) for log in chain] for chain in logs]
    costs = [sum(len(times) * np.median(times) for times in chain) for chain in steps]
    tokens = [sum(line["tokens"] for log in chain for line in log) for chain in logs]
    ends = [train.load_model(chain[-1].folder / "ckpt.pt") for chain in seeds]
    return {"flags": arm, "seconds": round(float(min(costs)), 1), "tokens": round(np.mean(tokens)),
            "dtype": ends[0][1]["config"]["dtype"], "checksums": [checksum(m) for m, _ in ends]}


# ------------------------------------------------------------------------- what an arm consists of

class Stage(NamedTuple):
    """One run of a chain."""
    script: str                     # train.py or meta.py
    words: list                     # its flags
    folder: Path
    digest: str                     # of all its flags, and of what it starts from
    after: Path                     # the folder of the stage before, or None


def chain_of(c, arm: str, seed: int) -> list:
    """An arm's runs for one seed, each starting from the one before -> [Stage].

    A run is known by its script, by all its flags, defaults included, and by the weights that it
    starts from. So arms share stages, and a changed default makes another run."""
    chain, device = [], device_of(c).type
    for words in words_of(arm):
        script = "train.py" if words[0].startswith("-") else words.pop(0)
        name = "_".join(re.findall(r"[\w.=,]+", " ".join([script[:-3], *words])))[:60]
        if chain:
            words.append(f"--init={chain[-1].folder / 'ckpt.pt'}")
        words += [f"--device={device}", "--questions=2", f"--seed={seed}"]
        if script == "train.py":
            config = train.configure(*flags(train.Train, words))
        else:
            config = meta.configure(flags(meta.Meta, words)[0])
        start = chain[-1].digest if chain else ""
        if config.init and not chain:
            start, before = checksum(train.load_model(config.init)[0]), Path(config.init).parent
            if (before / "config.json").exists() and not (before / "summary.json").exists():
                fail(f"--arm={arm}: the run in {before} has not ended yet")
        identity = repr((script, start, replace(config, init="", seed=0)))
        digest = hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()
        folder = Path(c.out) / "runs" / f"{name}-{digest}" / str(seed)
        chain.append(Stage(script, words, folder, digest, chain[-1].folder if chain else None))
    return chain

def words_of(arm: str) -> list:
    """Takes an arm apart as a shell does -> a list of words per stage. Exits 2 where it is none."""
    try:
        stages = [shlex.split(part) for part in arm.split("|")]
    except ValueError as e:
        fail(f"--arm={arm}: {e}")
    given = "--device --threads --questions --seed --out --resume --overwrite --ask".split()
    for words in stages:
        first = words[0] if words else "nothing"
        if first not in ("train.py", "meta.py") and not first.startswith("-"):
            fail(f"--arm={arm}: a stage begins with a flag, train.py or meta.py, not {first}")
        for word in words:
            if word.partition("=")[0] in given:
                fail(f"--arm={arm}: {word} is not for an arm to say")
    return stages


# --------------------------------------------------------------------------------------- training

def train_arms(c, arms: dict) -> dict:
    """Trains arms {name: flags} -> {name: [a chain of Stages per seed]}. Exits 2 with a line,
    before anything is trained, where a flag is wrong or two arms are the same."""
    chains = {name: [chain_of(c, arm, seed) for seed in range(c.seeds)]
              for name, arm in arms.items()}
    if len({seeds[0][-1].digest for seeds in chains.values()}) < len(arms):
        fail(f"two of these arms are the same run: {'; '.join(arms.values())}")
    train_all(c, [stage for seeds in chains.values() for chain in seeds for stage in chain])
    return chains

def train_all(c, stages: list):
    """Trains what is missing, several runs at a time. Where one fails, the others save and end."""
    waiting = {s.folder: s for s in stages if not (s.folder / "summary.json").exists()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = c.jobs or (1 if device_of(c).type == "cuda" else cores)
    threads = c.threads or max(1, cores // jobs)
    print(f"{len(waiting)} runs to train, {jobs} at a time", flush=True)
    caught, running, total, began = [], {}, len(waiting), time.perf_counter()
    handles = threading.current_thread() is threading.main_thread()     # no other thread may
    before = handles and signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    bar = tqdm(total=total, unit="run", disable=None, dynamic_ncols=True)
    try:
        while waiting or running:
            if caught:
                raise SystemExit(128 + signal.SIGTERM)
            for stage in list(waiting.values()):
                missing = {*waiting, *(other.folder for other in running.values())}
                if len(running) < jobs and stage.after not in missing:
                    running[begin(stage, threads)] = waiting.pop(stage.folder)
            for process in [p for p in running if p.poll() is not None]:
                folder = running.pop(process).folder
                if process.returncode:
                    said = (folder / "errors.txt").read_text(errors="replace").strip().splitlines()
                    said = said or [f"exit code {process.returncode}"]
                    fail(f"{folder}: {said[-1].removeprefix('error: ')}")
                bar.update()
                if len(waiting) + len(running) == total - 1:
                    took = time.perf_counter() - began
                    whole = took * max(1, total / jobs)
                    bar.write(f"the first took {took:.0f} s, so all take about {whole:.0f} s")
            time.sleep(0.05)
    finally:
        for process in running:
            process.terminate()
            process.wait()
        if handles:
            signal.signal(signal.SIGTERM, before)
        bar.close()

def begin(stage: Stage, threads: int) -> subprocess.Popen:
    """Starts a run, or goes on with it. Its script has a whole path, and Python looks first where
    that lies: a train.py in the reader's folder is not run."""
    words = ["--resume"] if (stage.folder / "ckpt.pt").exists() else [*stage.words, "--overwrite"]
    command = [sys.executable, ROOT / stage.script, f"--out={stage.folder}", *words]
    stage.folder.mkdir(parents=True, exist_ok=True)
    with open(stage.folder / "errors.txt", "w", encoding="utf-8") as errors:
        return subprocess.Popen([*command, f"--threads={threads}"], stderr=errors,
                                stdout=subprocess.DEVNULL,
                                preexec_fn=end_with_us if sys.platform == "linux" else None)

def end_with_us():
    """Has Linux send a run SIGTERM once its compare is gone, be it by kill -9: it saves."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)              # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------------ evaluation

def ask(c, stage: Stage, cells: list, samples: int = 0) -> dict:
    """Asks a run held-out questions -> {metric: a number per question}.

    exact: greedy, after its own trajectory; a model of --style=direct has none. direct: in the
    head. pass, mg: Pass@8 and mG-Pass@8 from so many samples. A run of meta.py is also asked
    meta.KINDS: of theta' (theta, where there is no inner loop), of theta, in context."""
    device, path = device_of(c), stage.folder / "ckpt.pt"
    groups = [held_out(domain, n, c.questions) for domain, n in cells]
    questions = [q for group in groups for q in group]
    model, state = train.load_model(path, device)
    mode = "direct" if state["config"].get("style") == "direct" else "trajectory"
    row = {"exact": right(model, questions, mode), "direct": right(model, questions, "direct")}
    if samples:
        counts = sampled(model, questions, samples)
        row["pass"] = [pass_at_k(samples, n, 8) for n in counts]
        row["mg"] = [mg_pass_at_k(samples, n, 8) for n in counts]
    if stage.script != "meta.py":
        return row
    model, inner, config = meta.load_meta(path, device)
    inner = inner if config.moves else None
    best = {"none": "theta", "context": "in_context"}.get(config.algo, "theta_prime")
    for kind in meta.KINDS:
        names = {kind: best, f"{kind}, theta": "theta", f"{kind}, in context": "in_context"}
        for questions in groups:
            truths, _ = meta.outcomes(model, inner, questions, kind, config.style)
            for name, where in names.items():
                row.setdefault(name, []).extend(truths.get(where, []))
    return row


# ------------------------------------------------------------------------------- for judge, draw

def kept(arms: dict) -> dict:
    """{name: Arm} -> what the JSON keeps of every arm."""
    return {name: {**arm.facts, "scores": {k: share(v) for k, v in arm.scores.items() if v.size}}
            for name, arm in arms.items()}

def share(values) -> dict:
    """(seeds, questions) -> {mean: [mean, low, high], seeds: a mean per seed}."""
    return {"mean": [round(float(np.clip(x, 0, 1)), 4) for x in over_seeds(values)],
            "seeds": values.mean(1).round(4).tolist()}
