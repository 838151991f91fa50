"""The instruments of the figures against slow forms, and the statistics of a verdict."""
import itertools
import random

import numpy as np
import pytest
import torch

import analyze
import meta
from data import arithmetic, text
from data.tasks import Task, tensors
from lab import flags, verdict

Q, THINK = arithmetic.parse("(3+5)*2-7"), "3+5=8;8*2=16;16-7=9"


def inner_of(model, fast="*.up,*.down", K=1):
    """An Inner whose rates differ, so that a mix-up of layers or steps shows."""
    inner = meta.Inner(meta.fast_layers(model, fast), K, alpha=0.1, tau=3.0).double()
    with torch.no_grad():
        steps = torch.arange(inner.log_alpha.numel()).view_as(inner.log_alpha)
        inner.log_alpha += 0.2 * torch.sin(5.0 * steps)
    return inner

def mean_loss(model, h, targets):
    """L_q of one row, from hidden states."""
    return float(model.score(h, targets).sum().detach() / (targets >= 0).sum())


# ------------------------------------------------------------------------- L_hat, L_q(theta'_i)

def prefix_by_prefix(model, head, t, tail):
    """L_hat of one sequence, a forward pass for every prefix."""
    losses = []
    for i in range(len(t) + 1):
        row = torch.tensor([head + t[:i] + tail])
        nll = model.nll(row[:, :-1], row[:, 1:])[0].detach()
        losses.append(float(nll[-len(tail) + 1:].mean()))
    return losses

def random_ids(rng, n):
    return [rng.randrange(20) for _ in range(n)]

@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("width", (3, 32))
def test_one_pass_curve_equals_prefix_by_prefix(tiny, width, dtype, tolerance):
    """Sequences of different lengths side by side, all branches at once and a few at a time."""
    rng, model = random.Random(0), tiny.to(dtype)
    heads = [random_ids(rng, n) for n in (3, 9, 5)]
    trajectories = [random_ids(rng, n) for n in (17, 6, 11)]
    tails = [[text.END_THINK, *random_ids(rng, n), text.EOS] for n in (1, 3, 2)]
    curves = analyze.prefix_nll(model, heads, trajectories, tails, width)
    for curve, *sequence in zip(curves, heads, trajectories, tails):
        slow = prefix_by_prefix(model, *sequence)
        np.testing.assert_allclose(curve, slow, rtol=0, atol=tolerance)


def test_curves_of_texts_are_those_of_their_ids_and_follow_the_answer_asked_for(tiny):
    questions, thinks = [Q, arithmetic.parse("9-4"), Q], [THINK, "9-4=5", "3+5=8"]
    sequences = analyze.as_ids(questions, thinks)
    expected = analyze.prefix_nll(tiny, *sequences)
    for curve, slow in zip(analyze.curves_of(tiny, questions, thinks, size=2), expected):
        np.testing.assert_allclose(curve, slow, rtol=0, atol=1e-12)
    heads, trajectories, _ = sequences
    tails = [analyze.tail_of(q, "7") for q in questions]
    expected = analyze.prefix_nll(tiny, heads, trajectories, tails)
    curves = analyze.curves_of(tiny, questions, thinks, ["7"] * 3)
    for curve, slow in zip(curves, expected):
        np.testing.assert_allclose(curve, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ("whole", "step", "token"))
def test_explicit_curves_are_those_of_each_prefix_alone(tiny, mode):
    inner = inner_of(tiny, "*.up")
    questions = [arithmetic.parse("(3+5)*2"), arithmetic.parse("9-4")]
    thinks = ["3+5=8;8*2=16", "9-4=5"]
    curves = analyze.explicit_curves(tiny, inner, questions, thinks, mode, size=5)
    for q, t, curve in zip(questions, thinks, curves):
        assert len(curve) == len(t) + 1
        for i, value in enumerate(curve):
            support, query = tensors([Task(q, [t[:i] or "="])])
            fast, steps = None, meta.by_step(support) if mode == "step" else None
            if i:
                pairs = [(support.ids, support.inner)]
                fast, _ = meta.adapt(tiny, inner, pairs, 1, steps, order=1, local=mode == "token")
            alone = mean_loss(tiny, tiny(query.ids, hook=fast), query.targets)
            assert value == pytest.approx(alone, abs=1e-10)


# -------------------------------------------------------------- exact patches (Proposition 2.1)

