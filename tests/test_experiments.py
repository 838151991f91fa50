"""Experiments run, and draw from JSON alone; criteria decide on made-up data, either way; slow
constructions against fast ones; the results page says what the JSON beside it says."""
import importlib
import json
import os
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import drawn
from matplotlib import rcParams

import analyze
import experiments
import meta
import train
from data import arithmetic, tasks, text
from experiments import (Analyze, Runs, curve, descent, dots, explicit, figure, gradient, page,
                         patch, speed, step)
from experiments.arms import Arm
from lab.run import ROOT, checksum, write
from model import Config, Model

N = 100
RNG = np.random.default_rng(0)
QUESTIONS = [arithmetic.parse(q) for q in ("((3+5)*2)-7", "2+3+4")]
THINKS = ["(8*2)-7;6-7;9", "5+4;9"]


def near(centre, *shape):
    """Numbers around a centre, N of them unless a shape is given."""
    return centre + 0.1 * RNG.normal(size=shape or (N,))

def fresh(**shape):
    torch.manual_seed(0)
    return analyze.untrained(Model(Config(text.VOCAB, heads=2, **shape)))


@pytest.mark.parametrize("module", (dots, speed, patch, gradient))
def test_an_experiment_runs_and_its_figure_needs_the_json_alone(module, monkeypatch):
    model = fresh(layers=3, width=32)
    for name, value in (("LONG", 1e-9), ("LENGTHS", (64,)), ("SIZES", {"cpu": (2, 2, (8,), 64)}),
                        ("exact_match", lambda *_: None), ("Config", lambda vocab: model.config)):
        monkeypatch.setattr(speed, name, value)
    runs = SimpleNamespace(sft=lambda: model, device=model.device)
    raw = module.measure(Analyze(questions=20, cells="expr:3"), runs)
    verdicts, numbers = module.judge([*raw][-1] if module is speed else raw)
    assert set(verdicts.values()) <= {"supported", "refuted", "inconclusive", "measured",
                                      "not testable here"}
    drawn(module, numbers)
    if module is patch:                     # a theorem: no training is needed
        assert list(verdicts.values()) == ["supported", "refuted", "supported"]
        errors = numbers["proposition"]
        assert np.median(errors["as printed"]) > 0.5 and max(errors["rank-1 repair"]) < 1e-12
        assert min(errors["P the other way round"]) > 1e-4


def noisy(rng, *levels):
    """Curves of N questions around these levels."""
    return np.array(levels) + 0.05 * rng.standard_normal((N, len(levels)))

