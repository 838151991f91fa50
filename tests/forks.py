"""What the attacks stand on: runs of the project's scripts as forks of this process, and what of
them may not depend on how often they were stopped.

Runs are tiny but real, in a temporary folder, the current one. torch is imported once, and a kill
costs no more than the run.
"""
import functools
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
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
        "meta": ("meta", ["--steps=20", "--K=2", "--msl=0.5", "--first_order=0.3", *META])}
GOOD = Path("sft-4")                # a run that nothing stopped, made by the row that kills


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