def patches_of(model, t, bias):
    """Three rows with padding in every section: all of t seen, five tokens of another trajectory
    and a shorter tail, and one token of t. -> (Patched, its Layout)"""
    head, tail = text.prompt(Q.text), [text.END_THINK, *text.encode("12"), text.EOS]
    longer, shorter = text.prompt("1+2+3+4+5"), [text.END_THINK, *text.encode("7"), text.EOS]
    rows = ([head, longer, head],
            [text.encode(t), text.encode("1+2=3;3+3=6"), text.encode(t)],
            [tail, shorter, tail])
    found = analyze.exact_patches(model, *rows, seen=[len(t), 5, 1], bias=bias)
    return found, analyze.layout(model, *rows)

@pytest.fixture(params=itertools.product((torch.float64, torch.float32), (False, True)))
def patchable(request, tiny):
    """A model, as it is or with a block whose hidden units never fire, and its rounding."""
    dtype, silent = request.param
    if silent:
        with torch.no_grad():
            tiny.blocks[1].up.weight.zero_()
    return tiny.to(dtype), 1e-12 if dtype == torch.float64 else 1e-4

@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("t", [THINK, "3+5=", "."])
def test_patched_weights_without_the_trajectory_give_the_logits_with_it(patchable, t, bias):
    """To rounding; and the patches do so again as a hook of their own."""
    model, tolerance = patchable
    found, rows = patches_of(model, t, bias)
    assert found.valid.tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert (found.full[0] - found.plain[0]).abs().max() > 1e-2
    assert set(found.patches) == {"0.up", "0.down", "1.up", "1.down", "2.up", "2.down"}
    assert found.patches["0.down"][1].size(-1) == (1 if bias else 4 * 16)
    hook = analyze.patch_hook(found.patches, rows.n)
    h = model(rows.ids, rows.pos, rows.mask(rows.nothing()), hook=hook)
    again = model.logits(h[:, -rows.n:]).detach()
    for patched in (found.patched, again):
        difference = (patched - found.full)[found.valid]
        assert difference.abs().max() <= tolerance


def logits_of(model, ids, pos):
    """Of the last three tokens of a row."""
    return model.logits(model(torch.tensor([ids]), torch.tensor([pos])))[0, -3:].detach()

@pytest.mark.parametrize("t", [THINK, "3+5=", "."])
def test_what_patches_are_held_to_are_the_models_own_logits(patchable, t):
    """Behind all of t, behind one token of it and behind none, the tail's positions always as
    behind all of it."""
    model, tolerance = patchable
    found, _ = patches_of(model, t, bias=False)
    head, tail = text.prompt(Q.text), [text.END_THINK, *text.encode("12")]
    end = len(head) + len(t)
    for got, n in ((found.full[0], len(t)), (found.full[2], 1), (found.plain[0], 0)):
        ids = [*head, *text.encode(t[:n]), *tail]
        pos = [*range(len(head) + n), *range(end, end + 3)]
        own = logits_of(model, ids, pos)
        torch.testing.assert_close(got, own, rtol=0, atol=tolerance)


def test_cosines_equal_those_of_the_matrices_written_out(tiny):
    inner = inner_of(tiny, K=2)
    got = analyze.cosines(tiny, inner, [(Q, THINK, THINK)])
    support, _ = tensors([Task(Q, [THINK])])
    moved = meta.theta_prime(tiny, inner, [(support.ids, support.inner)])
    found = analyze.exact_patches(tiny, *analyze.as_ids([Q], [THINK]))
    assert set(got) == set(inner.names)
    for name in inner.names:
        path = meta.linear_layers(tiny)[name]
        explicit = moved[path] - tiny.get_parameter(path)
        p, z = found.patches[name]
        implicit = torch.outer(p[0, 0], z[0, 0])
        cosine = torch.cosine_similarity(explicit.flatten(), implicit.flatten(), 0)
        assert got[name] == [pytest.approx(float(cosine.detach()), abs=1e-8)]


# -------------------------------------------------------------- planes through theta (Algorithm 4)

POINTS = torch.tensor([[0.0, 0.0], [0.3, -0.2], [-0.5, 0.5]], dtype=torch.float64)

def three_rows(model):
    return analyze.queries(model, [Q] * 3, ["3+5=8"] * 3)

