"""What several test files share: a tiny model, tiny runs in this process, refusals."""
import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent))

import meta
import train
from data import arithmetic, text
from lab.flags import flags
from lab.run import load, read_log
from model import Config, Model

SMALL = ["--questions=2", "--threads=1", "--device=cpu", "--dtype=float32", "--save_every=2"]
RL = ["--steps=6", "--batch=8", "--group=4", *SMALL]
# Runs of every kind, each in a fraction of a second.
KINDS = {
    "sft": ["--steps=24", "--layers=2", "--heads=2", "--width=16", "--batch=8", *SMALL],
    "grpo": ["--method=grpo", "--update=3", *RL], "dpo": ["--method=dpo", *RL],
    "meta": ["--steps=12", "--batch=3", "--K=2", "--fast=*.up,*.down", *SMALL]}


def a_run(kind, out, *args):
    """Runs one of KINDS into a folder, or resumes it with --resume -> summary."""
    words = [f"--out={out}", *args, *([] if "--resume" in args else KINDS[kind])]
    if kind == "meta":
        return meta.meta(*flags(meta.Meta, words))
    return train.train(*flags(train.Train, words))

def rated(q, output):
    """A reward that takes every value at an untrained model's outputs."""
    return (1.0, 0.0, 1.0, -0.5, -1.0)[len(output) % 5]

def product(folder):
    """What of a run may not depend on how often it was stopped."""
    state = load(Path(folder) / "ckpt.pt")
    log = [line | {"seconds": 0} for line in read_log(folder)]
    return {**{name: state[name] for name in ("step", "model", "optimisers", "extra")}, "log": log}

def contents(folder):
    """{path: bytes} of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def close(a, b, tolerance=1e-10):
    """Asserts that numbers, arrays or tensors are equal to rounding."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def logp_at_end(model, ids, weights={}):
    """The log-probabilities of what follows a plain row of ids (V,), some weights given."""
    h = functional_call(model, weights, (torch.tensor([ids]),))
    return model.logits(h[0, -1]).log_softmax(-1)

def slow_nll(model, row, weights={}):
    """-log p of every target of a Row, each from a plain row that ends there: no mask, no asides
    -> [tensor]."""
    trunk, losses = [token.id for token in row.trunk], []
    for token in (*row.asides, *row.trunk):
        if token.target >= 0:
            ids = [*trunk[:token.place], token.id]
            losses.append(-logp_at_end(model, ids, weights)[token.target])
    return losses

def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)

def drawn(module, numbers):
    """Asserts that an experiment draws a picture of what JSON keeps of its numbers."""
    picture = io.BytesIO()
    module.draw(json.loads(json.dumps(numbers))).savefig(picture)
    assert len(picture.getvalue()) > 10_000

@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors here are so small that a second thread only costs."""
    torch.set_num_threads(1)

@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a run of train.py that nothing stopped."""
    out = tmp_path_factory.mktemp("base") / "s\xe4\u0444t"
    a_run("sft", out)
    return out

@pytest.fixture(scope="session")
def straight(base, tmp_path_factory):
    """{kind: (arguments, the folder of a run that nothing stopped, its seconds)}."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "reward", rated)
        for kind in KINDS:
            out, began = tmp_path_factory.mktemp(kind), time.perf_counter()
            init = [] if kind == "sft" else [f"--init={base / 'ckpt.pt'}"]
            a_run(kind, out, *init)
            found[kind] = [*KINDS[kind], *init], out, time.perf_counter() - began
    return found

@pytest.fixture
def tiny():
    """A float64 model whose weights matter everywhere: a fresh one's output projections are 0."""
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=3, heads=2, width=16)).double()
    for block in model.blocks:
        torch.nn.init.normal_(block.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return model

@pytest.fixture
def exits(capsys):
    """exits(words, f, *args): f(*args) ends with exit code 2 and one line on stderr that has the
    words."""
    def call(words, f, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            f(*args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err
    return call
