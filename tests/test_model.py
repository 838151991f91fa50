"""Attention, cache, generation, compiled blocks: fast paths against slow ones."""
import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

import model as theta
from data import text
from model import Config, Model, attention, sample

RAGGED = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 4], [3, 3, 3, 7, 1]]


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------ attention, forward

def random_bias(T, S):
    """(2, 1, T, S): a random share of it hidden, never a token from itself."""
    hidden = torch.rand(2, 1, T, S).gt(0.6) & ~torch.eye(T, S, dtype=torch.bool)
    return torch.zeros(2, 1, T, S, dtype=torch.float64).masked_fill(hidden, -torch.inf)

@pytest.mark.parametrize("T,S,masked", [(7, 7, False), (7, 7, True), (1, 7, False), (3, 7, True)])
def test_fused_attention_equals_the_formula_forward_and_gradient(T, S, masked):
    """Causal, under a mask, and one query that sees all keys."""
    torch.manual_seed(0)
    bias, results = random_bias(T, S) if masked else None, []
    q = torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, S, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, S, 8, dtype=torch.float64, requires_grad=True)
    for plain in (True, False):
        y = attention(q, k, v, bias, plain)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (q, k, v))))
    for a, b in zip(*results):
        equal(a, b)


def test_padding_on_the_right_changes_nothing(tiny):
    x = torch.randint(0, 20, (1, 9))
    padded = torch.cat((x, torch.full((1, 4), text.PAD)), 1)
    equal(tiny(x), tiny(padded)[:, :9])


