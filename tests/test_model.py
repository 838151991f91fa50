"""Attention, masks, cache, generation: fast paths against slow ones."""
import itertools
import math
import random

import pytest
import torch
from conftest import close, logp_at_end
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from data import arithmetic, text
from model import (Attention, Config, Model, attention, backend_of, left_mask, left_padded, sample,
                   weights)

RAGGED = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 4], [3, 3, 3, 7, 1]]


def qkv(T, S):
    shapes = [(2, 3, T, 8), (2, 3, S, 8), (2, 3, S, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

def random_bias(T, S):
    """(2, 1, T, S): a random share hidden, never the first key."""
    hidden = torch.rand(2, 1, T, S).gt(0.6)
    hidden[..., 0] = False
    return torch.zeros(2, 1, T, S, dtype=torch.float64).masked_fill(hidden, -math.inf)

def written(q, k, v, bias=None):
    return weights(q, k, bias) @ v


@pytest.mark.parametrize("T,S,masked", [(7, 7, False), (7, 7, True), (1, 7, False), (3, 7, True),
                                        (1, 7, True)])
@pytest.mark.parametrize("order", (0, 1, 2))
def test_fused_attention_equals_the_formula_and_so_do_its_derivatives(T, S, masked, order):
    """Causal, under a mask, and one query that sees all keys; keys and values that depend on the
    queries, as they all depend on the layer below."""
    torch.manual_seed(0)
    (q, k, v), bias, results = qkv(T, S), random_bias(T, S) if masked else None, []
    k = k + q.mean(-2, keepdim=True)
    for f in (written, Attention.apply):
        found = [f(q, k, v, bias)]
        for i in range(order):
            of = sum(x.sin().sum() for x in found)
            found = torch.autograd.grad(of, (q, k, v), create_graph=i + 1 < order)
        results.append(found)
    for a, b in zip(*results):
        close(a, b)

def test_fused_attention_keeps_its_inputs_alone_and_runs_without_a_graph():
    (q, k, v), kept = qkv(7, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        Attention.apply(q, k, v, None)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in (q, k, v)]
    with torch.inference_mode():
        close(Attention.apply(q, k, v), written(q, k, v))

@pytest.mark.parametrize("T", (20, 133))
def test_meta_gradients_come_through_either_way(tiny, T, monkeypatch):
    """In a whole model under functional_call, rows short and long."""
    ids, path, found = torch.randint(0, 20, (2, T)), "blocks.1.up.weight", []
    for f in (written, Attention.apply):
        monkeypatch.setattr(model, "attention", f)
        W = tiny.get_parameter(path)
        grad, = torch.autograd.grad(tiny.nll(ids, ids).mean(), W, create_graph=True)
        h = functional_call(tiny, {path: W - grad}, (ids,))
        found.append(torch.autograd.grad(tiny.score(h, ids).mean(), list(tiny.parameters())))
    for a, b in zip(*found):
        close(a, b)

def test_the_kernel_of_every_kind_is_the_tables():
    lines = map(str.split, backend_of.__doc__.splitlines())
    table = [words for words in lines if words and "float" in words[0]]
    assert len(table) == 6
    for (kind, first, *_, plain, masked), newer in itertools.product(table, (True, False)):
        if first == ("below" if newer else "8.0"):
            continue
        for capability in ((8, 0), (9, 0), (12, 0)) if newer else ((7, 0), (7, 5)):
            for mask, causal in ((False, True), (False, False), (True, False)):
                expected = masked if mask else plain
                assert backend_of(getattr(torch, kind), mask, causal, capability) == expected

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("asides", (True, False))
def test_a_gpu_runs_the_tables_kernel_and_no_other(dtype, asides, monkeypatch):
    """For every call in training rows, with asides and without, forward, backward and twice."""
    card, real, seen = torch.cuda.get_device_capability(), model.fused, set()
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
               "math": SDPBackend.MATH}

    def only(q, k, v, bias=None):
        name = backend_of(q.dtype, bias is not None, bias is None, card)
        seen.add(name)
        with sdpa_kernel([kernels[name]]):              # a fallback is refused
            return real(q, k, v, bias)
    monkeypatch.setattr(model, "fused", only)
    one = Model(Config(text.VOCAB, layers=2)).cuda()
    one.dtype, batch = dtype, text.batch(some_rows(asides), "cuda")
    loss = one.score(one(**batch.inputs()), batch.targets).mean()
    grads = torch.autograd.grad(loss, list(one.parameters()), create_graph=True)
    (loss + sum(g.square().sum() for g in grads)).backward()
    one.score(one(**batch.inputs()), batch.targets).mean().backward()
    assert all(p.grad.isfinite().all() for p in one.parameters())
    assert seen == {backend_of(dtype, mask, not mask, card) for mask in {False, asides}}


def slow_attention(q, k, v, seen):
    """One query at a time over the keys that it sees, by hand."""
    out = torch.zeros_like(q)
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        keys = [s for s in range(k.size(2)) if seen(b, t, s)]
        likes = (k[b, h, keys] @ q[b, h, t] / math.sqrt(8)).exp()
        out[b, h, t] = likes / likes.sum() @ v[b, h, keys]
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
    for f in (attention, Attention.apply):
        close(f(q, k, v, bias), slow_attention(q, k, v, seen))

@pytest.mark.parametrize("S", (7, 130))
def test_more_keys_than_queries_without_a_mask_are_refused(S):
    with pytest.raises(AssertionError, match="mask"):
        attention(*qkv(3, S), None)


class SaysItIsOnCuda(torch.Tensor):
    is_cuda = True

def some_rows(asides=True):
    rng = random.Random(1)
    questions = [arithmetic.draw(rng, "expr", n) for n in (3, 6, 4)]
    return [text.row(q.text, arithmetic.steps(q, rng)[0], q.answer, asides)
            for q in questions]

def test_asides_change_nothing_for_the_rest_and_say_what_a_row_that_ends_there_says(tiny):
    rows = some_rows()
    batch = text.batch(rows)
    for row, h in zip(rows, tiny(**batch.inputs())):
        trunk = [token.id for token in row.trunk]
        close(h[:len(trunk)], tiny(torch.tensor([trunk]))[0])
        for token, at_aside in zip(row.asides, h[batch.trunk:]):
            close(at_aside, tiny(torch.tensor([[*trunk[:token.place], text.END_THINK]]))[0, -1])
        assert len(row.asides) >= 2

@pytest.mark.parametrize("asides", (True, False))
def test_a_gpus_mask_for_asides_alone_says_what_a_mask_for_all_tokens_does(tiny, asides):
    batch = text.batch(some_rows(asides))
    given = batch._replace(ids=batch.ids.as_subclass(SaysItIsOnCuda)).inputs()
    given["ids"] = batch.ids
    masked = batch._replace(hidden=torch.zeros_like(batch.ids, dtype=torch.bool)).inputs()
    assert ("mask" in given) == asides
    assert not asides or given["mask"].size(-2) == masked["mask"].size(-2) - batch.trunk
    for h, other, row in zip(tiny(**given), tiny(**masked), some_rows(asides)):
        close(h[:len(row.trunk)], other[:len(row.trunk)])
        close(h[batch.trunk:], other[batch.trunk:])

def test_masks_start_where_kernels_read(tiny, monkeypatch):
    """In steps of 8, so that torch copies nothing."""
    seen = []
    monkeypatch.setattr(model, "attention", lambda q, k, v, bias=None: seen.append(bias) or q)
    tiny(**text.batch(some_rows()[:1]).inputs())
    tiny(torch.zeros(3, 1, dtype=torch.int64), mask=torch.ones(3, 1, 1, 1, dtype=torch.bool))
    steps = [bias.stride() for bias in seen if bias is not None]
    assert len(steps) == 6
    assert all(step % 8 == 0 for *steps, last in steps for step in steps if last == 1)

def test_padding_changes_nothing(tiny):
    """On the right in batches, on the left where all rows are to end alike."""
    rows, (ids, real) = some_rows(), left_padded(RAGGED, "cpu")
    for row, h in zip(rows, tiny(**text.batch(rows).inputs())):
        alone = tiny(**text.batch([row]).inputs())[0]
        close(h[:len(row.trunk)], alone[:len(row.trunk)])
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


@pytest.mark.parametrize("tau", (1.0, 3.0))
def test_scores_are_negative_log_likelihoods(tiny, tau):
    """Written out; where nothing is asked it is 0, and gradients are the same."""
    h = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, text.VOCAB, (3, 6))
    targets[0, :4] = targets[1] = text.IGNORE
    logp = (h @ tiny.head.weight.T / tau).log_softmax(-1)
    slow = -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    nll = tiny.score(h, targets, tau)
    close(nll, slow)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (h, tiny.head.weight))
                      for x in (nll, slow))):
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
