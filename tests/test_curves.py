"""`curve` and `explicit` decide on made-up data, either way, and draw from JSON alone."""
import io
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import meta
from data import arithmetic, text
from experiments import Analyze, curve, descent, explicit, step
from experiments.arms import Arm
from model import Config, Model

N = 100


def noisy(rng, *levels):
    """Curves of N questions around these levels."""
    return np.array(levels) + 0.05 * rng.standard_normal((N, len(levels)))

def drawn(module, numbers):
    picture = io.BytesIO()
    module.draw(json.loads(json.dumps(numbers))).savefig(picture)
    assert len(picture.getvalue()) > 10_000

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
    return curve.Raw("made up", states | {"correct": correct}, {"right": fall, "wrong": -fall},
                     predicted, law, says, fall, example)

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
    rows = {}
    for kind in explicit.LABELS:
        known = knows if kind != "other" else False
        rows[kind] = {"theta": np.zeros(N, bool), "theta_prime": np.full(N, known),
                      "in_context": np.ones(N, bool)}
    for kind in ("fact", "unrelated"):
        rows[kind]["theta"] = np.full(N, True)
    context = 2 * rng.random((N, 6))
    again = context + 0.01 * rng.standard_normal((N, 6))
    weights = again if alike else rng.permutation(context)
    curves = {"context": context, "reordered": again, "weights": weights, "other": context}
    curves["predicted"] = context[:, :-1]
    lines = {"commonest": 0.2, "shallow": 0.22}
    return explicit.Raw({6: rows, 7: rows}, {6: lines, 7: lines}, curves)

@pytest.mark.parametrize("holds, verdict", [(True, "supported"), (False, "refuted")])
def test_explicit_can_go_either_way(holds, verdict):
    raw = an_explicit(np.random.default_rng(0), holds, holds)
    verdicts, numbers = explicit.judge(raw)
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
    losses = np.array([[2, 1.1], [2, 1], [2, 0.9]]) if falls else np.array([[1, 2], [1, 2.1]])
    losses = np.resize(losses, (3, 2))
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
