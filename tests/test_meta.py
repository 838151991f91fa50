"""The inner loop is held to mathematics: an independent slow form, finite differences, and what must not matter."""
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import analyze
import meta
import train
from data import arithmetic, text
from model import Config, Model

ROOT = Path(train.__file__).parent
close = lambda a, b, tolerance=1e-10: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tasks(n=3, support=2, seed=0, domain="sum", operands=4):
    rng = random.Random(seed)
    qs = [arithmetic.draw(rng, domain, operands) for _ in range(n)]
    return [meta.Task(q, [";".join(t) for t in arithmetic.distinct(q, rng, support)]) for q in qs]

def inner_of(model, K=1, fast="*.up,*.down", tau=3.0, alpha=0.05, **kw):
    inner = meta.Inner(meta.fast_layers(model, fast), K, alpha, tau, **kw).double()
    with torch.no_grad():                                                   # rates that differ, so that a mix-up of layers or steps shows
        inner.log_alpha += 0.3 * torch.randn(inner.log_alpha.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return inner

def dual_loss(model, inner, ts, order=2, mode="whole"):
    support, query = meta.tensors(ts)
    steps = meta.by_step(support) * inner.K if mode == "step" else None
    fast, _ = meta.adapt(model, inner, [(support.ids, support.inner)], len(ts), steps, order)
    return model.score(model(query.ids, hook=fast, plain_from=0), query.targets).sum(1)

def primal_loss(model, inner, ts, mode="whole"):
    out = []
    for t in ts:
        support, query = meta.tensors([t])
        steps = meta.by_step(support) * inner.K if mode == "step" else None
        theta = meta.theta_prime(model, inner, [(support.ids, support.inner)], steps)
        out.append(model.score(functional_call(model, theta, (query.ids,), {"plain_from": 0}), query.targets).sum())
    return torch.stack(out)

def gradient(loss, model, inner):
    ps = [*model.parameters(), inner.log_alpha]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, ps, materialize_grads=True)])


@pytest.mark.parametrize("K,support,fast,mode", [(1, 1, "*.up,*.down", "whole"), (2, 2, "*.up,*.down", "whole"), (3, 2, "*.up,*.down", "whole"),
                                                 (1, 2, "1.qkv,*.out,2.up", "whole"), (2, 1, "*", "whole"), (1, 1, "*.down", "step"), (2, 2, "*.up", "step")])
def test_dual_equals_primal_losses_and_meta_gradients(tiny, K, support, fast, mode):
    inner, ts = inner_of(tiny, K, fast, weigh=True), tasks(support=support)
    with torch.no_grad():
        inner.weight += 0.2 * torch.rand(text.VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = dual_loss(tiny, inner, ts, mode=mode), primal_loss(tiny, inner, ts, mode)
    plain = dual_loss(tiny, inner_of(tiny, K, fast, alpha=1e-12), ts, mode=mode)
    assert (a - plain).abs().min() > 1e-4                                   # the inner loop moved every question's loss
    close(a, b)
    close(gradient(a.sum(), tiny, inner), gradient(b.sum(), tiny, inner))


def directional(model, inner, ts, order):
    """The meta-gradient along a random direction, from autograd and from central differences of the loss.

    h is small because theta' jumps where theta makes a ReLU flip: on that set of measure zero there is no derivative to find."""
    g = torch.Generator().manual_seed(3)
    ps = [*model.parameters(), inner.log_alpha]
    v = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in ps]
    grads = torch.autograd.grad(dual_loss(model, inner, ts, order).sum(), ps, materialize_grads=True)
    exact, h = sum((a * b).sum() for a, b in zip(grads, v)), 1e-7
    values = []
    for sign in (h, -h):
        with torch.no_grad():
            for p, d in zip(ps, v):
                p += sign * d
        values.append(dual_loss(model, inner, ts, order=1).sum().detach())
        with torch.no_grad():
            for p, d in zip(ps, v):
                p -= sign * d
    return float(exact), float((values[0] - values[1]) / (2 * h))


@pytest.mark.parametrize("K", (1, 2))
def test_meta_gradient_equals_finite_differences_and_fomaml_fails_that_test(tiny, K):
    inner, ts = inner_of(tiny, K), tasks()
    exact, measured = directional(tiny, inner, ts, order=2)
    assert abs(exact - measured) < 1e-6 * abs(measured), (exact, measured)
    first, measured = directional(tiny, inner, ts, order=1)
    assert abs(first - measured) > 1e-3 * abs(measured), (first, measured)


def test_alpha_zero_gives_the_plain_gradient(tiny):
    ts = tasks()
    _, query = meta.tensors(ts)
    plain = tiny.nll(query.ids, query.targets).sum()
    adapted = dual_loss(tiny, meta.Inner(meta.fast_layers(tiny, "*"), alpha=0.0).double(), ts).sum()
    for a, b in zip(*(torch.autograd.grad(loss, list(tiny.parameters())) for loss in (plain, adapted))):
        close(a, b, 1e-12)


