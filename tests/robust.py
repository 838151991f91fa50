"""Nothing lost, nothing executed, nothing silent: what is done, how often, what must come out.

    python tests/robust.py            # the short form, which the tests run
    python tests/robust.py --long     # the counts in the README

ROWS, at the end, is the table. An attack is a function of a number i that asserts what must come
out; a row calls it for i = 0, 1, ... Runs are tiny but real, in a temporary folder, the current
one. Each is a fork of this process: torch is imported once, and a kill costs no more than the run.
"""
import contextlib
import functools
import importlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
LONG = "--long" in sys.argv

# For those of the project, whose folder is on the path from `main` on.
module = importlib.import_module

SMALL = ["--questions=2", "--threads=1", "--device=cpu"]
SFT = ["--batch=8", "--layers=2", "--heads=2", "--width=16", *SMALL]
META = ["--init=base/ckpt.pt", "--batch=4", *SMALL]
GRPO = ["--init=base/ckpt.pt", "--method=grpo", "--batch=8", "--group=4", "--max_new=8", *SMALL]
RUNS = {"sft": ("train", ["--steps=40", *SFT]), "grpo": ("train", ["--steps=20", *GRPO]),
        "meta": ("meta", ["--steps=20", *META])}
GOOD = Path("sft-4")                # a run that nothing stopped, made by the row that kills


# ------------------------------------------------------------------------------------------ runs

class Ended(NamedTuple):
    code: int                       # exit code, or minus the signal
    err: str                        # what it wrote to stderr

def start(script, args, before=None):
    """Forks a child that calls `before`, then a script's command line; after a minute it hangs, and
    is killed. -> its pid, and the file that its stderr goes to"""
    err = tempfile.TemporaryFile()
    pid = os.fork()
    if pid:
        return pid, err
    signal.alarm(60)
    os.dup2(err.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv, code = [f"{script}.py", *args], 99
    try:
        if before:
            before()
        module(script).command(module(script).main)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def finish(pid, err):
    """Waits for a child -> Ended"""
    _, status = os.waitpid(pid, 0)
    with err:
        err.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), err.read().decode(errors="replace"))

def run(script, args, before=None):
    return finish(*start(script, args, before))

def appears(path):
    """Waits for a file, a minute at most."""
    until = time.perf_counter() + 60
    while not path.exists() and time.perf_counter() < until:
        time.sleep(0.002)

def refused(ended, *words, code=2):
    """Asserts one line on stderr that has the words, and the exit code."""
    one_line = ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert ended.code == code and one_line and all(w in ended.err for w in words), ended

def state_of(folder):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)

def log_of(folder):
    return module("lab.run").read_log(folder)

def numbers(state):
    """What a checkpoint holds that may not depend on how often its run was stopped."""
    return {key: state[key] for key in ("step", "model", "optimisers", "extra")}

def product(folder):
    """The same of a run: that, and its log without times."""
    log = log_of(folder)
    for line in log:
        del line["seconds"]
    return {**numbers(state_of(folder)), "log": log}

# Asserts that nested numbers and tensors are equal, bit for bit.
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)

@functools.cache
def straight(kind, every):
    """A run that nothing stops, in the folder KIND-EVERY -> (its product, seconds, seconds of its
    steps)"""
    script, args = RUNS[kind]
    began = time.perf_counter()
    ended = run(script, [f"--out={kind}-{every}", *args, f"--save_every={every}"])
    assert ended.code == 0, ended
    seconds = time.perf_counter() - began
    return product(f"{kind}-{every}"), seconds, state_of(f"{kind}-{every}")["seconds"]


# --------------------------------------------------------------------------------- command lines

VALUES = ["", "x", "-1", "-0.5", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "٣", "１", "²",
          "1_000", "0x10", "1,5", "--", "🙂", "\udcff", "None", "[]", "%s", "1;2", " 3", "3 ",
          "(" * 99, "(" * 9000]
# Of these any other text is a path, a pattern or a name.
LOOSE = {"out", "init", "fast", "sft", "meta", "uncut", "tag"}

