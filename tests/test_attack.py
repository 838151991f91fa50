"""Nothing lost, nothing silent: runs that are killed, disks that are full, files that are damaged,
command lines that mean nothing. Every run is a fork of this process: torch is imported once."""
import errno
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import KINDS, a_run, contents, odd, product, same

import meta
import train
from data import arithmetic
from experiments import main as analyze_main
from lab import run
from lab.run import command, load

MAINS = {"train": train.main, "meta": meta.main, "analyze": analyze_main}


def start(script, args, before=None):
    """Forks a child that calls `before`, then a script's command line -> (pid, its stderr)."""
    err = tempfile.TemporaryFile()
    pid = os.fork()
    if pid:
        return pid, err
    signal.alarm(60)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(err.fileno(), "w", buffering=1)
    sys.argv, code = [f"{script}.py", *args], 99
    try:
        if before:
            before()
        command(MAINS[script])
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def finish(pid, err):
    """Waits for a child -> (exit code or minus the signal, what it wrote to stderr)."""
    _, status = os.waitpid(pid, 0)
    with err:
        err.seek(0)
        return os.waitstatus_to_exitcode(status), err.read().decode(errors="replace")

def ended(script, *args, before=None):
    return finish(*start(script, args, before))

def refused(found, *words):
    """Asserts exit code 2 and one line on stderr that has the words."""
    code, err = found
    one_line = err.startswith("error: ") and err.count("\n") == 1
    assert code == 2 and one_line and all(word in err for word in words), found


# ------------------------------------------------------------------------------------ killed runs

@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """{kind: (arguments, the product of a run that nothing stopped, its seconds)}."""
    folder, found = tmp_path_factory.mktemp("straight"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "reward", odd)
        for kind in KINDS:
            init = [] if kind == "sft" else [f"--init={base / 'ckpt.pt'}"]
            args = [word.replace("every=8", "every=2") for word in KINDS[kind]] + init
            out, began = folder / kind, time.time()
            a_run(kind, out, *init)
            found[kind] = args, product(out), time.time() - began
    return found

def script_of(kind):
    return "meta" if kind == "meta" else "train"

@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_moments_and_resumed_is_the_straight_one(straight, tmp_path, kind,
                                                                        monkeypatch):
    """kill -9, again and again; what is left is always whole. Bit for bit."""
    monkeypatch.setattr(arithmetic, "reward", odd)
    args, expected, seconds = straight[kind]
    out, rng = tmp_path / "run", random.Random(kind)
    for _ in range(3):
        words = ["--resume"] if (out / "ckpt.pt").exists() else [*args, "--overwrite"]
        pid, err = start(script_of(kind), [f"--out={out}", *words])
        time.sleep(rng.uniform(0, 0.7 * seconds))
        os.kill(pid, signal.SIGKILL)
        code, message = finish(pid, err)
        assert code in (0, -signal.SIGKILL) and "error" not in message, message
    words = ["--resume"] if (out / "ckpt.pt").exists() else [*args, "--overwrite"]
    assert ended(script_of(kind), f"--out={out}", *words)[0] == 0
    same(product(out), expected)


# ------------------------------------------------------------------------------------- full disks

def full_at(owner, name, call, size=500):
    """A `before`: from the call-th call of owner.name on no file may be longer than `size`."""
    real, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(name)
        if len(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return real(*args, **options)
    return lambda: setattr(owner, name, counted)

def torn():
    """A `before`: the line of step 5 is written by half."""
    real = run.Run.log

    def log(self, step, numbers):
        if step == 5:
            self.lines.write('{"step": 5, "lo')
            self.lines.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, step, numbers)
    run.Run.log = log

