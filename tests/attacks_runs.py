"""Attacks on runs: signals, full disks, others in the same folder, bases that change."""
import functools
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

from forks import (GOOD, GRPO, META, RUNS, SFT, SMALL, appears, finish, log_of, module, product,
                   refused, run, same, start, state_of, straight)


def kill(i):
    """Half of the runs do little but write checkpoints; every other six die while they learn, and
    every other one leaves a process behind that makes batches."""
    kind, every, learning = list(RUNS)[i % 3], (1, 4)[i // 3 % 2], i // 6 % 2
    expected, seconds, seconds_in_loop = straight(kind, every)
    script, args = RUNS[kind]
    args, out = [*args, f"--save_every={every}"], Path(f"killed-{i}")
    pid, err = start(script, [f"--out={out}", *args], made_beside if i % 2 else None)
    if learning:
        appears(out / "metrics.jsonl")
    time.sleep(random.Random(i).uniform(0, seconds_in_loop if learning else seconds))
    os.kill(pid, signal.SIGKILL)
    finish(pid, err)
    saved = (out / "ckpt.pt").exists()
    ended = run(script, [f"--out={out}", *(["--resume"] if saved else [*args, "--overwrite"])])
    assert ended.code == 0, (kind, every, ended)
    same(product(out), expected)
    return "resumed" if saved else "before the first checkpoint"

def made_beside():
    """A `before`: another process makes the batches, as for a GPU."""
    machine = module("lab.machine")
    machine.DataLoader = functools.partial(loader_beside, machine.DataLoader)

def loader_beside(loader, *args, **options):
    return loader(*args, **{**options, "num_workers": 1})

def once_more(_):
    ended = run("train", ["--out=twin", "--steps=40", *SFT])
    assert ended.code == 0, ended
    same(product("twin"), product(GOOD))

def stop(i):
    number, code = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGTERM, 143)][i]
    script, args = [("train", SFT), ("train", SFT), ("meta", META)][i]
    out = Path(f"stopped-{i}")
    pid, err = start(script, [f"--out={out}", "--steps=100000", *args, "--save_every=9"])
    appears(out / "ckpt.pt")
    os.kill(pid, number)
    ended = finish(pid, err)
    assert ended.code == code and "--resume" in ended.err, ended
    assert state_of(out)["step"] == len(log_of(out)), "a step is not saved"

