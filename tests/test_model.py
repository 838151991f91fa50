"""Attention, masks, cache, generation: fast paths against slow ones."""
import itertools
import math
import random

import pytest
import torch
from conftest import close, logp_at_end

from data import arithmetic, text
from model import Model, attention, left_mask, left_padded, sample

RAGGED = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 4], [3, 3, 3, 7, 1]]


def qkv(T, S):
    shapes = [(2, 3, T, 8), (2, 3, S, 8), (2, 3, S, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

def random_bias(T, S):
    """(2, 1, T, S): a random share hidden, never the first key."""
    hidden = torch.rand(2, 1, T, S).gt(0.6)
    hidden[..., 0] = False
    return torch.zeros(2, 1, T, S, dtype=torch.float64).masked_fill(hidden, -math.inf)


@pytest.mark.parametrize("T,S,masked", [(130, 130, False), (130, 130, True), (1, 130, False),
                                        (5, 130, True), (1, 130, True)])
def test_fused_attention_equals_the_formula_forward_and_gradient(T, S, masked):
    """Causal, under a mask, and one query that sees all keys."""
    torch.manual_seed(0)
    bias, (q, k, v), results = random_bias(T, S) if masked else None, qkv(T, S), []
    for twice in (True, False):
        y = attention(q, k, v, bias, twice)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (q, k, v))))
    for a, b in zip(*results):
        close(a, b)

def slow_attention(q, k, v, seen):
    """One query at a time over the keys that it sees, by hand."""
    out = torch.zeros_like(q)
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        keys = [s for s in range(k.size(2)) if seen(b, t, s)]
        weights = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(8)) for s in keys]
        for s, weight in zip(keys, weights):
            out[b, h, t] += weight / sum(weights) * v[b, h, s]
    return out

@pytest.mark.parametrize("seed", range(24))
def test_attention_of_any_shape_equals_a_slow_loop(seed):
    """Random T <= S under masks; causal where T = S; everything for one query."""
    torch.manual_seed(seed)
    S = random.Random(seed).randint(1, 9)
    T = (S, 1, random.Random(-seed).randint(1, S))[seed % 3]
    q, k, v = (x.detach() for x in qkv(T, S))
    bias = random_bias(T, S) if seed % 3 == 2 else None

    def seen(b, t, s):
        return s <= t or T == 1 if bias is None else bias[b, 0, t, s] == 0
    for twice in (False, True):
        close(attention(q, k, v, bias, twice), slow_attention(q, k, v, seen))

@pytest.mark.parametrize("S", (7, 130))
@pytest.mark.parametrize("twice", (False, True))
def test_more_keys_than_queries_without_a_mask_are_refused(S, twice):
    with pytest.raises(AssertionError, match="mask"):
        attention(*qkv(3, S), None, twice)


def some_rows():
    rng = random.Random(1)
    questions = [arithmetic.draw(rng, "expr", n) for n in (3, 6, 4)]
    return [text.row(q.text, arithmetic.steps(q, rng)[0], q.answer) for q in questions]

def test_asides_change_nothing_for_the_rest_and_say_what_a_row_that_ends_there_says(tiny):
    for row in some_rows():
        batch, trunk = text.batch([row]), []
        h, real = tiny(**batch.inputs())[0], ~batch.aside[0]
        close(h[real], tiny(batch.ids[:, real])[0])
        for i, (token, aside) in enumerate(zip(row.ids, row.aside)):
            if aside:
                close(h[i], tiny(torch.tensor([[*trunk, text.END_THINK]]))[0, -1])
            trunk += [] if aside else [token]
        assert sum(row.aside) >= 2

def test_padding_changes_nothing(tiny):
    """On the right in batches, on the left where all rows are to end alike."""
    rows, (ids, real) = some_rows(), left_padded(RAGGED, "cpu")
    for row, h in zip(rows, tiny(**text.batch(rows).inputs())):
        close(h[:len(row.ids)], tiny(**text.batch([row]).inputs())[0])
    for row, h in zip(RAGGED, tiny(ids, mask=left_mask(real))):
        close(h[-len(row):], tiny(torch.tensor([row]))[0])
        assert h.isfinite().all()

