"""Two processes and gloo against one process; one of them killed; what cannot be shared out."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import analyze
import train
from lab import machine
from lab.run import read_log

ROOT = Path(train.__file__).parent
SMALL = ["--batch=9", "--questions=3", "--threads=1", "--device=cpu"]
SHAPE = ["--layers=2", "--heads=2", "--width=16", "--dtype=float32"]
ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Command lines of scripts, one after the other; in float32 rounding grows from step to step.
IN_DOUBLE = f"""import sys, torch
torch.set_default_dtype(torch.float64)
sys.path.insert(0, {str(ROOT)!r})
import meta, train
from lab.machine import leave
for line in sys.argv[1:]:
    sys.argv = line.split()
    {{"train.py": train, "meta.py": meta}}[sys.argv[0]].main()
leave()
"""


def begin(*command):
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)

def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True)

def wait_for(p, seen):
    """Until seen() is true, or the process ends."""
    while p.poll() is None and not seen():
        time.sleep(0.05)


# ------------------------------------------------------------------------------ two against one

def lines(folder, chunks):
    """Command lines: an SFT run into a folder, and a meta run that starts from it."""
    sft, options = f"{folder}/train.py", " ".join(["--steps=50", *SMALL])
    init = f"--init={sft}/ckpt.pt --dtype=float32"
    return [f"train.py --out={sft} {options} {' '.join(SHAPE)}",
            f"meta.py --out={folder}/meta.py {options} {init} --chunks={chunks}"]

def assert_equal_runs(one, two, keys):
    """50 steps that changed something; logged numbers and weights within 1e-5."""
    a, b = read_log(one), read_log(two)
    assert len(a) == len(b) == 50
    assert a[0][keys[0]] != a[-1][keys[0]]
    for x, y in zip(a, b):
        assert all(abs(x[key] - y[key]) < 1e-5 for key in keys), (x, y)
    u, v = (checkpoint(out)["model"]["weights"] for out in (one, two))
    assert all((u[key] - v[key]).abs().max() < 1e-5 for key in u)
    files = sorted(path.name for path in two.iterdir())
    assert files == ["ckpt.pt", "config.json", "metrics.jsonl", "summary.json"]

def test_two_processes_equal_one_over_50_steps(tmp_path):
    script = tmp_path / "double.py"
    script.write_text(IN_DOUBLE)
    one, two = tmp_path / "one", tmp_path / "two"
    runs = [begin(*ONE, script, *lines(one, 2)), begin(*TWO, script, *lines(two, 1))]
    for run in runs:
        _, err = run.communicate()
        assert run.returncode == 0, err
    assert_equal_runs(one / "train.py", two / "train.py", ("loss", "tokens"))
    assert_equal_runs(one / "meta.py", two / "meta.py", ("L_q", "joint", "norm", "rate"))


# ----------------------------------------------------------------------------- one of two killed

def ranks_of(torchrun):
    """{rank: pid} of the processes that a torchrun has started."""
    found = {}
    for children in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            ranks = [int(v[5:]) for v in variables if v.startswith("RANK=")]
            found.update({rank: int(pid) for rank in ranks})
    return found

def kill_one(run, out, victim):
    """Kills one of two processes once there is a checkpoint."""
    wait_for(run, (out / "ckpt.pt").exists)
    ranks = ranks_of(run)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[victim], signal.SIGKILL)

def ended(run, out):
    """-> how many steps a run has saved, one of whose processes was killed"""
    _, err = run.communicate(timeout=60)
    assert run.returncode
    assert "error: another process of this run has ended" in err and "--resume" in err, err
    done = checkpoint(out)["step"]
    assert 5 <= done <= len(read_log(out))
    return done

def goes_on(run, out, done):
    """Stops a resumed run once it has taken a step -> has it?"""
    def further():
        return checkpoint(out)["step"] > done
    wait_for(run, further)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 143, err
    return checkpoint(out)["step"] == len(read_log(out)) > done

def test_killing_one_ends_the_other_with_a_clear_line_and_resume_goes_on(tmp_path):
    outs = [tmp_path / f"victim-{rank}" for rank in (0, 1)]
    args = ["--steps=100000", "--save_every=5", *SMALL, *SHAPE]
    runs = [begin(*TWO, "train.py", f"--out={out}", *args) for out in outs]
    try:
        for rank in (0, 1):
            kill_one(runs[rank], outs[rank], rank)
        done = list(map(ended, runs, outs))
        runs += [begin(*ONE, "train.py", f"--out={out}", "--resume") for out in outs]
        assert all(map(goes_on, runs[2:], outs, done))
    finally:
        for run in runs:
            run.kill()


# --------------------------------------------------------------------- what cannot be shared out

def test_what_cannot_be_shared_out_is_refused(refused, exits, monkeypatch, tmp_path):
    for module in (train, machine):
        monkeypatch.setattr(module, "WORLD", 2)
    refused(train, ["--method=grpo", "--init=x", "--out=x"], ["one process", "torchrun"])
    refused(analyze, ["curve"], ["one process", "torchrun"])

    for name in BY_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    refused(train, ["--out=x", "--device=cpu"], ["WORLD_SIZE", "torchrun"])
    assert not list(tmp_path.iterdir())

    for name in BY_TORCHRUN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "device_count", int)                # none
    exits(["process 1", "0 CUDA devices"], machine.join, True)