def full_from(owner, name, call, size):
    """A `before`: from the call-th call of owner.name on there is room for no file beyond `size`
    bytes."""
    real, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(args)
        if len(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return real(*args, **options)
    return functools.partial(setattr, owner, name, counted)

def full_at_checkpoint(_):
    full = full_from(module("lab.run"), "save", 2, 4000)
    ended = run("train", ["--out=full", "--steps=40", *SFT, "--save_every=4"], full)
    refused(ended, "before still does")
    assert state_of("full")["step"] == 4 and not list(Path("full").glob("*.part"))
    ended = run("train", ["--out=full", "--resume"])
    assert ended.code == 0, ended
    same(product("full"), product(GOOD))

def full_at_log(i):
    """config.json, the first that is written; then the log, which is written at a checkpoint."""
    run_class = module("lab.run").Run
    full = [full_from(run_class, "begin", 1, 100), full_from(run_class, "update", 1, 2000)][i]
    refused(run("train", [f"--out=tight-{i}", "--steps=40", *SFT], full), "too large")
    assert not Path(f"tight-{i}/ckpt.pt").exists()

def explode(_):
    rates = ["--lr=1e9", "--lr_adam=1e9"]
    ended = run("train", ["--out=wild", "--steps=60", *SFT, *rates, "--save_every=1"])
    refused(ended, "step", "is good", code=1)
    assert 0 < state_of("wild")["step"] == len(log_of("wild"))

def too_little_memory(_):
    """Half a GB more than the process has mapped already."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**29
    before = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (size, size))
    large = ["--layers=2", "--heads=2", "--width=64", "--batch=10000", *SMALL]
    refused(run("train", ["--out=huge", "--steps=1", *large], before), "--batch", "--chunks")

def not_a_number(_):
    """A weight that is NaN behind a loss that is not."""
    update = module("lab.run").Run.update

    def spoilt(self, logged):
        update(self, logged)
        if self.done == 7:
            self.model.head.weight.data[0, 0] = float("nan")
    before = functools.partial(setattr, module("lab.run").Run, "update", spoilt)
    ended = run("train", ["--out=nan", "--steps=7", *SFT, "--save_every=5"], before)
    refused(ended, "a weight is not finite", "is good", code=1)
    assert state_of("nan")["step"] == 5

def diverged(_):
    """The run of `not_a_number`, with larger rates, and with smaller ones."""
    refused(run("train", ["--out=nan", "--resume", "--lr=0.5"]), "--lr=0.5 differs")
    ended = run("train", ["--out=nan", "--resume", "--lr=0.001", "--lr_adam=0.001"])
    assert ended.code == 0 and state_of("nan")["step"] == 7, ended
    assert all(w.isfinite().all() for w in state_of("nan")["model"]["weights"].values())

def twice(_):
    """Ctrl-C in a step that does not end, and again."""
    def endless(self, logged):
        while True:
            time.sleep(1)
    before = functools.partial(setattr, module("lab.run").Run, "update", endless)
    pid, err = start("train", ["--out=endless", "--steps=9", *SFT], before)
    appears(Path("endless/metrics.jsonl"))
    time.sleep(1)
    for _ in range(2):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
    began = time.perf_counter()
    ended = finish(pid, err)
    assert ended.code == -signal.SIGINT and time.perf_counter() - began < 1, ended

def children(pid):
    """Processes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:                         # it has ended meanwhile
                continue
            if int(parent) == pid:
                found.append(int(entry.name))
    return found

def batch_maker_killed(_):
    args = ["--out=orphan", "--steps=100000", *SFT, "--save_every=9"]
    pid, err = start("train", args, made_beside)
    appears(Path("orphan/ckpt.pt"))
    for child in children(pid):
        os.kill(child, signal.SIGKILL)
    refused(finish(pid, err), "--resume")


# --------------------------------------------------------------------- others in the same folder

def two_at_once(_):
    """Two of meta.py, started together: one is refused, the other is what it would be alone."""
    script, args = RUNS["meta"]
    pairs = [start(script, ["--out=both", *args, "--save_every=4"]) for _ in range(2)]
    ended = sorted([finish(*pair) for pair in pairs], key=code_of)
    assert [e.code for e in ended] == [0, 2], ended
    refused(ended[1])
    same(product("both"), straight("meta", 4)[0])

def code_of(ended):
    return ended.code

def taken(_):
    """Another training, a resumption and an analysis where a run is at work, which goes on."""
    pid, err = start("train", ["--out=busy", "--steps=100000", *SFT, "--save_every=9"])
    appears(Path("busy/ckpt.pt"))
    for words in (["--overwrite", *SFT], ["--resume"]):
        refused(run("train", ["--out=busy", *words]), "another process")
    ended = run("analyze", ["tokens", "--sft=busy", "--out=looks", "--questions=4"])
    assert ended.code == 0, ended
    os.kill(pid, signal.SIGTERM)
    ended = finish(pid, err)
    assert ended.code == 143 and state_of("busy")["step"] == len(log_of("busy")), ended

def contents(folder):
    paths = (Path(folder), *Path(folder).rglob("*"))
    return {path: path.read_bytes() for path in paths if path.is_file()}

def base_changes(i):
    """GRPO into the folder of its own base; a base that is another one when a run is resumed."""
    if i == 0:
        before = contents("base")
        args = [*GRPO, "--steps=2", "--out=base", "--overwrite"]
        refused(run("train", args), "would be overwritten")
        assert contents("base") == before
        return
    shutil.copytree("base", "another")
    args = [arg.replace("base", "another") for arg in GRPO]
    assert run("train", ["--out=grown", "--steps=2", *args]).code == 0
    before = contents("grown")
    shutil.copy(GOOD / "ckpt.pt", "another/ckpt.pt")
    refused(run("train", ["--out=grown", "--resume"]), "another checkpoint")
    assert contents("grown") == before

def elsewhere(_):
    """meta.py --resume from another folder, where its --init does not lead anywhere."""
    args = ["--out=far", "--steps=4", *META]
    assert run("meta", args).code == 0
    Path("else").mkdir()
    before = functools.partial(os.chdir, "else")
    ended = run("meta", [f"--out={Path('far').resolve()}", "--resume"], before)
    assert ended.code == 0 and not list(Path("else").iterdir()), ended

def one_question(_):
    """No other question has another answer: a condition less, not an IndexError. And the run is
    none of train.py's."""
    args = [arg for arg in META if "questions" not in arg]
    ended = run("meta", ["--out=one", "--steps=2", "--questions=1", *args])
    assert ended.code == 0, ended
    refused(run("analyze", ["tokens", "--sft=one", "--out=looks"]), "not one of train.py")
