import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train                                                                # noqa: E402
from data import text                                                       # noqa: E402
from model import Config, Model                                             # noqa: E402


@pytest.fixture
def tiny():
    """A float64 model with weights that matter everywhere (a fresh one has zero output projections)."""
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=3, heads=2, width=16)).double()
    for b in model.blocks:
        for layer in (b.out, b.down):
            torch.nn.init.normal_(layer.weight, std=0.2)
    return model


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls a script's command line in this process: exit code 2, one line on stderr that has the words, nothing else raised."""
    def call(module, args, words):
        monkeypatch.setattr(sys, "argv", [module.__file__, *args])
        with pytest.raises(SystemExit) as e:
            train.command(module.main)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and all(w in err for w in words), err
    return call
