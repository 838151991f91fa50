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
        longer, shorter = text.prompt("1+2+3+4+5"), [text.END_THINK, *text.encode("7"), text.EOS]    # beside it: padding in every section
        found, full, patched, plain, valid = analyze.exact_patches(model, [head, longer, head], [text.encode(t), text.encode("1+2=3;3+3=6"), text.encode(t)],
                                                                   [tail, shorter, tail], [len(t), 5, 1])
        assert valid.tolist() == [[True] * 3, [True, True, False], [True] * 3]
        assert (full[0] - plain[0]).abs().max() > 1e-2
        torch.testing.assert_close(patched[valid], full[valid], rtol=0, atol=tolerance)
        assert set(found) == {f"{i}.{kind}" for i in range(3) for kind in ("up", "down")}
        ids = torch.tensor([head + text.encode(t) + tail[:-1]])
        torch.testing.assert_close(full[0], model.logits(model(ids))[0, -3:].detach(), rtol=0, atol=tolerance)
        ids = torch.tensor([head + text.encode(t[:1]) + tail[:-1]])         # one token of t seen, the tail's positions as behind all of it
        pos = torch.tensor([[*range(len(head) + 1), *range(len(head) + len(t), len(head) + len(t) + 3)]])
        torch.testing.assert_close(full[2], model.logits(model(ids, pos=pos))[0, -3:].detach(), rtol=0, atol=tolerance)


def test_cosines_equal_those_of_the_matrices_written_out(tiny):
    inner = meta.Inner(meta.fast_layers(tiny, "*.up,*.down"), 2, 0.1, 3.0).double()
    q, t = arithmetic.parse("(3+5)*2-7"), "3+5=8;8*2=16;16-7=9"
    got = analyze.cosines(tiny, inner, [(q, t, t)])
    support, _ = meta.tensors([meta.Task(q, [t])])
    theta = meta.theta_prime(tiny, inner, [(support.ids, support.inner)])
    found, *_ = analyze.exact_patches(tiny, [text.prompt(q.text)], [text.encode(t)], [analyze.tail_of(q)])
    for name in inner.names:
        block, kind = name.split(".")
        path = f"blocks.{block}.{kind}.weight"
        a, (p, z) = (theta[path] - tiny.get_parameter(path)).flatten(), (v[0, 0] for v in found[name])
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


def test_increments_equal_those_of_the_matrices_written_out(tiny):
    """One question, patches as matrices of every position's own, autograd at the patched weights."""
    q, t, i = arithmetic.parse("(3+5)*2-7"), "3+5=8;8*2=16;16-7=9", 7
    got = analyze.increments(tiny, [q], [t], [i])
    ids = analyze.as_ids([q], [t])
    now, then = (analyze.exact_patches(tiny, *ids, [j], bias=True)[0] for j in (i, i + 1))
    matrix = lambda f, name: f[name][0][0, :, :, None] * f[name][1][0, :, None, :] / f[name][1][0].square().sum(-1)[:, None, None]
    own = {name: matrix(now, name).requires_grad_() for name in now}        # (n, out, in)
    rows, pos, n, _, mask = analyze.layout(tiny, *ids)
    def hook(name, x, y):
        if name not in own:
            return y
        z = x[:, -n:] if own[name].size(-1) > 1 else torch.ones(1, n, 1, dtype=x.dtype)
        return torch.cat((y[:, :-n], y[:, -n:] + torch.einsum("bti,toi->bto", z, own[name])), 1)
    h = tiny(rows, pos=pos, mask=mask(torch.zeros(1, dtype=torch.long)), hook=hook)[:, -n:]
    grads = torch.autograd.grad(tiny.score(h, torch.tensor([ids[2][0][1:]])).sum(), list(own.values()))
    steps = [(matrix(then, name) - matrix(now, name)).detach() for name in own]
    for name, g, d in zip(own, grads, steps):
        assert got[name] == pytest.approx(float(torch.cosine_similarity(-g.flatten(), d.flatten(), 0)), abs=1e-8)
    flat = lambda v: torch.cat([x.flatten() for x in v])
    assert got["all"] == pytest.approx(float(torch.cosine_similarity(-flat(grads), flat(steps), 0)), abs=1e-8)


def test_a_point_of_the_landscape_is_the_loss_of_the_moved_weights(tiny):
    qs, plane = [arithmetic.parse("(3+5)*2-7")] * 3, analyze.directions(tiny, 0)
    ids, targets = analyze.queries(tiny, qs, ["3+5=8", "3+5=8", "3+5=8"])
    points = torch.tensor([[0.0, 0.0], [0.3, -0.2], [-0.5, 0.5]], dtype=torch.float64)
    for d in plane:
        for m in tiny.modules():
            if isinstance(m, analyze.meta.Linear):
                torch.testing.assert_close(d[m.name].norm(dim=1), m.weight.detach().norm(dim=1))
    got, layers = analyze.surface(tiny, ids, targets, plane, points, size=2), {m.name: f"{path}.weight" for path, m in tiny.named_modules() if isinstance(m, analyze.meta.Linear)}
    for (a, b), v in zip(points, got):
        moved = {path: tiny.get_parameter(path) + a * plane[0][name] + b * plane[1][name] for name, path in layers.items()}
        h = torch.func.functional_call(tiny, moved, (ids[:1],))
        assert float(v) == pytest.approx(float(tiny.score(h, targets[:1]).sum().detach() / (targets[:1] >= 0).sum()), abs=1e-10)