LINES = {
    "train": """
        --resume --overwrite | --resume | --method=grpo | --kl=1 | --beta=1 | --group=4 | extra |
        --ask=3+4 --steps=3 | --ask=3+4 | --direct=0.6 --cut=0.6 | --width=15 | --support=4 |
        --method=dpo --init=x --style=long | --method=dpo --init=x --kl=1 | --style=long,direct |
        --method=grpo --init=x --update=99 | --method=grpo --init=x --group=7 | --init=nowhere |
        --domains=sum --operands=9""",
    "meta": """
        --resume --overwrite | --resume | --cut_from=0.9 --cut_full=0.1 | --missing=0,0,0 | extra |
        --operands=3,,4 | --domain=sum --operands=9 | --init=nowhere""",
    "analyze": """
        nope | nope --redraw | curve curve | compare | compare --arm=--steps=3 | --grid=4 |
        curve --arm=a --arm=b | --cells=expr:4,"""}
ANY_SCRIPT = "--nope|--nope=1|-x|--out|--seed=1 --seed=2|--seed|-- x|--SEED=1|--see=1|é"

@functools.cache
def hostile_lines():
    """[(script, words)]: those above, then every flag with every value, in a random order."""
    lines, valued = [], []
    for script, some in LINES.items():
        for line in f"{some} | {ANY_SCRIPT}".split("|"):
            lines.append((script, line.split()))
        for field in fields(getattr(module(script), script.title())):
            values = ["", "9" * 5000] if field.name in LOOSE else VALUES
            valued += [(script, [f"--{field.name}={value}"]) for value in values]
    random.Random(0).shuffle(valued)
    return lines + valued

def hostile(i, call=run, limit=2):
    """call(script, words, what to do before) -> Ended. -> seconds that it took"""
    script, words = hostile_lines()[i]
    folder = tempfile.mkdtemp(dir=".")

    def before():
        os.chdir(folder)
        signal.alarm(10)                            # for a line that is taken for a good one
    began = time.perf_counter()
    ended = call(script, words, before)
    took = time.perf_counter() - began
    about = script, [word[:60] for word in words], took, ended, os.listdir(folder)
    assert ended.code == 2 and took < limit and not os.listdir(folder), about
    refused(ended)
    return took

def process(script, words, before):
    """`run` in a process that imports everything for itself."""
    command = [sys.executable, ROOT / f"{script}.py", *words]
    ended = subprocess.run(command, preexec_fn=before, capture_output=True)
    return Ended(ended.returncode, ended.stderr.decode(errors="replace"))

def hostile_process(i):
    """3 s are a limit for a computer that does nothing else; the tests may share theirs."""
    anywhere = random.Random(i).randrange(len(hostile_lines()))
    return hostile(anywhere, process, 3 if LONG else 10)


# --------------------------------------------------------------------------- runs that end early

def kill(i):
    """Half of the runs do little but write checkpoints; every other six die while they learn."""
    kind, every, learning = list(RUNS)[i % 3], (1, 4)[i // 3 % 2], i // 6 % 2
    expected, seconds, seconds_in_loop = straight(kind, every)
    script, args = RUNS[kind]
    args, out = [*args, f"--save_every={every}"], Path(f"killed-{i}")
    pid, err = start(script, [f"--out={out}", *args])
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

def once_more(_):
    ended = run("train", ["--out=twin", "--steps=40", *SFT])
    assert ended.code == 0, ended
    same(product("twin"), product(GOOD))

def stop(i):
    number, code = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][i]
    out = Path(f"stopped-{code}")
    pid, err = start("train", [f"--out={out}", "--steps=100000", *SFT, "--save_every=9"])
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


# --------------------------------------------------------------------------- files, good and bad

def loaded(path):
    """-> the checkpoint at a path, or None if it was refused."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            return module("lab.run").load(path)
        except SystemExit as e:
            code = e.code
    refused(Ended(code, err.getvalue()))

def cut_short(i):
    good, path = (GOOD / "ckpt.pt").read_bytes(), Path("short.pt")
    path.write_bytes(good[:len(good) * i // 16])
    assert loaded(path) is None

def flip(i):
    rng, data, path = random.Random(i), bytearray((GOOD / "ckpt.pt").read_bytes()), Path("flip.pt")
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    state, truth = loaded(path), state_of(GOOD)
    if state is None:
        return "refused"
    assert state["config"] == truth["config"], at
    same(numbers(state), numbers(truth))
    return "in bytes that mean nothing"

class Payload:
    """Executes something where it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("executed",)