def test_the_token_before_matters_but_to_the_end_of_thinking(tiny):
    ids = torch.tensor([[*text.encode("3+5"), text.END_THINK]])
    before = torch.tensor([[text.PAD, *text.encode("3+5")]])
    close(tiny(ids), tiny(ids, before))
    for i, matters in enumerate((True, True, True, False)):
        other = before.clone()
        other[0, i] = 7
        assert bool((tiny(ids, other)[0, -1] - tiny(ids)[0, -1]).abs().max() > 1e-6) == matters


class SaysItIsOnCuda(torch.Tensor):
    is_cuda = True

@pytest.mark.parametrize("tau", (1.0, 3.0))
def test_scores_are_negative_log_likelihoods_on_either_branch(tiny, tau):
    """Written out; where nothing is asked it is 0, and gradients are the same."""
    h = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, text.VOCAB, (3, 6))
    targets[0, :4] = targets[1] = text.IGNORE
    logp = (h @ tiny.head.weight.T / tau).log_softmax(-1)
    slow = -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    expected = torch.autograd.grad(slow.sin().sum(), (h, tiny.head.weight), retain_graph=True)
    for states in (h, h.as_subclass(SaysItIsOnCuda)):
        nll = tiny.score(states, targets, tau).as_subclass(torch.Tensor)
        close(nll, slow)
        for a, b in zip(torch.autograd.grad(nll.sin().sum(), (h, tiny.head.weight)), expected):
            close(a, b)

def test_losses_and_gradients_are_float32_where_bfloat16_is_computed(tiny):
    model, x, targets = tiny.float(), torch.randint(0, 20, (2, 9)), torch.randint(0, 20, (2, 9))
    exact = torch.autograd.grad(model.nll(x, targets).sum(), model.blocks[1].up.weight)[0]
    model.dtype = torch.bfloat16
    h = model(x)
    nll = model.score(h, targets)
    rough = torch.autograd.grad(nll.sum(), model.blocks[1].up.weight)[0]
    assert h.dtype == torch.bfloat16 and nll.dtype == rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.1


def continued_without_cache(model, prompt, stop, n):
    ids = list(prompt)
    for _ in range(n):
        new = int(logp_at_end(model, ids).argmax())
        if new == stop:
            break
        ids.append(new)
    return ids[len(prompt):]

@pytest.mark.parametrize("kind", ("eos", "never", "met"))
def test_cached_generation_side_by_side_equals_uncached_one_at_a_time(tiny, kind):
    met = continued_without_cache(tiny, RAGGED[0], -1, 12)[-1]
    stop = {"eos": text.EOS, "never": -1, "met": met}[kind]
    rows = tiny.generate(RAGGED, stop, 24)
    assert rows == [continued_without_cache(tiny, prompt, stop, 24) for prompt in RAGGED]
    assert rows == [tiny.generate([prompt], stop, 24)[0] for prompt in RAGGED]
    assert (min(map(len, rows)) < 24) == (kind != "never")
    for prompts in ([], [[1, 2], []]):
        with pytest.raises(ValueError, match="empty"):
            tiny.generate(prompts, stop)

def test_cached_states_equal_uncached_ones(tiny):
    """Token by token, and in two pieces under a mask."""
    x, cache = torch.randint(0, 20, (3, 10)), tiny.new_cache()
    full, found = tiny(x), []
    for t in range(10):
        found.append(tiny(x[:, t:t + 1], x[:, t - 1:t] if t else None, cache=cache))
    close(torch.cat(found, 1), full)
    cache, mask = tiny.new_cache(), torch.ones(10, 10, dtype=torch.bool).tril()
    tiny(x[:, :4], cache=cache)
    close(tiny(x[:, 4:], x[:, 3:9], mask[None, None, 4:], cache), full[:, 4:])

def test_sampling_follows_the_distribution_at_its_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = sample(logits.expand(40_000, 4), 2.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 40_000
    close(shares, (logits / 2).softmax(-1), 0.01)

def test_a_model_survives_saving_and_foreign_weights_are_refused(tiny):
    (shape, weights), x = tiny.state().values(), torch.randint(0, 20, (1, 5))
    assert torch.equal(Model.load(tiny.state())(x), tiny(x))
    foreign = [{"weights": weights}, {"shape": shape}, None,
               *({"shape": {**shape, name: 17}, "weights": weights} for name in (*shape, "gpt2")),
               {"shape": shape, "weights": {**weights, "place.weight": weights["embed.weight"]}}]
    for state in foreign:
        with pytest.raises(ValueError):
            Model.load(state)