def test_principal_directions_hold_a_plane_path_whole():
    g = torch.Generator().manual_seed(0)
    basis, xy = torch.linalg.qr(torch.randn(50, 2, generator=g, dtype=torch.float64))[0].T, torch.randn(7, 2, generator=g, dtype=torch.float64)
    d, at, held = analyze.principal(xy @ basis)
    torch.testing.assert_close(d @ d.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(at @ d, xy @ basis, rtol=0, atol=1e-7)
    assert held == pytest.approx(1)


def test_proposition_2_1_fails_as_printed_and_holds_repaired():
    e = analyze.proposition(n=50)
    assert np.median(e["printed"]) > 0.5 and np.median(e["direction mended"]) > 0.5 and max(e["rank-1 repair"]) < 1e-9


def test_every_token_has_a_kind():
    t = "3+5=9W3+5=8;8*2=16"
    assert list(zip(t, analyze.classes(t))) == [*zip("3+5=9", ("operand", "operator", "operand", "operator", "slip")), *(zip("W3+5=8", ["W"] * 6)), (";", "end"),
                                                *zip("8*2=16", ("operand", "operator", "operand", "operator", "result", "result"))]


rng = np.random.default_rng(0)
near = lambda centre, *shape: centre + 0.1 * rng.normal(size=shape or (200,))
KINDS = [["W", "x"]] * 50 + [["x", "x"]] * 49
CRITERIA = {                                                                # experiment: its margins on made-up measurements, for and against
    "patch": (analyze.patch_margins, [{"float32": 1e-6 + 0 * near(0), "float64": 1e-14 + 0 * near(0), "unpatched": near(9), "other": near(9)}],
              [{"float32": abs(near(1)), "float64": abs(near(1)), "unpatched": near(9), "other": near(9)}]),
    "gradient, aligned": (lambda cos: analyze.gradient_margins(cos)[0], [{"trained": near(0.3), "shuffled": near(0), "untrained": near(0.1)}],
                          [{"trained": near(0.3), "shuffled": near(0), "untrained": near(0.5)}]),
    "gradient, a step": (lambda cos: analyze.gradient_margins(cos)[1], [{"trained": near(0.9)}], [{"trained": near(0.1)}]),
    "curve, direction": (lambda *a: analyze.curve_margins(*a)[0], [{"correct": near(2), "wrong": near(-1), "filler": near(0)}, near(-1), near(0)],
                         [{"correct": near(2), "wrong": near(-1), "filler": near(3)}, near(-1), near(0)]),
    "curve, progressive": (lambda *a: analyze.curve_margins(*a)[1], [{"correct": near(2)}, near(-0.8), near(0.2)], [{"correct": near(2)}, near(-0.8), near(0.9)]),
    "landscape": (analyze.landscape_margins, [{"without": (near(2), near(3)), "context": (near(0), near(1)), "other": (near(5), near(5))}],
                  [{"without": (near(2), near(3)), "context": (near(0), near(4)), "other": (near(5), near(5))}]),
    "tokens": (lambda *a: {"W": analyze.token_margins(*a, "W")}, *([[np.cumsum([5, fall if k[0] == "W" else -1, -1]) + near(0, 3) for k in KINDS], KINDS] for fall in (-2, 1))),
    "delimiter": (analyze.delimiter_margins, [near(1), near(2), near(0.2), near(0.9)], [near(2), near(1), near(0.2), near(0.9)]),
    "prune": (analyze.prune_margins, [{"oracle short": near(0.9), "own": near(0.9), "least change": near(0.8), "random": near(0.4), "least change, cut": near(0.5), "random, cut": near(0.2)}],
              [{"oracle short": near(0.9), "own": near(0.9), "least change": near(0.8), "random": near(0.4), "least change, cut": near(0.2), "random, cut": near(0.5)}]),
    "arms over seeds": (lambda a, b: {"gap": a - b}, [near(0.8, 5, 100), near(0.5, 5, 100)], [near(0.5, 5, 100), near(0.8, 5, 100)])}

@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_can_go_either_way(name):
    margins, good, bad = CRITERIA[name]
    assert analyze.decide(margins(*good))[0] == "supported" and analyze.decide(margins(*bad))[0] == "refuted"

def test_a_margin_around_zero_is_inconclusive():
    assert analyze.decide({"gap": np.tile([1.0, -1.0], 100)})[0] == "inconclusive"
    assert analyze.decide({"gap": np.concatenate((np.full(120, 1.0), np.full(80, -9.0)))}, {"gap": np.median})[0] == "supported"

def test_a_cliff_and_a_slope_are_told_apart():
    assert analyze.cliff(np.array([1.0] * 30 + [0.0] * 10)) == pytest.approx(1)
    assert analyze.cliff(np.linspace(1, 0, 41)) == pytest.approx(0.05) and analyze.cliff(np.linspace(0, 1, 41)) is None
