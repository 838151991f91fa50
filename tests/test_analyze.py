"""Theorems and small statistics behind the figures."""

import numpy as np
import pytest
import torch

import analyze
import meta
from data import arithmetic, text
from model import Model


@pytest.mark.parametrize("silent", (False, True))
@pytest.mark.parametrize("t", ["3+5=8;8*2=16;16-7=9", "3+5=", "."])
def test_patched_weights_without_the_trajectory_give_the_logits_with_it(tiny, t, silent):
    if silent:                                                              # a block whose hidden units never fire
        with torch.no_grad():
            tiny.blocks[1].up.weight.zero_()
    head, tail = text.prompt("((3+5)*2)-7"), [text.END_THINK, *text.encode("12"), text.EOS]
    for model, tolerance in ((tiny, 1e-12), (Model.load(tiny.state()), 1e-4)):
        found, full, patched, plain = analyze.exact_patches(model, head, text.encode(t), tail)
        assert (full - plain).abs().max() > 1e-2
        torch.testing.assert_close(patched, full, rtol=0, atol=tolerance)
        assert set(found) == {f"{i}.{kind}" for i in range(3) for kind in ("up", "down")}
        ids = torch.tensor([head + text.encode(t) + tail[:-1]])
        torch.testing.assert_close(full, model.logits(model(ids))[0, -3:].detach(), rtol=0, atol=tolerance)


def test_cosines_equal_those_of_the_matrices_written_out(tiny):
    inner = meta.Inner(meta.fast_layers(tiny, "*.up,*.down"), 2, 0.1, 3.0).double()
    q, t = arithmetic.parse("(3+5)*2-7"), "3+5=8;8*2=16;16-7=9"
    got = analyze.cosines(tiny, inner, [(q, t, t)])
    support, _ = meta.tensors([meta.Task(q, [t])])
    theta = meta.theta_prime(tiny, inner, [(support.ids, support.inner)])
    found, *_ = analyze.exact_patches(tiny, text.prompt(q.text), text.encode(t), [text.END_THINK, *text.encode(q.answer), text.EOS])
    for name in inner.names:
        block, kind = name.split(".")
        path = f"blocks.{block}.{kind}.weight"
        a, (p, z) = (theta[path] - tiny.get_parameter(path)).flatten(), (v[0] for v in found[name])
        b = torch.outer(p, z).flatten()
        assert got[name] == [pytest.approx(float(torch.cosine_similarity(a, b, 0).detach()), abs=1e-8)]


def test_explicit_curves_are_those_of_each_prefix_alone(tiny):
    inner = meta.Inner(meta.fast_layers(tiny, "*.up"), 1, 0.1, 3.0).double()
    qs, ts = [arithmetic.parse("(3+5)*2"), arithmetic.parse("9-4")], ["3+5=8;8*2=16", "9-4=5"]
    for q, t, curve in zip(qs, ts, analyze.explicit_curves(tiny, inner, qs, ts, size=5)):
        assert len(curve) == len(t) + 1
        for i, v in enumerate(curve):
            support, query = meta.tensors([meta.Task(q, [t[:i] or "="])])
            fast = meta.adapt(tiny, inner, [(support.ids, support.inner)], 1, order=1)[0] if i else None
            nll = tiny.nll(query.ids, query.targets, hook=fast).sum() / (query.targets >= 0).sum()
            assert v == pytest.approx(float(nll.detach()), abs=1e-10)


def test_spearman_and_bootstrap():
    assert analyze.spearman([5, 4, 3, 1]) == pytest.approx(-1) and analyze.spearman([1, 2, 9]) == pytest.approx(1) and analyze.spearman([2, 2]) == 0
    assert analyze.spearman([1, 3, 2, 4]) == pytest.approx(0.8)
    rng, covered = np.random.default_rng(0), 0
    for i in range(200):
        mean, low, high = analyze.bootstrap(rng.normal(1, 1, 50), n=300, seed=i)
        covered += low <= 1 <= high
    assert 0.88 < covered / 200 < 0.99


def test_curve_verdict_can_go_either_way(monkeypatch):
    """The criterion on made-up losses: falling for correct trajectories only, falling for all alike, rising."""
    made = {"supported": lambda kind, n: np.linspace(1, 0 if kind == "correct" else 1, n) + 1e-3 * np.arange(n) * (kind != "correct"),
            "inconclusive": lambda kind, n: np.linspace(1, 0, n), "refuted": lambda kind, n: np.linspace(0, 1 if kind == "correct" else 0, n)}
    for verdict, f in made.items():
        kinds = iter(("correct", "wrong", "other", "filler") * 3)
        monkeypatch.setattr(analyze, "curves_of", lambda model, qs, ts: (lambda kind: [f(kind, len(t) + 1) for t in ts])(next(kinds)))
        _, result = analyze.curve(analyze.Analyze(questions=40), None)
        assert result["verdict"] == verdict
    analyze.plt.close("all")