def test_detached_positions_pass_no_gradient(tiny):
    """The last token's gradient reaches others through keys and values only: detached, it is 0."""
    x, detach = torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.bool)
    detach[:, 2:6] = True
    reached = []
    for d in (None, detach):
        loss = tiny(x, detach=d)[:, -1].sin().sum()
        grad = torch.autograd.grad(loss, tiny.embed.weight)[0]
        reached.append((grad[:8].norm(dim=-1) > 0).tolist())
    assert reached[0] == [True] * 8
    assert reached[1] == [True, True, False, False, False, False, True, True]


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is a CUDA one."""
    is_cuda = True

@pytest.mark.parametrize("tau", (1.0, 3.0))
def test_score_is_the_same_on_the_branch_for_cuda(tiny, tau):
    """All positions with the idle ones ignored, against only those with a target; gradients too."""
    h = torch.randn(3, 6, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, text.VOCAB, (3, 6))
    targets[0, :4] = text.IGNORE
    targets[1] = text.IGNORE
    results = []
    for states in (h, h.as_subclass(OnCuda)):
        nll = tiny.score(states, targets, tau).as_subclass(torch.Tensor)
        assert nll.shape == targets.shape
        results.append((nll, *torch.autograd.grad(nll.sin().sum(), (h, tiny.head.weight))))
    for a, b in zip(*results):
        equal(a, b)
    assert (results[1][0][targets < 0] == 0).all()
    assert (results[1][0][targets >= 0] > 0).all()


def test_losses_are_float32_where_the_forward_pass_is_bfloat16(tiny):
    """A softmax over bfloat16 logits would round away what a loss has to tell apart."""
    model, x, targets = tiny.float(), torch.randint(0, 20, (2, 9)), torch.randint(0, 20, (2, 9))
    exact = model.nll(x, targets).detach()
    model.dtype = torch.bfloat16
    h = model(x)
    assert h.dtype == torch.bfloat16 and model.logits(h).dtype == torch.float32
    for states in (h, h.as_subclass(OnCuda)):
        nll = model.score(states, targets).detach().as_subclass(torch.Tensor)
        assert nll.dtype == torch.float32
        assert 0 < (nll - exact).abs().max() < 0.2


# -------------------------------------------------------------------------------------- compiling

@pytest.mark.parametrize("lengths", [(9, 12, 17), (130, 150, 171)])
def test_compiled_blocks_have_no_graph_break_and_serve_every_length(tiny, lengths):
    """One graph with a mask and one without, below 128 keys (the formula) and above (the fused
    kernel, which is what CUDA takes); fullgraph raises at a break."""
    torch._dynamo.reset()
    graphs, compiled = CompileCounter(), copy.deepcopy(tiny)
    for block in compiled.blocks:
        block.compile(dynamic=True, fullgraph=True, backend=graphs)
    for T in lengths:
        x = torch.randint(0, 20, (3, T))
        mask = torch.rand(3, 1, T, T).gt(0.5) | torch.eye(T, dtype=torch.bool)
        equal(compiled(x), tiny(x))
        equal(compiled(x, mask=mask), tiny(x, mask=mask))
    assert graphs.frame_count == 2
    torch._dynamo.reset()


def test_generation_never_compiles(tiny):
    torch._dynamo.reset()
    graphs, compiled = CompileCounter(), copy.deepcopy(tiny)
    for block in compiled.blocks:
        block.compile(dynamic=True, backend=graphs)
    assert compiled.generate(RAGGED, stop=-1, max_new=6) == tiny.generate(RAGGED, -1, max_new=6)
    assert graphs.frame_count == 0
    compiled(torch.tensor([RAGGED[0]]))
    assert graphs.frame_count > 0
    torch._dynamo.reset()


# ------------------------------------------------------------------------------ cache, generation

def continued(model, prompt, stop, n):
    """Greedy continuation without a cache: every token from a full forward pass."""
    ids = list(prompt)
    for _ in range(n):
        logits = model.logits(model(torch.tensor([ids]))[:, -1])
        new = int(logits.argmax())
        if new == stop:
            break
        ids.append(new)
    return ids[len(prompt):]

def stop_of(model, kind):
    """A token to stop at: one that never comes, or one that ends the first row in its middle."""
    if kind == "never":
        return -1
    return text.EOS if kind == "eos" else continued(model, RAGGED[0], -1, 12)[-1]

@pytest.mark.parametrize("static", (False, True))
@pytest.mark.parametrize("kind", ("eos", "never", "met"))
def test_cached_generation_equals_uncached_for_ragged_prompts(tiny, static, kind):
    """Growing shapes, and the fixed ones that CUDA replays as a graph."""
    stop = stop_of(tiny, kind)
    rows = tiny.generate(RAGGED, stop, max_new=24, static=static)
    assert rows == [continued(tiny, prompt, stop, 24) for prompt in RAGGED]
    if kind == "met":
        assert min(map(len, rows)) < 24


@pytest.mark.parametrize("prompts", (RAGGED, [[4, 5, 6]] * 3))
@pytest.mark.parametrize("stop", (text.EOS, -1))
@pytest.mark.parametrize("cuts", ({}, {"top_k": 5}, {"top_p": 0.8}))
def test_fixed_shapes_sample_the_tokens_that_growing_ones_do(tiny, prompts, stop, cuts):
    def sampled(static):
        g = torch.Generator().manual_seed(1)
        return tiny.generate(prompts, stop, 20, 1.0, generator=g, static=static, **cuts)

    growing = sampled(static=False)
    assert growing == sampled(static=True)
    assert growing != tiny.generate(prompts, stop, 20)


def recorded(f, i):
    """What `replayed` does on CUDA, without it: f runs before anything is replayed, and all results
    lie where the first one does."""
    f(i)
    result = f(i).clone()

    def replay(n):
        i.fill_(n)
        return result.copy_(f(i))
    return replay

@pytest.mark.parametrize("stop", (text.EOS, -1))
def test_a_graph_may_run_before_it_is_replayed(tiny, monkeypatch, stop):
    """By then a real token stands in every place that it reads: -1 has no embedding."""
    rows = tiny.generate(RAGGED, stop, 24, static=False)
    monkeypatch.setattr(theta, "replayed", recorded)
    assert tiny.generate(RAGGED, stop, 24, static=True) == rows
    assert tiny.generate(RAGGED, stop, 1, static=True) == [row[:1] for row in rows]


def test_cached_logits_equal_uncached_ones(tiny):
    """Token by token through the cache, behind two slots of padding."""
    x, junk = torch.randint(0, 20, (3, 10)), torch.zeros(3, 2, dtype=torch.int64)
    full, cache, at = tiny.logits(tiny(x)), tiny.new_cache(3, 12), torch.arange(12)
    tiny(junk, cache=cache)
    for t in range(10):
        real = (at[:t + 3] >= 2)[None, None, None]
        h = tiny(x[:, t:t + 1], at[t:t + 1][None], real, cache, slice(t + 2, t + 3))
        equal(tiny.logits(h)[:, 0], full[:, t])


@pytest.mark.parametrize("cuts,p", [
    ({}, torch.tensor([2.0, 1.0, 0.0, -1.0]).softmax(-1)),
    ({"top_k": 2}, torch.tensor([0.7311, 0.2689, 0, 0])),
    ({"top_p": 0.7}, torch.tensor([0.7311, 0.2689, 0, 0])),
    ({"top_p": 0.6}, torch.tensor([1.0, 0, 0, 0]))])
def test_sampling_follows_the_distribution_and_its_cuts(cuts, p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    drawn = sample(logits, 1.0, generator=generator, **cuts)
    share = torch.bincount(drawn, minlength=4) / 40_000
    assert (share - p).abs().max() < 0.01
    assert sample(logits, 0.0).eq(0).all()


@pytest.mark.parametrize("prompts", ([], [[1, 2], []]))
def test_generation_refuses_empty_prompts(tiny, prompts):
    with pytest.raises(ValueError, match="empty"):
        tiny.generate(prompts, text.EOS)


# ------------------------------------------------------------------------------------------ state

def test_a_model_survives_saving(tiny):
    model, x = tiny.float(), torch.randint(0, 20, (1, 5))
    assert torch.equal(Model.load(model.state())(x), model(x))


def test_foreign_weights_are_refused(tiny):
    shape, weights = tiny.state().values()
    foreign = [{"shape": {"vocab": 25, "width": 32}, "weights": weights}, {"weights": weights},
               {"shape": {**shape, "gpt2": False}, "weights": weights},
               {"shape": shape, "weights": {**weights, "place.weight": weights["embed.weight"]}}]
    for state in foreign:
        with pytest.raises(ValueError, match="weights of a model of ours"):
            Model.load(state)
    with pytest.raises(ValueError, match="even multiple"):
        Model(Config(25, heads=3, width=16))
