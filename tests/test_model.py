"""Attention, cache, generation: fast paths against slow ones."""
import random

import pytest
import torch

from analyze import prefix_nll
from data import text
from model import Config, Model, attention, sample

pytestmark = pytest.mark.filterwarnings("ignore")
RAGGED = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 4], [3, 3, 3, 7, 1]]


def test_fused_attention_equals_the_formula_forward_and_gradient():
    torch.manual_seed(0)
    bias = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(torch.rand(2, 1, 7, 7).gt(0.6) & ~torch.eye(7, dtype=torch.bool), -torch.inf)
    for b in (None, bias):
        results = []
        for plain in (True, False):
            q, k, v = (torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
            y = attention(q, k, v, b, plain)
            results.append((y, *torch.autograd.grad(y.sin().sum(), (q, k, v))))
        for u, v in zip(*results):
            torch.testing.assert_close(u, v, rtol=0, atol=1e-12)


def test_padding_on_the_right_changes_nothing(tiny):
    x = torch.randint(0, 20, (1, 9))
    padded = torch.cat((x, torch.full((1, 4), text.PAD)), 1)
    torch.testing.assert_close(tiny(x), tiny(padded)[:, :9], rtol=0, atol=1e-12)


@pytest.mark.parametrize("static", (False, True))
def test_cached_generation_equals_uncached_for_ragged_prompts(tiny, static):
    for prompt, out in zip(RAGGED, tiny.generate(RAGGED, stop=text.EOS, max_new=24, static=static)):
        ids = list(prompt)
        for _ in range(24):
            new = int(tiny.logits(tiny(torch.tensor([ids]))[:, -1]).argmax())
            if new == text.EOS:
                break
            ids.append(new)
        assert ids[len(prompt):] == out


@pytest.mark.parametrize("gpt2", (False, True))
def test_cached_logits_equal_uncached_ones(tiny, gpt2):
    """Token by token through the cache, behind two slots of padding."""
    tiny = Model(Config(text.VOCAB, 2, 2, 16, gpt2=True)).double() if gpt2 else tiny
    x, junk = torch.randint(0, 20, (3, 10)), torch.zeros(3, 2, dtype=torch.int64)
    full, cache, at = tiny.logits(tiny(x)), tiny.new_cache(3, 12), torch.arange(12)
    tiny(junk, cache=cache)
    for t in range(10):
        h = tiny(x[:, t:t + 1], at[t:t + 1][None], (at[:t + 3] >= 2)[None, None, None], cache, slice(t + 2, t + 3))
        torch.testing.assert_close(tiny.logits(h)[:, 0], full[:, t], rtol=0, atol=1e-12)


def test_sampling_follows_the_distribution_and_its_cuts():
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    for kw, p in (({}, logits[0].softmax(-1)), ({"top_k": 2}, torch.tensor([0.7311, 0.2689, 0, 0])),
                  ({"top_p": 0.7}, torch.tensor([0.7311, 0.2689, 0, 0])), ({"top_p": 0.6}, torch.tensor([1.0, 0, 0, 0]))):
        share = torch.bincount(sample(logits, 1.0, generator=g, **kw), minlength=4) / 40_000
        assert (share - p).abs().max() < 0.01, kw
    assert sample(logits, 0.0).eq(0).all()


def test_detached_positions_pass_no_gradient(tiny):
    """The answer's gradient reaches a trajectory's embedding only through keys and values: detached, it is zero."""
    x, detach = torch.randint(0, 20, (1, 8)), torch.zeros(1, 8, dtype=torch.bool)
    detach[:, 2:6] = True
    seen = []
    for d in (None, detach):
        h = tiny.embed.weight[x].detach().requires_grad_()
        tiny.embed.forward = lambda ids: h
        seen.append(torch.autograd.grad(tiny(x, detach=d)[:, -1].sin().sum(), h)[0][0].norm(dim=-1) > 0)
    assert seen[0].all() and seen[1].tolist() == [True, True, False, False, False, False, True, True]


def slow_prefix_nll(model, heads, trajectories, tails):
    out = []
    for h, t, tail in zip(heads, trajectories, tails):
        rows = [torch.tensor([h + t[:i] + tail]) for i in range(len(t) + 1)]
        out.append([model.nll(r[:, :-1], r[:, 1:])[0, -len(tail) + 1:].mean().item() for r in rows])
    return out


@pytest.mark.parametrize("width", (3, 32))
def test_one_pass_curve_equals_prefix_by_prefix(tiny, width):
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(20) for _ in range(n)]
    heads, trajectories = [ids(n) for n in (3, 9, 5)], [ids(n) for n in (17, 6, 11)]
    tails = [[text.END_THINK, *ids(n), text.EOS] for n in (1, 3, 2)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = tiny.to(dtype)
        with torch.no_grad():
            for fast, slow in zip(prefix_nll(model, heads, trajectories, tails, width), slow_prefix_nll(model, heads, trajectories, tails)):
                torch.testing.assert_close(torch.tensor(fast), torch.tensor(slow, dtype=dtype), rtol=0, atol=tolerance)


def test_a_model_survives_saving_and_refuses_foreign_weights(tiny):
    again = Model.load(tiny.state())
    x = torch.randint(0, 20, (1, 5))
    assert torch.equal(again.double()(x), tiny(x).detach()) or torch.allclose(again.double()(x), tiny(x), atol=1e-6)
    with pytest.raises(ValueError):
        Model.load({"shape": {"vocab": 25, "width": 32}, "weights": tiny.state()["weights"]})
    with pytest.raises(ValueError):
        Model(Config(25, heads=3, width=16))