def a_curve(rng, correct, alike=True, alone=True):
    """What `curve.measure` gives; alike: what is left, asked alone, has the same loss."""
    states = {kind: noisy(rng, 2, 4, 6, 8, 9, 9) for kind in ("wrong", "other", "filler")}
    left = {n: 2 * rng.random(N) for n in curve.LEFT}
    law = {n: (loss, loss + 0.01 * rng.standard_normal(N) if alike else rng.permutation(loss))
           for n, loss in left.items()}
    says = {name: np.ones(N, bool) for name in ("all states: the answer", "other")}
    says["last state alone: the answer"] = np.arange(N) < (N if alone else N // 2)
    predicted = correct[:, :-1] if alike else correct[:, -2::-1]
    fall = noisy(rng, 1)[:, 0]
    example = {"text": "1+2 = 3", "tokens": "1;3", "L_hat": [2, 1, 1, 0]}
    return (states | {"correct": correct}, {"right": fall, "wrong": -fall}, predicted, law, says,
            example)

@pytest.mark.parametrize("levels, shape", [((2, 1.6, 1.2, 0.8, 0.4, 0), "supported"),
                                           ((2, 2, 2, 2, 0, 0), "refuted")])
def test_a_slope_is_progressive_and_a_cliff_is_not(levels, shape):
    verdicts, numbers = curve.judge(a_curve(np.random.default_rng(0),
                                            noisy(np.random.default_rng(1), *levels)))
    assert verdicts["progressive"] == shape and verdicts["direction"] == "supported"
    drawn(curve, numbers)

def test_the_law_its_place_and_the_last_state_can_be_refuted():
    rng = np.random.default_rng(0)
    places = rng.integers(0, 4, N)
    cliffs = np.where(np.arange(6) <= places[:, None], 2.0, 0.0)
    parts = ("the law", "the jump's place", "states replace one another")
    holds, _ = curve.judge(a_curve(rng, cliffs))
    fails, _ = curve.judge(a_curve(rng, cliffs, alike=False, alone=False))
    assert [holds[part] for part in parts] == ["supported"] * 3
    assert [fails[part] for part in parts] == ["refuted"] * 3
    rising, _ = curve.judge(a_curve(rng, noisy(rng, 0, 1, 1, 1, 1, 2)))
    assert rising["direction"] == "refuted" and rising["progressive"] == "not testable here"

def an_explicit(rng, knows, alike):
    """What `explicit.measure` gives; knows: theta' is right, but for what is unrelated."""
    rows = {kind: {"theta": np.full(N, kind in ("fact", "unrelated")),
                   "theta_prime": np.full(N, knows and kind != "other"),
                   "in_context": np.ones(N, bool)} for kind in explicit.LABELS}
    context = 2 * rng.random((N, 6))
    again = context + 0.01 * rng.standard_normal((N, 6))
    weights = again if alike else rng.permutation(context)
    curves = {"context": context, "reordered": again, "weights": weights, "other": context}
    curves["predicted"] = context[:, :-1]
    lines = {"commonest": 0.2, "shallow": 0.22}
    return {6: rows, 7: rows}, {6: lines, 7: lines}, curves

@pytest.mark.parametrize("holds, verdict", [(True, "supported"), (False, "refuted")])
def test_explicit_can_go_either_way(holds, verdict):
    verdicts, numbers = explicit.judge(an_explicit(np.random.default_rng(0), holds, holds))
    carried = verdicts.pop("it carries results")
    assert carried == ("supported" if holds else "inconclusive")    # nothing above nothing
    assert set(verdicts.values()) == {verdict}
    drawn(explicit, numbers)
    assert "theta' (theta)" in explicit.show(numbers)[0]

@pytest.mark.parametrize("falls, verdict", [(True, "supported"), (False, "refuted")])
def test_a_step_can_go_either_way(falls, verdict):
    slope = 2 - step.ALONG if falls else step.ALONG
    along = {name: slope + 0.01 * np.random.default_rng(0).standard_normal((N, len(slope)))
             for name in ("inner", "L_support", "L_q")}
    carriers = dict.fromkeys(step.PARTS, np.ones(N, bool))
    cosines = {"the same trajectory": [0.25] * N}
    verdicts, numbers = step.judge((along, carriers, {"before ;": 1.0}, cosines))
    assert set(verdicts.values()) == {verdict} and "0.250" in step.show(numbers)[0]
    drawn(step, numbers)

def test_a_step_without_a_gradient_is_refused(exits):
    runs = SimpleNamespace(meta=lambda: (None, SimpleNamespace(update="register"), None))
    exits(["by a gradient"], step.measure, Analyze(), runs)

def test_shares_of_a_step_are_those_of_the_matrices_that_each_token_adds():
    """<dW_token, dW> / |dW|^2, dW_token = alpha x^T d written out."""
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=2, heads=2, width=8)).double()
    inner = meta.Inner(model, ["0.up", "1.down"], alpha=0.5).double()
    rows, _ = step.trials(model, [arithmetic.parse("((3+5)*2)-7")], "states", random.Random(0))
    update, = meta.adapt(model, inner, rows, order=1).updates
    whole, at_digits = 0, 0
    those = (rows.inner[0] >= 0) & (rows.inner[0] < 10)
    for X, D in update.values():
        dW, dW_digits = X[0].T @ D[0], X[0, those].T @ D[0, those]
        whole, at_digits = whole + (dW * dW).sum(), at_digits + (dW_digits * dW).sum()
    parts = step.shares(inner, rows, update)
    assert parts["before a digit"] == pytest.approx(float(at_digits / whole))
    assert sum(parts.values()) == pytest.approx(1)