def test_reptile_with_one_step_points_along_sgd(tiny):
    """theta - theta' after one step at rate 1 is the gradient of the task's own loss."""
    ts, c = tasks(support=1), meta.Meta(algo="reptile", joint=0.0)
    inner = meta.Inner(meta.fast_layers(tiny, "*"), alpha=1.0, tau=3.0).double()
    loss, _ = meta.meta_loss(tiny, inner, c, ts, order=1)
    loss.backward()
    moves = {n: p.grad.clone() for n, p in tiny.named_parameters() if "blocks" in n}
    tiny.zero_grad()
    support, query = meta.tensors(ts)
    (sum(tiny.score(tiny(ids), t, 3.0).sum() for ids, t in ((support.ids, support.inner), query)) / len(ts)).backward()
    for n, p in tiny.named_parameters():
        if "blocks" in n:
            close(moves[n], p.grad)


def test_one_question_never_touches_another_and_padding_changes_nothing(tiny):
    inner = inner_of(tiny, 2)
    ts = tasks(4) + [meta.Task(t.question, [s[:9] for s in t.thinks]) for t in tasks(1, seed=9)]
    together = dual_loss(tiny, inner, ts)
    alone = torch.cat([dual_loss(tiny, inner, [t]) for t in ts])            # other lengths, so other padding
    close(together, alone)
    changed = dual_loss(tiny, inner, [ts[0], *tasks(3, seed=7), ts[4]])
    close(together[[0, 4]], changed[[0, 4]])
    assert (together[1:4] - changed[1:4]).abs().min() > 1e-6


def test_the_answer_behind_the_trajectory_never_reaches_theta_prime(tiny):
    inner, (t,) = inner_of(tiny), tasks(1)
    support, query = meta.tensors([t])
    results = []
    for ids in (support.ids, support.ids.masked_fill(support.answer & (support.ids != text.END_THINK), text.encode("7")[0])):
        fast, _ = meta.adapt(tiny, inner, [(ids, support.inner)], 1)
        results.append(tiny.nll(query.ids, query.targets, hook=fast))
    assert torch.equal(*results)


def test_token_updates_with_a_causal_mask_are_the_theta_prime_of_every_prefix(tiny):
    """One pass under the mask against an inner loop run anew on every prefix (D local: a token's update knows no later token)."""
    inner, (t,) = inner_of(tiny, alpha=0.3), tasks(1, support=1)
    support, query = meta.tensors([t])
    head, n, T = len(text.prompt(t.question.text)), len(t.thinks[0]), query.ids.size(1)
    fast, _ = meta.adapt(tiny, inner, [(support.ids, support.inner)], 1, local=True)
    copies = query.ids.expand(n + 1, T), query.targets.expand(n + 1, T)
    i = torch.arange(n + 1).repeat_interleave(T)
    fast.seen = (torch.arange(support.ids.size(1)) < head - 1 + i[:, None])[None]
    together = tiny.nll(*copies, hook=fast).sum(1)
    for j in range(n + 1):
        only = support.inner.clone()
        only[:, head - 1 + j:] = text.IGNORE
        fast, _ = meta.adapt(tiny, inner, [(support.ids, only)], 1, local=True)
        close(together[j], tiny.nll(query.ids, query.targets, hook=fast).sum())
    assert (together[1:] - together[0]).abs().min() > 1e-6


def test_context_gradients_full_and_detached_differ_only_behind_the_trajectory(tiny):
    ts = tasks(support=1)
    grads = []
    for how in ("full", "detached"):
        tiny.zero_grad()
        loss, numbers = meta.meta_loss(tiny, inner_of(tiny), meta.Meta(algo="none", context_grad=how, joint=1.0), ts, order=1)
        loss.backward()
        grads.append((numbers["joint"], tiny.blocks[0].qkv.weight.grad.clone()))
    close(grads[0][0], grads[1][0])
    assert (grads[0][1] - grads[1][1]).norm() > 1e-3 * grads[0][1].norm()


def test_nothing_of_size_questions_x_parameters_is_allocated(tiny):
    """The largest tensor of a whole second-order meta-step, seen by a dispatch mode, while questions x parameters is far above it."""
    from torch.utils._python_dispatch import TorchDispatchMode
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=2, heads=2, width=64))
    largest = [0]
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(o.numel() for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor))])
            return out
    ts, inner = tasks(40, support=1, operands=3), meta.Inner(meta.fast_layers(model, "*.up,*.down"))
    fast_parameters = 2 * 2 * 4 * 64 * 64
    with Watch():
        meta.meta_loss(model, inner, meta.Meta(), ts)[0].backward()
    assert 0 < largest[0] < 40 * fast_parameters / 5, (largest[0], 40 * fast_parameters)


