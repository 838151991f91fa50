"""What tokens and dots are worth, and what tricks cost: `tokens`, `dots`, `speed`. Criteria on
made-up data, both ways; slow ways against fast ones; figures from JSON alone."""
import io
import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import meta
import train
from data import tasks, text
from experiments import Analyze, dots, speed, tokens
from lab.run import save
from model import Config, Model

ALL = "states,short,reflect"


def near(centre):
    """A hundred numbers around a centre."""
    return centre + 0.1 * (-1) ** np.arange(100)

def share(p):
    return np.arange(100) < 100 * p

def figure(module, numbers):
    """Draws from what JSON keeps -> bytes of a picture."""
    picture = io.BytesIO()
    module.draw(json.loads(json.dumps(numbers))).savefig(picture)
    return len(picture.getvalue())


@pytest.mark.parametrize("module, style", [
    (tokens, "states"), (tokens, ALL), (dots, "states"), (speed, "states")])
def test_an_experiment_runs_and_its_figure_needs_the_json_alone(module, style, tmp_path,
                                                                monkeypatch):
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=2, heads=2, width=32))
    c = Analyze(sft=str(tmp_path), questions=40, cells="expr:4")
    save(tmp_path / "ckpt.pt", model=model.state(), step=0, optimisers=[],
         config=asdict(train.Train(style=style)))
    for name, value in (("REPEATS", 1), ("LENGTHS", (64,)), ("CURVE", 8)):
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "Config", lambda vocab: model.config)
    runs = SimpleNamespace(sft=lambda: model, device=model.device)
    verdicts, numbers = module.judge(module.measure(c, runs))
    for verdict in verdicts.values():
        assert verdict.split()[0] in ("supported", "refuted", "inconclusive", "measured", "not")
    untested = [part for part, verdict in verdicts.items() if verdict.startswith("not")]
    if module is tokens:
        assert bool(untested) == (style == "states")
    assert figure(module, numbers) > 10_000


# ---------------------------------------------------------------------------------------- tokens

def made_up(falls, reflects=False):
    """A row per token of 100 questions with three states each; falls: {kind: its fall}."""
    rows = []
    for j in range(100):
        steps = ["(3+5)*2", "4W8*2" if reflects and j % 2 else "8*2", "6"]
        rows += [(j, place, kind, 1.0, 1.0, 1.0 - falls.get(kind, 0))
                 for place, kind in tokens.tokens_of(steps)]
    return np.rec.fromrecords(rows, names="question,place,kind,past,before,after")

def test_kinds_of_tokens():
    kinds = tokens.tokens_of(["(3+1)-2", "9-2W4-2", "1W2"])
    assert [kind for _, kind in kinds] == [
        *("bracket digit operator digit bracket operator digit ;".split()),
        *["slip"] * 3, *["mended"] * 4, ";", *["answer"] * 3]
    assert [place for place, _ in kinds] == [0, 0, 0, 1, 1, 1, 2, 2,
                                             3, 3, 3, 4, 4, 4, 5, 5, 9, 9, 9]

def test_a_token_stands_between_two_losses(tmp_path, monkeypatch):
    save(tmp_path / "ckpt.pt", model={}, step=0, optimisers=[], config=asdict(train.Train()))
    monkeypatch.setattr(tokens, "curves_of", lambda model, questions, thinks: [
        np.arange(len(think) + 1) for think in thinks])
    c = Analyze(sft=str(tmp_path), questions=20, cells="expr:3")
    raw = tokens.measure(c, SimpleNamespace(sft=lambda: None))
    assert raw.before[:5].tolist() == [0, 1, 2, 3, 4] and raw.past[:3].tolist() == [0, 0, 1]
    assert (raw.after == raw.before + 1).all() and raw.kind[:5].tolist()[3:] == [";", "answer"]

def test_tokens_can_go_either_way():
    digits, readable = "digits lower it more", "readable inside a state"
    for fall, verdict in ((0.5, "supported"), (-0.5, "refuted"), (0, "inconclusive")):
        verdicts, numbers = tokens.judge(made_up({"digit": fall}))
        assert verdicts[digits] == verdict
        assert numbers["fall"]["digit"][0] == pytest.approx(fall, abs=0.02)
        assert verdicts["reflection, net"].startswith("not tested")
    # what a `;` does makes no other token look good, and neither does the answer
    assert tokens.judge(made_up({";": -5, "answer": -5}))[0][digits] == "inconclusive"
    assert tokens.judge(made_up({}))[0][readable] == "supported"
    assert tokens.judge(made_up({"operator": -3}))[0][readable] == "refuted"
    alike = made_up({"digit": 1, "operator": 1, "bracket": 1})
    assert tokens.judge(alike)[0][digits] == "inconclusive"

def test_a_slip_and_its_correction_count_together():
    for mended, verdict in ((1.0, "supported"), (0.1, "refuted")):
        raw = made_up({"slip": -0.5, "mended": mended}, reflects=True)
        verdicts, numbers = tokens.judge(raw)
        assert verdicts["reflection, net"] == verdict
        assert numbers["beyond others"]["slip"][0] < 0 < numbers["beyond others"]["mended"][0]
        assert figure(tokens, numbers) > 10_000

def test_the_notebooks_ratio_spans_two_steps():
    raw = made_up({})
    raw.past, raw.before, raw.after = 4.0, 2.0, 1.0
    numbers = tokens.judge(raw)[1]
    assert numbers["one step"]["digit"][0] == 0.5
    assert numbers["two steps"]["digit"][0] == 0.75


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