def a_descent(own, nonsense, context=0.5, falls=True):
    """What `descent.measure` gives: shares right by arm, those of the own targets 2 points up and
    down from seed to seed."""
    shares, places = dict.fromkeys(descent.ARMS, nonsense), np.arange(N) / N
    shares |= {descent.OWN: own, "no inner loop": 0.2, "in the context": context}
    facts = {"flags": "", "seconds": 9, "tokens": 9, "checksums": []}
    arms = {name: Arm({"sibling": np.array([places < share + spread * (name == descent.OWN)
                                            for spread in (-0.02, 0, 0.02)], float)}, facts)
            for name, share in shares.items()}
    losses = np.array([[2, 1.1], [2, 1], [2, 0.9]] if falls else [[1, 2], [1, 2.1], [1, 2]])
    return arms, {name: np.ones((3, 5)) for name in arms}, {descent.OWN: losses}, 0.2

@pytest.mark.parametrize("given, descends, written, loop, context", [
    ((0.9, 0.4), "supported", "refuted", "supported", "supported"),
    ((0.9, 0.4, 0.9, False), "refuted", "refuted", "supported", "inconclusive"),
    ((0.7, 0.7, 0.9), "refuted", "supported", "supported", "refuted"),
    ((0.2, 0.2), "refuted", "supported", "inconclusive", "refuted")])
def test_descent_is_told_from_a_write_by_the_rule(given, descends, written, loop, context):
    verdicts, numbers = descent.judge(a_descent(*given))
    assert [*verdicts.values()] == [descends, written, loop, context]
    drawn(descent, numbers)


def test_dots_can_go_either_way():
    noise = near(0)
    for after, verdict in ((1.0, "supported"), (3.0, "refuted"), (2.0, "inconclusive")):
        loss = {n: noise + (after if n else 2.0) for n in dots.DOTS}
        assert dots.judge(loss)[0] == {"dots help": verdict}