def moved_loss(model, weights, plane, point, ids, targets):
    """L_q with `weights` moved to a point of a plane, every weight written out."""
    a, b = point
    moved = {}
    for name, path in meta.linear_layers(model).items():
        weight = weights.get(path, model.get_parameter(path))
        moved[path] = weight + a * plane[0][name] + b * plane[1][name]
    return mean_loss(model, torch.func.functional_call(model, moved, (ids[:1],)), targets[:1])

def test_directions_have_the_norms_of_the_weights_rows(tiny):
    """Per filter (1712.09913); two of them, the same for the same seed."""
    plane, again = analyze.directions(tiny, 0), analyze.directions(tiny, 0)
    for name, path in meta.linear_layers(tiny).items():
        rows = tiny.get_parameter(path).detach().norm(dim=1)
        for d, e in zip(plane, again):
            torch.testing.assert_close(d[name].norm(dim=1), rows)
            assert torch.equal(d[name], e[name])
        assert not torch.equal(plane[0][name], plane[1][name])


def test_a_point_of_the_landscape_is_the_loss_of_the_moved_weights(tiny):
    plane, (ids, targets) = analyze.directions(tiny, 0), three_rows(tiny)
    losses = analyze.surface(tiny, ids, targets, plane, POINTS, size=2)
    for point, loss in zip(POINTS, losses):
        expected = moved_loss(tiny, {}, plane, point, ids, targets)
        assert float(loss) == pytest.approx(expected, abs=1e-10)
    assert len({round(float(loss), 6) for loss in losses}) == 3


def test_a_landscape_around_theta_prime_is_that_of_its_weights(tiny):
    plane, (ids, targets) = analyze.directions(tiny, 0), three_rows(tiny)
    inner, task = inner_of(tiny), Task(Q, [THINK])
    fast, _ = meta.adapted(tiny, inner, [task])
    losses = analyze.surface(tiny, ids, targets, plane, POINTS, fast, size=2)
    support, _ = tensors([task])
    weights = meta.theta_prime(tiny, inner, [(support.ids, support.inner)])
    for point, loss in zip(POINTS, losses):
        expected = moved_loss(tiny, weights, plane, point, ids, targets)
        assert float(loss) == pytest.approx(expected, abs=1e-10)


def test_a_landscape_of_weights_of_every_positions_own(tiny):
    """The same matrices at all positions are the matrices."""
    plane, (ids, targets) = analyze.directions(tiny, 0), three_rows(tiny)
    whole, T = analyze.surface(tiny, ids, targets, plane, POINTS), ids.size(1)
    each = [{name: d.expand(T, *d.shape) for name, d in part.items()} for part in plane]
    again = analyze.surface(tiny, ids, targets, each, POINTS)
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", (False, True))
def test_a_patch_as_a_direction_of_the_landscape_is_the_patch_at_distance_1(tiny, bias):
    """There the loss without the trajectory is that with it."""
    heads, ts, tails = analyze.as_ids([Q], [THINK])
    found = analyze.exact_patches(tiny, heads, ts, tails, bias=bias)
    rows, direction = analyze.layout(tiny, heads, ts, tails), {}
    for name, (p, z) in found.patches.items():
        zz = z[0].square().sum(-1)[:, None, None]
        direction[name] = p[0, :, :, None] * z[0, :, None, :] / zz          # (n, out, in)
    answer = torch.tensor(tails[0][1:])
    targets = torch.full_like(rows.ids, text.IGNORE)
    targets[0, -rows.n:] = answer
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    mask = rows.mask(rows.nothing())
    losses = analyze.surface(
        tiny, rows.ids.expand(3, -1), targets.expand(3, -1), (direction, {}), points,
        pos=rows.pos.expand(3, -1), mask=mask.expand(3, -1, -1, -1))
    full, plain = loss_of(found.full[0], answer), loss_of(found.plain[0], answer)
    assert losses.tolist() == pytest.approx([plain, full, plain], abs=1e-10)
    assert abs(full - plain) > 1e-4

def loss_of(logits, answer):
    return float(torch.nn.functional.cross_entropy(logits, answer))