def test_trajectories_without_their_last_results():
    assert [meta.without_results("3+5=8;8*2=16", n) for n in (0, 1, 2)] == ["3+5=8;8*2=16", "3+5=8;8*2=", "3+5="]
    with pytest.raises(ValueError):
        meta.without_results("3+5=8", 2)
    with pytest.raises(ValueError, match="empty"):
        meta.tensors([meta.Task(arithmetic.parse("3+5"), [""])])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    train.save(out / "ckpt.pt", model=Model(Config(text.VOCAB, layers=2, heads=2, width=16)).state(), step=0, config={})
    return out / "ckpt.pt"

def call(*args):
    return subprocess.run([sys.executable, ROOT / "meta.py", *args], capture_output=True, text=True)

SMALL = ["--batch=4", "--questions=4", "--threads=1", "--device=cpu"]


@pytest.mark.parametrize("args,word", [(["--K=0"], "--K"), (["--fast=9.up"], "9.up"), (["--support=99"], "distinct"), (["--algo=maml2"], "algo"),
                                       (["--algo=anil", "--fast=0.up"], "anil"), (["--operands=3,x"], "operands"), (["--operands=9"], "9"),
                                       (["--init=/nowhere/ckpt.pt"], "nowhere"), (["--tau=0"], "--tau")])
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, tmp_path, args, word, refused):
    own = {a.split("=")[0] for a in args}
    refused(meta, [*(f for f in (f"--init={checkpoint}", f"--out={tmp_path / 'run'}", *SMALL) if f.split("=")[0] not in own), *args], [word])
    assert not (tmp_path / "run").exists()


def test_a_meta_run_resumes_bit_for_bit_and_divergence_keeps_the_last_checkpoint(checkpoint, tmp_path):
    import signal
    import time
    a, b = tmp_path / "straight", tmp_path / "broken"
    args = [f"--init={checkpoint}", "--steps=60", "--save_every=5", "--first_order=0.3", "--K=2", "--msl=0.5", *SMALL]
    whole = subprocess.Popen([sys.executable, ROOT / "meta.py", f"--out={a}", *args], stdout=subprocess.DEVNULL)
    p = subprocess.Popen([sys.executable, ROOT / "meta.py", f"--out={b}", *args], stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not (b / "ckpt.pt").exists():
        time.sleep(0.02)
    p.send_signal(signal.SIGTERM)
    p.communicate()
    assert p.returncode == 143 and train.load(b / "ckpt.pt")["step"] < 60
    r = call(f"--out={b}", "--resume")
    assert r.returncode == 0 == whole.wait(), r.stderr
    one, two = train.load(a / "ckpt.pt"), train.load(b / "ckpt.pt")
    assert all(torch.equal(one["model"]["weights"][k], v) for k, v in two["model"]["weights"].items())
    assert all(torch.equal(one["extra"][k], v) for k, v in two["extra"].items())
    good = (a / "ckpt.pt").read_bytes()
    r = call(f"--init={checkpoint}", f"--out={tmp_path / 'wild'}", "--steps=30", "--save_every=1", "--lr=1e9", "--lr_adam=1e9", *SMALL)
    assert r.returncode == 1 and "not finite" in r.stderr and "rate" in r.stderr, r.stderr
    assert (a / "ckpt.pt").read_bytes() == good


def test_the_slow_sides_of_the_benchmark_compute_the_same_gradient(tiny):
    """Loop, vmap and dual form, on tasks of unequal lengths; and first order is another gradient."""
    inner, ts = inner_of(tiny), [meta.Task(t.question, t.thinks[:1]) for n in (2, 3, 4) for t in tasks(2, 1, n, operands=n)]
    flat = lambda gs: torch.cat([g.flatten() for g in gs])
    dual = flat(analyze.meta_by_dual(tiny, inner, ts))
    close(dual, flat(analyze.meta_by_loop(tiny, inner, ts)))
    close(dual, flat(analyze.meta_by_vmap(tiny, inner, ts)))
    assert (dual - flat(analyze.meta_by_dual(tiny, inner, ts, order=1))).norm() > 1e-3 * dual.norm()


@pytest.mark.parametrize("algo", ["maml", "reptile", "none"])
def test_parts_of_a_batch_add_up_to_it(tiny, algo):
    """What chunks and several processes rest on: means are taken over the whole batch."""
    c, inner = meta.Meta(algo=algo), inner_of(tiny)
    ts = [t._replace(whole=n > 2) for n in (2, 3, 4) for t in tasks(1, 1, n, operands=n)]
    grads, numbers = [], []
    for parts in ([ts], [ts[:1], ts[1:]]):
        tiny.zero_grad()
        results = [meta.meta_loss(tiny, inner, c, part, order=2 if algo == "maml" else 1, counts=meta.counts_of(ts)) for part in parts]
        for loss, _ in results:
            loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in tiny.parameters()]))
        numbers.append([float(sum(n[k] for _, n in results)) for k in ("L_q", "joint")])
    close(*grads)
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-12)
    support, query = meta.tensors(ts)
    assert meta.counts_of(ts) == (3, int((query.targets >= 0).sum()), int((support.joint >= 0).sum()))