def test_what_is_measured_row_by_row_is_on_disk_when_it_is_cut_off(tmp_path, monkeypatch):
    def measure(c, runs):
        for n in (1, 2):
            yield {"ratios": {"a": n}}
        raise KeyboardInterrupt
    monkeypatch.setattr(speed, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        experiments.run("speed", Analyze(out=str(tmp_path)), torch.device("cpu"))
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

def test_patch_can_go_either_way():
    level = {"no patch": 9, "another question's patch": 9, "float32": 1e-6, "float64": 1e-14,
             "float64, one theta' per row": 1e-13}
    layers = {"as printed": 1, "rank-1 repair": 1e-15}

    def verdicts(**other):
        errors = {name: np.full(100, x) for name, x in (level | other).items()}
        mended = {name: np.full(100, x) for name, x in layers.items()}
        return list(patch.judge(("", errors, mended))[0].values())
    assert verdicts() == ["supported", "refuted", "supported"]
    for name, x in (("float32", 1e-3), ("float64", 1e-9), ("float64, one theta' per row", 1e-9),
                    ("no patch", 1e-5), ("another question's patch", 1e-5)):
        assert verdicts(**{name: x})[0] == "refuted"
    layers = {"as printed": 1e-15, "rank-1 repair": 1}
    assert verdicts() == ["supported", "supported", "refuted"]

@pytest.mark.parametrize("size", (1, 0))                # 0: hidden units never fire
def test_one_theta_prime_does_for_the_whole_row_what_the_trajectory_does(size):
    model = fresh(layers=2, width=64).double()
    model.blocks[0].up.weight.data *= size
    found = analyze.exact_patches(model, QUESTIONS, THINKS)
    logits = patch.one_theta_prime(model, QUESTIONS, THINKS)
    assert patch.largest(found.plain, found.full).min() > 1e-2
    assert patch.largest(logits, found.full).max() < 1e-11

def tokens_of(every, bias, slope=0.0, falls=(0.2, 0.35, 0.9), shares=None):
    """Four tokens of each of 100 questions, their cosines close to level + slope * fall."""
    fall = RNG.choice(falls, 400, p=shares) * (1 + 0.01 * RNG.random(400))
    cosines = [level + slope * fall + 0.3 * near(0, 400) for level in (every, bias)]
    return np.stack([np.arange(400) // 4, fall, *cosines])

def judged(trained, control, **changes):
    found = {name: control for name in gradient.COLOUR} | {"trained": trained} | changes
    found["untrained"] = np.stack([*trained[:2], *found["untrained"][2:]])
    one_each = {member: {"another's gradient": near(0)} for member in gradient.MEMBERS}
    verdicts, numbers = gradient.judge(("", found, one_each))
    return *verdicts.values(), numbers["gaps"]["aligned"]

def test_gradient_can_go_either_way():
    low, middle, high = tokens_of(0, 0.1), tokens_of(0.3, 0.3), tokens_of(0.7, 0.8)
    assert judged(high, low)[:2] == ("supported", "supported")
    assert judged(middle, low)[:2] == ("supported", "refuted")
    assert judged(middle, high)[:2] == ("refuted", "refuted")
    for name in ("shuffled", "another's", "untrained"):
        assert judged(middle, low, **{name: high})[0] == "refuted"

def test_gradient_is_decided_where_both_patches_agree_and_losses_fall_alike():
    low, one, other = tokens_of(0, 0), tokens_of(0.3, 0.8), tokens_of(-0.3, 0.3)
    assert judged(one, low)[:2] == ("supported", "inconclusive")
    assert judged(other, low)[:2] == ("inconclusive", "refuted")
    flat, steep = (tokens_of(0, 0, falls=falls) for falls in ((0.0, 0.2), (0.0, 3.0)))
    for control in (flat, steep):
        assert judged(tokens_of(0.7, 0.7), control)[:2] == ("not testable here", "supported")
    assert judged(flat, flat)[:2] == ("not testable here", "not testable here")

def test_gradient_compares_conditions_at_equal_falls():
    """Cosines that follow the fall alone: larger falls have larger ones, and are not ahead."""
    falls, large, small = (0.35, 0.9, 2.0), (0.1, 0.3, 0.6), (0.6, 0.3, 0.1)
    trained, control = (tokens_of(0, 0, 0.3, falls, shares) for shares in (large, small))
    verdict, _, gaps = judged(trained, control)
    assert verdict != "supported"
    assert trained[2].mean() - control[2].mean() > 0.1
    assert all(abs(gaps[f"{member}, above shuffled"][0]) < 0.03 for member in gradient.MEMBERS)
    assert judged(tokens_of(0, 0, 0.5, falls, small), trained, untrained=0 * trained)[0] == (
        "supported")
    found = gradient.partners(np.array([1.0, 2.0, 9.0]), np.array([2.3, 1.05, 8.9]), np.arange(3))
    np.testing.assert_equal(found, [1, np.nan, np.nan])

@pytest.mark.parametrize("row", (0, 1))
def test_patches_of_all_prefixes_equal_those_of_one_prefix_written_as_matrices(tiny, row):
    """In loss, and in the cosine of a token's increment with autograd's gradient."""
    q, think, i = QUESTIONS[row], THINKS[row], 3
    layers, nll = gradient.at_patched(tiny, q, think)
    np.testing.assert_allclose(nll, analyze.curves_of(tiny, [q], [think])[0], atol=1e-12)
    assert np.ptp(nll) > 1e-3

    now, then = (analyze.exact_patches(tiny, [q], [think[:n]], bias=True) for n in (i, i + 1))
    now, then = (matrices(found.patches) for found in (now, then))
    own = {name: m.clone().requires_grad_() for name, m in now.items()}             # (out, in)

    def hook(name, x, y):
        if name not in own:
            return y
        z = torch.ones_like(x[:, -1:, :1]) if name.endswith("down") else x[:, -1:]
        return torch.cat((y[:, :-1], y[:, -1:] + z @ own[name].T), 1)
    logp = analyze.direct_logp.__wrapped__(tiny, [q], hook)             # with its gradient
    gradients = torch.autograd.grad(-logp[0, int(q.answer)], list(own.values()))
    steps = torch.cat([(then[name] - now[name]).flatten() for name in own])
    flat = -torch.cat([g.flatten() for g in gradients])
    slow = torch.cosine_similarity(steps, flat, 0)
    assert gradient.cosine(layers["every layer"])[i] == pytest.approx(float(slow), abs=1e-9)

    bias = residual(tiny, q, think[:i + 1]) - residual(tiny, q, think[:i])
    slow = torch.cosine_similarity(bias, -gradients[-1][:, 0], 0)
    assert gradient.cosine(layers["last bias"])[i] == pytest.approx(float(slow), abs=1e-9)

def matrices(patches):
    return {name: torch.outer(p[0, 0], z[0, 0] / z[0, 0].square().sum())
            for name, (p, z) in patches.items()}

def residual(model, q, think):
    """What leaves the last block at </think> (C,)."""
    left = []
    watch = model.blocks[-1].register_forward_hook(lambda block, x, y: left.append(y[0, -1]))
    analyze.direct_logp(model, [q], thinks=[think])
    watch.remove()
    return left[0]


def test_the_results_page_is_what_its_generator_makes_of_the_json():
    assert (ROOT / "assets/README.md").read_text() == page.page(ROOT / "assets")

def test_figures_have_settings_of_their_own(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://a_notebooks")
    rcParams.update({"text.usetex": True, "savefig.dpi": 7})
    importlib.reload(figure)
    found = rcParams["text.usetex"], rcParams["savefig.dpi"], os.environ.get("MPLBACKEND")
    assert found == (False, 150, None)

def test_every_link_of_the_readme_leads_somewhere():
    readme, results = (ROOT / "README.md").read_text(), (ROOT / "assets/README.md").read_text()
    for name in re.findall(r"assets/README\.md#([\w-]+)", readme):
        assert f"\n## {name}\n" in results
    for path in re.findall(r"\(((?:assets|experiments)/[\w./-]+)\)", readme):
        assert (ROOT / path).exists()

def test_damaged_results_are_left_out_and_it_is_said(tmp_path, capsys):
    good = page.read(ROOT / "assets" / "patch.json")
    for name, change in (("patch", {}), ("nan", {"gaps": [{"x": [float("nan")] * 3}]}),
                         ("null", {"config": None})):
        write(tmp_path / "figures" / f"{name}.json", json.dumps(good | change))
    experiments.redraw(Analyze(out=str(tmp_path)))
    out, err = capsys.readouterr()
    assert re.findall(r"(\w+).json is left out", err) == ["nan", "null"] and "NaN" in err
    assert re.findall(r"(\w+).png", out) == ["patch"]

def test_a_checksum_is_of_what_was_loaded(base, tmp_path, monkeypatch):
    """Beside a training that writes its next checkpoint meanwhile."""
    path, real = tmp_path / "ckpt.pt", train.load_model
    path.write_bytes((base / "ckpt.pt").read_bytes())

    def load_model(*args):
        found = real(*args)
        path.write_bytes(b"the next one")
        return found
    monkeypatch.setattr(train, "load_model", load_model)
    runs = Runs(Analyze(sft=str(tmp_path)), torch.device("cpu"), {})
    assert runs.checkpoints == {} and checksum(runs.sft()) == runs.checkpoints[str(tmp_path)]
