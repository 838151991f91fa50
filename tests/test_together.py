"""Two processes and gloo against one process; one of them killed; what cannot be shared out."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import analyze
import train
from lab import machine
from lab.run import read_log

ROOT = Path(train.__file__).parent
SMALL = ["--batch=9", "--questions=3", "--threads=1", "--device=cpu"]
SHAPE = ["--layers=2", "--heads=2", "--width=16"]
ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# In float32 rounding grows from step to step.
DOUBLE = f"""import runpy, sys, torch
torch.set_default_dtype(torch.float64)
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def begin(start, script, out, *args):
    """Starts a run in one process, or two."""
    command = [*start, str(script), f"--out={out}", *SMALL, *args]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

def weights(out):
    return torch.load(out / "ckpt.pt", weights_only=True)["model"]["weights"]

def assert_equal_runs(one, two, keys):
    """50 steps, the logged numbers and the weights within 1e-5, and something was learned."""
    a, b = read_log(one), read_log(two)
    assert len(a) == len(b) == 50
    assert a[-1][keys[0]] != a[0][keys[0]]
    for x, y in zip(a, b):
        assert all(abs(x[key] - y[key]) < 1e-5 for key in keys), (x, y)
    u, v = weights(one), weights(two)
    assert all((u[key] - v[key]).abs().max() < 1e-5 for key in u)
    files = sorted(path.name for path in two.iterdir())
    assert files == ["ckpt.pt", "config.json", "metrics.jsonl", "summary.json"]


def test_two_processes_equal_one_over_50_steps(tmp_path):
    double = tmp_path / "double.py"
    double.write_text(DOUBLE)

    def side_by_side(script, name, args, args_of_one=()):
        """One process, and two -> their folders."""
        outs = [tmp_path / f"{name}-{n}" for n in ("one", "two")]
        both = [begin([*start, str(double)], ROOT / script, out, "--steps=50", *args, *more)
                for start, out, more in zip((ONE, TWO), outs, (args_of_one, ()))]
        for process in both:
            _, err = process.communicate()
            assert process.returncode == 0, err
        return outs

    one, two = side_by_side("train.py", "sft", SHAPE)
    assert_equal_runs(one, two, ("loss", "tokens"))
    one, two = side_by_side("meta.py", "meta", [f"--init={one / 'ckpt.pt'}"], ["--chunks=2"])
    assert_equal_runs(one, two, ("L_q", "joint", "norm", "rate"))


def ranks_of(out):
    """{rank: pid} of the processes that run into `out`."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            setting = (folder / "environ").read_text().split("\0")
        except OSError:                             # it has ended meanwhile
            continue
        ranks = [int(v[5:]) for v in setting if v.startswith("RANK=")]
        if f"--out={out}" in words and ranks:
            found[ranks[0]] = min(int(folder.name), found.get(ranks[0], 2**31))
    return found
