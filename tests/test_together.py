"""Two processes and gloo against one process; one of them killed."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(train.__file__).parent
SMALL = ["--batch=9", "--questions=3", "--threads=1", "--device=cpu"]
SHAPE = ["--layers=2", "--heads=2", "--width=16"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
DOUBLE = """import runpy, sys, torch
torch.set_default_dtype(torch.float64)                                      # in float32 rounding grows from step to step
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

def test_two_processes_equal_one_over_50_steps(tmp_path):
    wrapper = tmp_path / "double.py"
    wrapper.write_text(DOUBLE.format(root=str(ROOT)))
    run = lambda start, script, out, *args: subprocess.run([*start, str(wrapper), str(ROOT / script), f"--out={out}", "--steps=50", *SMALL, *args],
                                                           capture_output=True, text=True, check=True)
    one, two, one_meta, two_meta = (tmp_path / n for n in ("one", "two", "one-meta", "two-meta"))
    run([sys.executable], "train.py", one, *SHAPE)
    run(TORCHRUN, "train.py", two, *SHAPE)
    run([sys.executable], "meta.py", one_meta, f"--init={one / 'ckpt.pt'}", "--chunks=2")
    run(TORCHRUN, "meta.py", two_meta, f"--init={one / 'ckpt.pt'}")
    for a, b, keys in ((one, two, ("loss", "tokens")), (one_meta, two_meta, ("L_q", "joint", "norm", "rate"))):
        assert len(log(a)) == len(log(b)) == 50 and log(a)[-1][keys[0]] != log(a)[0][keys[0]]
        for x, y in zip(log(a), log(b)):
            assert all(abs(x[k] - y[k]) < 1e-5 for k in keys), (x, y)
        u, v = (torch.load(d / "ckpt.pt", weights_only=True)["model"]["weights"] for d in (a, b))
        assert all((u[k] - v[k]).abs().max() < 1e-5 for k in u)
        assert sorted(p.name for p in b.iterdir()) == ["ckpt.pt", "config.json", "metrics.jsonl", "summary.json"]


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_ends_the_other_with_a_clear_line_and_resume_goes_on(tmp_path, victim):
    out = tmp_path / "run"
    p = subprocess.Popen([*TORCHRUN, "train.py", f"--out={out}", "--steps=100000", "--save_every=5", *SMALL, *SHAPE], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while p.poll() is None and not (out / "ckpt.pt").exists():
            time.sleep(0.05)
        ranks = {}
        for pid in (int(d.name) for d in Path("/proc").iterdir() if d.name.isdigit()):
            try:
                if f"--out={out}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    ranks |= {v[5:]: pid for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if v.startswith("RANK=")}
            except OSError:
                pass                                                        # it has ended meanwhile
        assert sorted(ranks) == ["0", "1"], ranks
        os.kill(ranks[str(victim)], signal.SIGKILL)
        message = p.communicate(timeout=60)[1]
    finally:
        p.kill()
    assert p.returncode and "error: another process of this run has ended" in message and "--resume" in message, message
    done = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert done >= 5 and done <= len(log(out)) + 1


def test_what_cannot_be_shared_out_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    refused(train, ["--method=grpo", "--init=x", f"--out={tmp_path / 'x'}"], ["torchrun"])