def test_principal_directions_hold_a_plane_path_whole():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    path = torch.randn(7, 2, generator=generator, dtype=torch.float64) @ torch.linalg.qr(basis)[0].T
    path[0] = 0
    d, at, held = analyze.principal(path)
    torch.testing.assert_close(d @ d.T, torch.eye(2).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(at @ d, path, rtol=0, atol=1e-7)
    assert held == pytest.approx(1)


def test_principal_directions_hold_the_largest_share_of_any_path():
    """Against the singular values of the path itself."""
    generator = torch.Generator().manual_seed(1)
    path = torch.randn(7, 50, generator=generator, dtype=torch.float64)
    squares = torch.linalg.svdvals(path).square()
    assert analyze.principal(path)[2] == pytest.approx(float(squares[:2].sum() / squares.sum()))


# ------------------------------------------------------------------------------ questions, controls

def test_an_untrained_model_has_the_shape_and_no_weights_that_are_zero(tiny):
    """Its random weights come from the seed alone."""
    new, same, other = (analyze.untrained(tiny, seed) for seed in (1, 1, 2))
    assert new.config == tiny.config
    for name, p in new.named_parameters():
        assert p.abs().min() > 0
        assert torch.equal(p, same.get_parameter(name))
        assert not torch.equal(p, other.get_parameter(name))


def test_another_questions_trajectory_has_another_answer():
    questions = [arithmetic.parse(s) for s in ("1+2+3", "2+1+3", "4+5", "9-4")]
    thinks = ["a", "b", "c", "d"]
    answers = dict(zip(thinks, (q.answer for q in questions)))
    for seed in range(20):
        others = analyze.others_of(questions, thinks, random.Random(seed))
        for q, other in zip(questions, others):
            assert answers[other] != q.answer


def test_cells_are_domains_with_operand_counts(exits):
    assert analyze.cells_of("expr:3,4 sum:5") == [("expr", 3), ("expr", 4), ("sum", 5)]
    for bad in ("expr:9", "expr", "nothing:3", "expr:4,", "expr:x", " "):
        exits(["--cells"], analyze.cells_of, bad)
    c = analyze.Analyze(questions=1)
    exits(["different answers"], analyze.questions_of, c, "expr", 4)


@pytest.mark.parametrize("args,word", [
    (["nope"], "nope"), (["curve", "curve"], "twice"), (["curve", "--grid=4"], "even"),
    (["curve", "--cells=expr:9"], "expr:9"), (["compare"], "two arms"),
    (["compare", "--arm=--steps=3"], "two arms"),
    (["curve", "--arm=--steps=3", "--arm=--steps=4"], "--arm")])
def test_what_no_experiment_can_use_is_refused(args, word, exits):
    known = {"curve": "", "compare": ""}
    c, _ = flags.flags(analyze.Analyze, args)
    exits([word], analyze.check_flags, c, known)
    c, _ = flags.flags(analyze.Analyze, ["curve"])
    analyze.check_flags(c, known)


# ---------------------------------------------------------------------------------------- verdicts

def near(rng, centre, *shape):
    return centre + 0.1 * rng.normal(size=shape)

def test_spearman_is_the_rank_correlation_with_position():
    assert verdict.spearman([5, 4, 3, 1]) == pytest.approx(-1)
    assert verdict.spearman([1, 2, 9]) == pytest.approx(1)
    assert verdict.spearman([2, 2]) == 0
    assert verdict.spearman([1, 3, 2, 4]) == pytest.approx(0.8)
    assert verdict.spearman([1, 1, 2, 3]) == pytest.approx(0.9 ** 0.5)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        _, low, high = verdict.bootstrap(rng.normal(1, 1, 50), draws=300)
        covered += low <= 1 <= high
    assert 0.88 < covered / 200 < 0.99


def test_an_interval_is_an_estimate_between_its_bounds_and_follows_its_statistic():
    values = np.concatenate((np.full(120, 1.0), np.full(80, -9.0)))
    mean, low, high = verdict.interval(values)
    assert mean == -3 and low < mean < high
    assert verdict.interval(values, np.median) == [1, 1, 1]
    assert verdict.interval([]) is None


def test_a_share_keeps_its_distance_from_certainty():
    """Wilson's interval: 200 right of 200, and 1 of 10 (Brown, Cai, DasGupta 2001)."""
    assert verdict.interval([True] * 200) == [1, pytest.approx(0.9812, abs=1e-4), 1]
    one_of_ten = verdict.interval([True] + [False] * 9)
    assert one_of_ten == pytest.approx([0.1, 0.0179, 0.4042], abs=1e-4)
    assert verdict.crossed(np.ones((5, 200)), share=True) == verdict.interval([True] * 200)


def test_students_quantiles_are_those_of_the_tables():
    found = [verdict.t_quantile(0.975, df) for df in (1, 2, 4, 10, 100)]
    assert found == pytest.approx([12.706, 4.303, 2.776, 2.228, 1.984], rel=1e-3)


@pytest.mark.parametrize("of_seeds", (0, 0.12))
@pytest.mark.parametrize("of_questions", (0, 0.3))
def test_intervals_over_seeds_and_questions_cover_the_truth(of_seeds, of_questions):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        seeds, questions = rng.normal(size=(5, 1)), rng.normal(size=(1, 100))
        values = of_seeds * seeds + of_questions * questions + 0.3 * rng.normal(size=(5, 100))
        _, low, high = verdict.crossed(values)
        covered += low <= 0 <= high
    assert 0.91 < covered / 300 < 0.995


def test_margins_without_any_truth_in_them_seldom_refute():
    """Four margins of zero mean: each alone lies below 0 in 2.5 % of the cases."""
    rng = np.random.default_rng(0)
    found = [verdict.decide({i: rng.normal(size=(5, 40)) for i in range(4)})[0] for _ in range(200)]
    assert found.count("refuted") <= 10 and found.count("supported") <= 3


def test_margins_decide_either_way():
    """One margin below 0 refutes, whatever the others say."""
    rng = np.random.default_rng(0)
    above, below = near(rng, 0.3, 200), near(rng, -0.2, 200)
    assert verdict.decide({"gap": above})[0] == "supported"
    assert verdict.decide({"gap": below})[0] == "refuted"
    assert verdict.decide({"gap": above, "other": below})[0] == "refuted"
    around = np.tile([1.0, -1.0], 100)
    assert verdict.decide({"gap": around})[0] == "inconclusive"
    assert verdict.decide({"gap": above, "other": around})[0] == "inconclusive"
    mixed = np.concatenate((np.full(120, 1.0), np.full(80, -9.0)))
    assert verdict.decide({"gap": mixed}, np.median)[0] == "supported"
    assert verdict.decide({"gap": mixed})[0] == "refuted"


def test_margins_over_seeds_resample_seeds_as_well_as_questions():
    rng = np.random.default_rng(0)
    better, worse = near(rng, 0.8, 5, 100), near(rng, 0.5, 5, 100)
    assert verdict.decide({"gap": better - worse})[0] == "supported"
    assert verdict.decide({"gap": worse - better})[0] == "refuted"
    seeds = np.array([3.0, 1.0, -1.0])[:, None]             # the seed matters more than the arm
    gap = seeds + near(rng, 0, 3, 100)
    assert verdict.decide({"gap": gap.flatten()})[0] == "supported"
    assert verdict.decide({"gap": gap})[0] == "inconclusive"


def test_a_claim_on_several_domains_is_as_good_as_its_worst():
    assert verdict.worst(["supported", "inconclusive", "supported"]) == "inconclusive"
    assert verdict.worst(["refuted", "inconclusive", "supported"]) == "refuted"
    assert verdict.worst(["supported"]) == "supported"


def test_a_cliff_and_a_slope_are_told_apart():
    assert verdict.cliff(np.array([1.0, 1.0, 1.0, 0.0])) == pytest.approx(1)
    assert verdict.cliff(np.array([1.0, 0.5, 0.25, 0.0])) == pytest.approx(0.5)
    assert verdict.cliff(np.linspace(1, 0, 4)) == pytest.approx(1 / 3)
    assert verdict.cliff(np.array([1.0, 1.5, 1.5, 0.0])) == pytest.approx(1.5)
    assert verdict.cliff(np.linspace(1, 0.95, 4)) == verdict.cliff(np.linspace(0, 1, 4)) == 1


def test_curves_of_any_length_meet_on_fractions_of_a_trajectory():
    lines = [np.linspace(2, 1, n) for n in (2, 7, 60)]
    expected = 2 - verdict.FRACTION
    np.testing.assert_allclose(verdict.on_fractions(lines), np.tile(expected, (3, 1)))
    band = verdict.banded([line + shift for line, shift in zip(lines, (-0.3, 0, 0.3))])
    np.testing.assert_allclose(band["mean"], expected, atol=1e-4)
    assert max(band["low"]) < 2 and (np.array(band["low"]) < np.array(band["high"])).all()