def raw_pickle(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", b"cos\nsystem\n(S'touch executed'\ntR.")

# An object for torch to save, what differs from a good checkpoint, bytes, or what makes the path.
FILES = [Payload(), [1], {"format": "raml-arithmetic checkpoint 0"}, {"encoding": "gpt2"},
         b"", b"hello", raw_pickle, os.mkdir, os.path.exists]

def no_checkpoint(i):
    made, path = FILES[i], Path(f"no-checkpoint-{i}")
    if callable(made):
        made(path)
    elif isinstance(made, bytes):
        path.write_bytes(made)
    else:
        torch.save(state_of(GOOD) | made if isinstance(made, dict) else made, path)
    assert loaded(path) is None and not Path("executed").exists(), made

def untouched(i):
    """Half a checkpoint, a run that is there already, a file in the folder's place."""
    out = [Path("half"), GOOD, Path("file")][i]
    if i == 0:
        shutil.copytree(GOOD, out)
        os.truncate(out / "ckpt.pt", (out / "ckpt.pt").stat().st_size // 2)
    if i == 2:
        out.write_text("mine")

    def contents():
        return {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()}
    before = contents()
    refused(run("train", [f"--out={out}", *(SFT if i else ["--resume"])]))
    assert contents() == before and before


# ------------------------------------------------------------------------------------- the table

# What is done, by what, how often in the tests and with --long; what must come out.
ROWS = [
    ("a hostile command line of one of the three scripts", hostile, 300, 2000,
     "one line, exit code 2, nothing written, within 2 s"),
    ("such a line in a process of its own", hostile_process, 3, 30, "the same"),
    ("kill -9 at a random moment (sft, grpo, meta), then --resume", kill, 9, 30,
     "weights, optimisers and log of a run never stopped, bit for bit"),
    ("the same seed again", once_more, 1, 1, "the same bits"),
    ("SIGINT, SIGTERM", stop, 2, 2, "saved, exit codes 130, 143"),
    ("a full disk at the second checkpoint", full_at_checkpoint, 1, 1,
     "one line, the first stands, and --resume comes to the same bits"),
    ("a full disk at the config, at the log", full_at_log, 2, 2, "one line"),
    ("a loss that explodes", explode, 1, 1, "one line with the step, a good checkpoint"),
    ("too little memory", too_little_memory, 1, 1, "one line that names --batch and --chunks"),
    ("a checkpoint cut short, at every sixteenth", cut_short, 16, 16, "refused"),
    ("a checkpoint with one bit flipped", flip, 60, 200, "refused, or nothing has changed"),
    ("payload, list, other version, other encoding, empty, text, raw pickle, folder, nothing",
     no_checkpoint, 9, 9, "refused, nothing executed"),
    ("--resume from half a checkpoint, a second run into a folder, a file in a folder's place",
     untouched, 3, 3, "refused, nothing touched")]

def summed_up(results):
    """Times -> the longest; words -> how often each."""
    results = [result for result in results if result is not None]
    if results and isinstance(results[0], float):
        return f" (the slowest after {max(results):.2f} s)"
    words = [f"{n} {word}" for word, n in Counter(results).items()]
    return f" ({', '.join(words)})" if words else ""

def attempts(attack, times):
    """-> what the attacks returned, and [how they were lost]"""
    results, lost = [], []
    for i in range(times):
        try:
            results.append(attack(i))
        except Exception as e:
            lost.append(f"{attack.__name__}({i}): {e!r}")
    return results, lost

def main():
    sys.path.insert(0, str(ROOT))
    for name in ("train", "meta", "analyze", "experiments"):
        module(name)                                # once, before the forks
    torch.set_num_threads(1)
    lost = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        assert run("train", ["--out=base", "--steps=2", *SFT]).code == 0
        print("| what is done | how often | what came out |\n|---|---|---|")
        for what, attack, short, long, must in ROWS:
            times = long if LONG else short
            results, failures = attempts(attack, times)
            came_out = f"LOST: {len(failures)}" if failures else must + summed_up(results)
            print(f"| {what} | {times} | {came_out} |", flush=True)
            lost += failures
        os.chdir(ROOT)
    print("\n".join(["LOST:", *lost]) if lost else "lost: nothing")
    return 1 if lost else 0

if __name__ == "__main__":
    raise SystemExit(main())
