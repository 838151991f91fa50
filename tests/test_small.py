"""What dots are worth, and what tricks cost: `dots`, `speed`. Criteria on made-up data, both ways;
slow ways against fast ones; figures from JSON alone."""
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import experiments
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
    for name, value in (("LONG", 1e-9), ("LENGTHS", (64,)), ("SIZES", {"cpu": (2, 2, (8,), 64)}),
                        ("exact_match", lambda *_: None), ("Config", lambda vocab: model.config)):
        monkeypatch.setattr(speed, name, value)
    c = Analyze(questions=40, cells="expr:4")
    raw = module.measure(c, SimpleNamespace(sft=lambda: model, device=model.device))
    verdicts, numbers = module.judge([*raw][-1] if module is speed else raw)
    assert set(verdicts.values()) <= {"supported", "refuted", "inconclusive", "measured"}
    assert figure(module, numbers) > 10_000


# ------------------------------------------------------------------------------------------ dots

def test_dots_can_go_either_way():
    for after, verdict in ((1.0, "supported"), (3.0, "refuted"), (2.0, "inconclusive")):
        loss = {n: near(after if n else 2.0) for n in dots.DOTS}
        assert dots.judge(loss)[0] == {"dots help": verdict}


# ----------------------------------------------------------------------------------------- speed

def test_what_is_measured_row_by_row_is_on_disk_when_it_is_cut_off(tmp_path, monkeypatch):
    def measure(c, runs):
        for n in (1, 2):
            yield {"ratios": {"a": n}}
        raise KeyboardInterrupt
    monkeypatch.setattr(speed, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        experiments.run("speed", Analyze(out=str(tmp_path)), torch.device("cpu"), {})
    result = json.loads((tmp_path / "figures" / "speed.json").read_text())
    assert result["numbers"] == {"ratios": {"a": 2}} and result["verdicts"]

def test_slow_ways_and_fast_ones_give_the_same(tiny):
    inner = meta.Inner(tiny, meta.fast_layers(tiny, "*.up,*.down")).double()
    batch = tasks.tasks_at(0, meta.Meta(batch=3))
    for slow, fast in zip(speed.by_loop(tiny, inner, batch), speed.by_dual(tiny, inner, batch)):
        assert torch.allclose(slow, fast, atol=1e-9)
    rows = [text.prompt("3+5"), text.prompt("4*7")]
    grown = speed.uncached(tiny, rows, 5)
    assert [row[len(rows[0]):] for row in grown] == tiny.generate(rows, -1, 5)
