"""Runs, resuming, checkpoints, bad input. Each run is tiny but real, in a process of its own as a user would start it."""
import json
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
from data import arithmetic, text
from data.flags import flags

ROOT = Path(train.__file__).parent
SMALL = ["--layers=2", "--heads=2", "--width=16", "--batch=8", "--questions=3", "--save_every=4", "--threads=1", "--device=cpu"]


def call(script, *args):
    return subprocess.run([sys.executable, ROOT / script, *args], capture_output=True, text=True)

def weights(path):
    return torch.load(path, weights_only=True)["model"]["weights"]

def test_interrupted_and_resumed_equals_straight(tmp_path, refused):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = subprocess.Popen([sys.executable, ROOT / "train.py", f"--out={straight}", "--steps=120", *SMALL], stdout=subprocess.DEVNULL)
    p = subprocess.Popen([sys.executable, ROOT / "train.py", f"--out={broken}", "--steps=120", *SMALL], stderr=subprocess.PIPE, text=True,
                         start_new_session=True)
    log = broken / "metrics.jsonl"
    while p.poll() is None and (not log.exists() or not (broken / "ckpt.pt").exists()):
        time.sleep(0.02)
    os.killpg(p.pid, signal.SIGINT)                                         # as a terminal does: to the process that makes batches as well
    message = p.communicate()[1]
    assert p.returncode == 130 and "--resume" in message, message
    assert not (broken / "summary.json").exists() and torch.load(broken / "ckpt.pt", weights_only=True)["step"] < 120
    r = call("train.py", f"--out={broken}", "--resume")
    assert r.returncode == 0 == whole.wait(), r.stderr
    a, b = weights(straight / "ckpt.pt"), weights(broken / "ckpt.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (straight, broken)]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0]] == list(range(120))
    before = (straight / "ckpt.pt").read_bytes()
    refused(train, [f"--out={straight}", "--steps=120", *SMALL], ["--resume", "--overwrite"])
    refused(train, [f"--out={straight}", "--resume", "--lr=0.5"], ["--lr=0.5"])
    assert (straight / "ckpt.pt").read_bytes() == before
    assert call("train.py", f"--out={straight}", "--ask=3+5*2").returncode == 0
    for question, word in (("3+x", "'x'"), ("", "empty"), ("3+", "number"), ("2-5", "negative")):
        refused(train, [f"--out={straight}", f"--ask={question}"], [word])


@pytest.mark.parametrize("module,args,words", [
    (train, ["--stepz=3"], ["--stepz"]), (train, ["--steps=0"], ["--steps"]), (train, ["--steps=-4"], ["--steps"]),
    (train, ["--steps=many"], ["--steps"]), (train, ["--lr=nan"], ["--lr"]), (train, ["--cut=1.5"], ["--cut"]),
    (train, ["--style=direct"], ["--style"]), (train, ["--width=15", "--out=OUT/run"], ["width"]), (train, ["--resume", "--out=OUT/none"], ["resume"]),
    (train, ["extra"], ["extra"]), (train, ["--ask=3+4", "--out=OUT/none"], ["no checkpoint"]),
    (train, ["--direct=0.7", "--cut=0.7", "--out=OUT/run"], ["direct"]), (train, ["--device=cuda", "--out=OUT/run"], ["CUDA"]),
    (train, ["--out=/dev/null/run"], ["/dev/null"]),
    (analyze, ["nonsense"], ["nonsense"]), (analyze, ["curve", "--questions=0"], ["--questions"])])
def test_bad_input_is_one_line_and_exit_code_2(module, args, words, tmp_path, refused):
    if "--device=cuda" in args and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    refused(module, [a.replace("OUT", str(tmp_path)) for a in args], words)
    assert not (tmp_path / "run").exists()


def test_foreign_checkpoints_are_refused_and_left_alone(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    cases = {"text": b"hello", "empty": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"model": {}}, tmp_path / "other")
    torch.save(Payload(), tmp_path / "payload")
    torch.save({"format": train.FORMAT, "encoding": text.ENCODING.name, "model": {"shape": {"vocab": 3}, "weights": {}}}, tmp_path / "shape")
    for name in (*cases, "other", "payload", "shape", "missing", "."):
        with pytest.raises(SystemExit) as e:
            train.load_model(tmp_path / name)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "executed").exists() and (tmp_path / "text").read_bytes() == b"hello"


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    """Newton-Schulz against an SVD: same directions, singular values within the band its coefficients give."""
    g = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = train.Muon.orthogonal(g.float()).double()
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    middle = u.mT @ x @ v.mT
    assert (middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3
    assert ((middle.diagonal(dim1=-2, dim2=-1) - 1).abs() < 0.35).all()


def test_held_out_questions_are_the_same_for_every_model_and_never_trained_on():
    for d, ks in train.CELLS.items():
        for k in ks:
            a, b = train.held_out(d, k, 40), train.held_out(d, k, 40)
            assert a == b and len({arithmetic.canonical(q) for q in a}) == len(a)
            assert {arithmetic.split(q) for q in a} == {"test" if k in arithmetic.TRAINED.get(d, ()) else "ood"}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    r = call("train.py", f"--out={tmp_path / 'run'}", "--steps=60", "--lr=1e9", "--lr_adam=1e9", *SMALL)
    assert r.returncode == 1 and "not finite" in r.stderr and "step" in r.stderr, r.stderr


def test_nanogpts_recipe_and_training_until_a_goal(tmp_path, refused):
    """Learned positions and LayerNorm's gains are trained, saved and loaded; a run ends at the first of its checks that reaches the goal."""
    out = tmp_path / "gpt"
    train.train(*flags(train.Train, [f"--out={out}", "--steps=60", "--recipe=nanogpt", "--until=0.00001", "--lr=0.003", *SMALL]))
    s, (model, state) = json.loads((out / "summary.json").read_text()), train.load_model(out / "ckpt.pt")
    assert s["reached"] is False and s["steps"] == 60 and model.config.gpt2 and model.head.weight is model.embed.weight
    assert state["model"]["weights"]["blocks.0.norm1.weight"].std() > 0 and model.place.weight.std() > 0.015
    x = torch.randint(0, 20, (1, 6))
    assert (model(x) - model(x, pos=torch.arange(1, 7)[None])).abs().max() > 1e-4                   # positions are absolute
    torch.testing.assert_close(model(torch.cat((x, x), 1))[:, :6], model(x))
    always = tmp_path / "always"
    monkey = pytest.MonkeyPatch()
    monkey.setattr(train.arithmetic, "verify", lambda q, a: True)
    train.train(*flags(train.Train, [f"--out={always}", "--steps=60", "--until=0.9", *SMALL]))
    monkey.undo()
    s = json.loads((always / "summary.json").read_text())
    assert s["reached"] is True and s["steps"] == 20 == train.load(always / "ckpt.pt")["step"]
    refused(train, ["--recipe=gpt", f"--out={tmp_path / 'no'}"], ["--recipe"])
    refused(train, ["--recipe=adamw", "--init=x", f"--out={tmp_path / 'no'}"], ["--init"])
