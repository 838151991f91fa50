"""What dots are worth, and what tricks cost: `dots`, `speed`. Criteria on made-up data, both ways;
slow ways against fast ones; figures from JSON alone."""
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import meta
from data import tasks, text
from experiments import Analyze, dots, speed
from model import Config, Model

def near(centre):
    """A hundred numbers around a centre."""
    return centre + 0.1 * (-1) ** np.arange(100)

def figure(module, numbers):
    """Draws from what JSON keeps -> bytes of a picture."""
    picture = io.BytesIO()
    module.draw(json.loads(json.dumps(numbers))).savefig(picture)
    return len(picture.getvalue())


@pytest.mark.parametrize("module", (dots, speed))
def test_an_experiment_runs_and_its_figure_needs_the_json_alone(module, monkeypatch):
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=3, heads=2, width=32))
    for name, value in (("REPEATS", 1), ("LENGTHS", (64,)), ("CURVE", 8)):
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "Config", lambda vocab: model.config)
    runs = SimpleNamespace(sft=lambda: model, device=model.device)
    verdicts, numbers = module.judge(module.measure(Analyze(questions=40, cells="expr:4"), runs))
    assert set(verdicts.values()) <= {"supported", "refuted", "inconclusive", "measured"}
    assert figure(module, numbers) > 10_000


# ------------------------------------------------------------------------------------------ dots

def test_dots_can_go_either_way():
    for after, verdict in ((1.0, "supported"), (3.0, "refuted"), (2.0, "inconclusive")):
        loss = {n: near(after if n else 2.0) for n in dots.DOTS}
        assert dots.judge(loss)[0] == {"dots help": verdict}


# ----------------------------------------------------------------------------------------- speed

def test_slow_ways_and_fast_ones_give_the_same(tiny):
    inner = meta.Inner(tiny, meta.fast_layers(tiny, "*.up,*.down")).double()
    batch = tasks.tasks_at(0, meta.Meta(batch=3))
    for slow, fast in zip(speed.by_loop(tiny, inner, batch), speed.by_dual(tiny, inner, batch)):
        assert torch.allclose(slow, fast, atol=1e-9)
    rows = [text.prompt("3+5"), text.prompt("4*7")]
    grown = speed.uncached(tiny, rows, 5)
    assert [row[len(rows[0]):] for row in grown] == tiny.generate(rows, -1, 5)
