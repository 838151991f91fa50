"""The trajectory as weights: `patch`, `gradient`. Criteria on made-up data, both ways;
constructions against slow ones; figures from JSON alone."""
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
from data import arithmetic, text
from experiments import Analyze, gradient, patch
from model import Config, Model

RNG = np.random.default_rng(0)
QUESTIONS = [arithmetic.parse(q) for q in ("((3+5)*2)-7", "2+3+4")]
THINKS = ["(8*2)-7;6-7;9", "5+4;9"]


def near(centre, *shape):
    return centre + 0.1 * RNG.normal(size=shape or (100,))

def fresh(**shape):
    torch.manual_seed(0)
    return analyze.untrained(Model(Config(text.VOCAB, heads=2, **shape)))


@pytest.mark.parametrize("name", (patch, gradient))
def test_an_experiment_runs_and_its_figure_needs_the_json_alone(name):
    runs = SimpleNamespace(sft=lambda: fresh(layers=2, width=32))
    verdicts, numbers = name.judge(name.measure(Analyze(questions=20, cells="expr:3"), runs))
    assert set(verdicts.values()) <= {"supported", "refuted", "inconclusive", "not testable here"}
    picture = io.BytesIO()
    name.draw(json.loads(json.dumps(numbers))).savefig(picture)
    assert len(picture.getvalue()) > 10_000
    if name is patch:                       # a theorem: no training is needed
        assert list(verdicts.values()) == ["supported", "refuted", "supported"]


# ----------------------------------------------------------------------------------------- patch

def test_patch_can_go_either_way():
    level = {"no patch": 9, "another question's patch": 9, "float32": 1e-6, "float64": 1e-14,
             "float64, one theta' per row": 1e-13}
    layers = {"as printed": 1, "rank-1 repair": 1e-15}

    def verdicts(**other):
        errors = {name: np.full(100, x) for name, x in (level | other).items()}
        mended = {name: np.full(100, x) for name, x in layers.items()}
        return list(patch.judge(patch.Raw("", errors, mended))[0].values())
    assert verdicts() == ["supported", "refuted", "supported"]
    for name, x in (("float32", 1e-3), ("float64", 1e-9), ("float64, one theta' per row", 1e-9),
                    ("no patch", 1e-5), ("another question's patch", 1e-5)):
        assert verdicts(**{name: x})[0] == "refuted"
    layers = {"as printed": 1e-15, "rank-1 repair": 1}
    assert verdicts() == ["supported", "supported", "refuted"]

def test_proposition_2_1_fails_as_printed_and_holds_repaired():
    errors = patch.proposition(n=50)
    assert np.median(errors["as printed"]) > 0.5
    assert min(errors["P the other way round"]) > 1e-4
    assert max(errors["rank-1 repair"]) < 1e-12

@pytest.mark.parametrize("size", (1, 0))                # 0: hidden units never fire
def test_one_theta_prime_does_for_the_whole_row_what_the_trajectory_does(size):
    model = fresh(layers=2, width=64).double()
    model.blocks[0].up.weight.data *= size
    found = analyze.exact_patches(model, QUESTIONS, THINKS)
    logits = patch.one_theta_prime(model, QUESTIONS, THINKS)
    assert patch.largest(found.plain, found.full).min() > 1e-2
    assert patch.largest(logits, found.full).max() < 1e-11


# -------------------------------------------------------------------------------------- gradient

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