@pytest.mark.parametrize("full,step", [
    (full_at(run, "save", 3), 4), (torn, 4), (full_at(train, "provenance", 1), 24),
    (full_at(run, "write", 1), 0)], ids=["checkpoint", "log", "summary", "config"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_goes_on(straight, tmp_path, full, step):
    (args, expected, _), out = straight["sft"], tmp_path / "run"
    refused(ended("train", f"--out={out}", *args, before=full))
    assert not (out / "summary.json").exists()
    if not step:
        assert not (out / "ckpt.pt").exists()
        return
    assert load(out / "ckpt.pt")["step"] == step
    assert ended("train", f"--out={out}", "--resume")[0] == 0
    same(product(out), expected)


# ---------------------------------------------------------------------------------- damaged files

class Payload:
    """Makes a folder where it is unpickled."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)

def damaged(base, folder):
    """{what: contents of a checkpoint that is none}."""
    good, whole = (base / "ckpt.pt").read_bytes(), load(base / "ckpt.pt")
    found = {f"cut-{i}": good[:len(good) * i // 8] for i in range(8)}
    found |= {"text": b"hello", "list": [1], "payload": Payload(folder / "executed"),
              "older": whole | {"format": "raml-arithmetic checkpoint 1"}}
    for part in ("model", "step", "config", "optimisers", "seconds"):
        found[f"no {part}"] = {name: value for name, value in whole.items() if name != part}
    swapped = {name: value.T for name, value in whole["model"]["weights"].items()}
    found["shape"] = whole | {"model": whole["model"] | {"weights": swapped}}
    found["optimiser"] = whole | {"optimisers": whole["optimisers"][::-1]}
    found["field"] = whole | {"config": whole["config"] | {"steps": "many"}}
    return found

def test_a_damaged_checkpoint_is_refused_and_nothing_is_touched_or_executed(base, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(base, out)
    for what, content in damaged(base, tmp_path).items():
        if isinstance(content, bytes):
            (out / "ckpt.pt").write_bytes(content)
        else:
            torch.save(content, out / "ckpt.pt")
        before = contents(tmp_path)
        refused(ended("train", f"--out={out}", "--resume"), "ckpt.pt")
        if what not in ("no seconds", "optimiser", "field"):
            refused(ended("train", f"--out={out}", "--ask=3+4"), "ckpt.pt")
        assert contents(tmp_path) == before, what
    assert not (tmp_path / "executed").exists()

def test_checkpoints_of_another_run_are_refused(base, straight, tmp_path):
    """meta.py's in the place of train.py's, train.py's where meta.py's is expected."""
    runs = tmp_path / "runs"
    shutil.copytree(base, runs)
    refused(ended("meta", f"--out={runs}", "--resume"), "meta.py")
    refused(ended("analyze", "explicit", f"--sft={runs}", f"--meta={runs}", f"--out={tmp_path}"),
            "meta.py")
    model = straight["meta"][1]
    torch.save(load(base / "ckpt.pt") | {"config": {"algo": "maml"}} | model, runs / "ckpt.pt")
    refused(ended("train", f"--out={runs}", "--resume"), "train.py")

def test_a_log_that_does_not_fit_its_checkpoint_is_refused(base, tmp_path):
    """A line that is missing, one that is no JSON, too few; what a crash tore after the checkpoint
    is no harm."""
    out = tmp_path / "run"
    shutil.copytree(base, out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    for broken in (lines[:9] + lines[10:], [*lines[:9], "{\n", *lines[10:]], lines[:9]):
        (out / "metrics.jsonl").write_text("".join(broken))
        before = contents(out)
        refused(ended("train", f"--out={out}", "--resume"), "metrics.jsonl")
        assert contents(out) == before
    (out / "metrics.jsonl").write_text("".join([*lines, '{"step": 24, "lo']))
    assert ended("train", f"--out={out}", "--resume")[0] == 0
    same(product(out), product(base))


# ------------------------------------------------------------------------------ bad command lines

# A command line and a word of the answer.
LINES = {"train": """
    --stepz=3 : stepz | --steps=0 : steps | --steps=-4 : steps | --steps=many : steps |
    --steps=٣ : steps | --lr=nan : lr | --lr=1e400 : lr | --seed=1 --seed=2 : twice |
    --see=1 : see | --out=-- : value | --out : out | -x : -x | extra : extra | --resume=1 : value |
    --resume : resume | --resume --overwrite : choose | --method=ppo : sft | --method=grpo : init |
    --method=dpo --init=x --style=short : style | --group=4 : group | --width=16 : multiple |
    --method=grpo --init=x --update=99 : update | --method=grpo --init=x --group=7 : group |
    --support=4 : pool | --pool=9 --domains=expr --operands=2 --support=9 : trajectories |
    --style=loud : loud | --style=states,,short : style | --domains=chain : chain |
    --domains=, : domains | --operands=9 : operands | --operands=3,,4 : operands |
    --operands=, : operands | --ops=/ : ops | --direct=1 : direct | --direct=9 : direct |
    --init=nowhere : nowhere | --ask=3+4 : checkpoint | --ask=3+x : 'x' | --ask=12+3 : digits |
    --ask=3+4 --steps=3 : steps | --ask= : empty | --out=/dev/null/run : /dev/null |
    --init=foreign : foreign | --asides=maybe : asides | --out=file/run : file""",
    "meta": """
    --operands=3,,4 : operands | --operands=9 : operands | --fast=9.up : 9.up | --K=0 : K |
    --algo=anil --fast=0.up : layer | --algo=sgd : algo | --queries=1 : queries | --tau=0 : tau |
    --resume : resume | --init=nowhere : nowhere | --init=foreign : foreign | --alpha=-1 : alpha""",
    "analyze": """
    nope : nope | curve curve : twice | compare : arms | compare --arm=--steps=3 : arms |
    curve --arm=a --arm=b : arms | --cells=expr:9 : cells | --cells=expr : cells |
    curve --questions=0 : questions | report : report | curve --redraw : curve | --tag=a/b : tag |
    curve --sft=mistyped : mistyped | explicit --sft=a,b --meta=c,d,e : pairs"""}
CASES = [(script, *(part.strip() for part in line.split(" : ")))
         for script, lines in LINES.items() for line in lines.split("|")]

@pytest.mark.parametrize("script,line,word", CASES)
def test_a_bad_command_line_is_one_line_and_changes_nothing(script, line, word, base, tmp_path,
                                                            monkeypatch, exits):
    """Exit code 2, no traceback, before anything is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").write_bytes(b"PK not really")
    before, words = contents(tmp_path), line.split()
    if script == "meta" and "init" not in line:
        words.append(f"--init={base / 'ckpt.pt'}")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    monkeypatch.setattr(run.Run, "__enter__", lambda self: pytest.fail("training began"))
    exits([word], command, MAINS[script])
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 2
