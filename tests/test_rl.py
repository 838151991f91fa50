"""Rewards, metrics, GRPO and DPO against enumeration, finite differences and slow paths."""
import itertools
import math
import random
import time

import pytest
import torch

import analyze
import train
from data.flags import flags
from data import arithmetic, text

Q = arithmetic.parse("(3+5)*2-7")
TINY = ["--layers=1", "--heads=2", "--width=16", "--batch=8", "--questions=2", "--device=cpu", "--threads=1"]


def test_reward_is_that_of_the_paper():
    for output, r in (("3+5=8;8*2=16;16-7=9</think>9<eos>", 1), ("</think>9<eos>", 1), ("...</think>8<eos>", 0), ("3+5=8;16-7=9<eos>", -0.5), ("</think>9", -0.5),
                      ("</think>09<eos>", -1), ("9</think></think>9<eos>", -0.5), ("</think>9<eos>9", -0.5), ("</think><eos>", -1), ("", -1), ("3+5=8", -1)):
        assert arithmetic.reward(Q, output) == r, output


def test_ten_thousand_hostile_strings_get_a_verdict_in_seconds_and_nothing_is_evaluated(monkeypatch):
    for name in ("eval", "exec", "compile", "__import__"):
        monkeypatch.setattr("builtins." + name, lambda *a, **k: pytest.fail("evaluated"))
    rng = random.Random(0)
    pieces = ["9**9**9", "(" * 10_000 + "1" + ")" * 10_000, "\u0669", "\u00b2", "", "9" * 10_000, "-9", "+9", " 9", "9 ", "0x9", "9e0", "9_0", "\x00", "\n", "=", ";", "W", "</think>", "<eos>",
              "__import__('os').abort()", "9.0", "\uff19", "inf", "nan", "1/0", "<think>", "9", "16-7=9"]
    began = time.perf_counter()
    for i in range(10_000):
        s = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 4)))
        assert arithmetic.reward(Q, s) in (1.0, 0.0, -0.5, -1.0)
        assert arithmetic.verify(Q, s) == (s == "9")
        if i % 10 == 0:
            arithmetic.check(Q, s)
            with pytest.raises(ValueError):
                arithmetic.parse(s + "x")
    assert time.perf_counter() - began < 10


def test_pass_at_k_and_mg_pass_at_k_are_averages_over_all_subsets():
    n, k = 8, 4
    for c in range(n + 1):
        right = [sum(s) for s in itertools.combinations([1] * c + [0] * (n - c), k)]
        assert train.pass_at_k(n, c, k) == pytest.approx(sum(r > 0 for r in right) / len(right))
        g = lambda i: sum(r >= i for r in right) / len(right)
        assert train.mg_pass_at_k(n, c, k) == pytest.approx(2 / k * sum(g(i) for i in range(k // 2 + 1, k + 1)))
    for c, v in ((8, 0.0031), (16, 0.1181), (20, 0.2810), (24, 0.5031), (28, 0.75), (31, 0.9375), (32, 1)):
        assert train.mg_pass_at_k(32, c, 8) == pytest.approx(v, abs=5e-5)


def test_policy_gradient_against_the_sum_over_all_outputs():
    """A policy of 7 outputs (a, b or end, at most two tokens), groups of 2, float64: the expected gradient over all 49 groups.

    dr_grpo's is (G - 1) / G / L_max times that of the expected reward, exactly; grpo's is not along it."""
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
    outputs = [(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)]
    reward = torch.tensor([0.0, 1.0, 0.3, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)

    def logp(o):                                                            # (2,), 0 behind the end
        p = theta.log_softmax(-1)
        return torch.stack([p[0, o[0]], p[1 + o[0], o[1]] if len(o) > 1 else p.sum() * 0])
    L = torch.stack([logp(o) for o in outputs])
    mask = torch.tensor([[True, len(o) > 1] for o in outputs])
    p = (L * mask).sum(1).exp()
    assert float(p.sum().detach()) == pytest.approx(1)
    true, = torch.autograd.grad((p * reward).sum(), theta, retain_graph=True)
    expected = {}
    for adv in ("dr_grpo", "grpo"):
        c, total = train.Train(adv=adv, max_new=2), 0
        for pair in itertools.product(range(len(outputs)), repeat=2):
            A = train.advantages(reward[list(pair)][None], adv).flatten()
            l = L[list(pair)]
            grad, = torch.autograd.grad(train.policy_loss(l, l.detach(), mask[list(pair)], A, c), theta, retain_graph=True)
            total = total - p[pair[0]].detach() * p[pair[1]].detach() * grad
        expected[adv] = total
    torch.testing.assert_close(expected["dr_grpo"], true * 0.5 / 2, rtol=1e-10, atol=1e-12)
    cosine = torch.cosine_similarity(expected["grpo"].flatten(), true.flatten(), 0)
    assert cosine < 0.99, "grpo's bias should show here"


def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    c, mask = train.Train(max_new=1), torch.ones(1, 1, dtype=torch.bool)
    for ratio, A, moves in ((1.0, 1.0, True), (1.3, 1.0, False), (0.7, 1.0, True), (0.7, -1.0, False), (1.3, -1.0, True)):
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        train.policy_loss(logp, torch.zeros(1, 1), mask, torch.tensor([A]), c).backward()
        assert bool(logp.grad.abs().sum() > 0) == moves
    kl = train.policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), mask, torch.zeros(1), train.Train(max_new=1, kl=1.0), torch.tensor([[0.5]]))
    assert float(kl) == pytest.approx(math.exp(0.5) - 0.5 - 1)


def test_log_probabilities_of_rollouts_are_those_of_a_full_forward_and_of_the_cache(tiny):
    c = train.Train(group=3, max_new=7)
    asked, rows = train.rollouts(tiny, [Q, arithmetic.parse("3+4")], c, 5)
    assert len(asked) == len(rows) == 6 and train.rollouts(tiny, [Q, arithmetic.parse("3+4")], c, 5)[1] == rows
    logp, mask = train.log_prob(tiny, asked, rows)
    assert mask.sum(1).tolist() == [len(r) for r in rows] and (logp[~mask] == 0).all()
    for q, row, l, m in zip(asked, rows, logp, mask):
        head = text.prompt(q.text)
        full = tiny.logits(tiny(torch.tensor([head + row])))[0].log_softmax(-1)
        slow = torch.stack([full[len(head) + j - 1, t] for j, t in enumerate(row)])
        torch.testing.assert_close(l[m], slow, rtol=0, atol=1e-12)
        cache, at, cached = tiny.new_cache(1, len(head) + len(row)), torch.arange(len(head)), []
        h = tiny(torch.tensor([head]), mask=(at[:, None] >= at)[None, None], cache=cache)
        for j, t in enumerate(row):
            cached.append(tiny.logits(h[:, -1])[0].log_softmax(-1)[t])
            h = tiny(torch.tensor([[t]]), pos=torch.tensor([[len(head) + j]]), cache=cache, slot=slice(len(head) + j, len(head) + j + 1))
        torch.testing.assert_close(l[m], torch.stack(cached), rtol=0, atol=1e-12)


def test_dpo_gradient_against_finite_differences(tiny):
    asked, rows = [Q] * 4, [text.encode("3+5=8") + [text.END_THINK, 9, text.EOS], text.encode("9") + [text.END_THINK, 9], text.encode("1"), [text.END_THINK, 3, text.EOS]]
    ref = [torch.tensor([-9.0, -8.0]).double(), torch.tensor([-7.0, -9.0]).double()]
    loss = lambda: train.dpo_loss(*train.log_prob(tiny, asked, rows)[0].sum(1).split(2), *ref, 0.3)[0]
    loss().backward()
    for name in ("embed.weight", "blocks.1.up.weight", "head.weight"):
        p = tiny.get_parameter(name)
        d = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
        with torch.no_grad():
            p += 1e-6 * d
            up = loss()
            p -= 2e-6 * d
            down = loss()
            p += 1e-6 * d
        assert float((p.grad * d).sum()) == pytest.approx(float(up - down) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.fixture
def base(tmp_path):
    """A checkpoint of a hardly trained model."""
    train.train(*flags(train.Train, ["--steps=2", f"--out={tmp_path / 'base'}", *TINY]))
    return f"--init={tmp_path / 'base' / 'ckpt.pt'}"

@pytest.mark.parametrize("extra", (["--method=grpo", "--kl=0.1", "--epochs=2", "--update=2"], ["--method=dpo", "--beta=0.5"]))
def test_interrupted_and_resumed_equals_straight(tmp_path, base, monkeypatch, extra):
    run = ["--steps=4", "--group=4", "--max_new=6", "--save_every=2", base, *extra, *(f for f in TINY if "width" not in f and "layers" not in f and "heads" not in f)]
    broken, real = tmp_path / "broken", train.rollouts
    monkeypatch.setattr(train, "judge", lambda asked, rows: torch.tensor([float(len(r) % 2) for r in rows]))    # a reward that a weak model gets sometimes
    train.train(*flags(train.Train, [f"--out={tmp_path / 'straight'}", *run]))

    def fails(model, questions, c, seed):
        if seed == 3:
            raise RuntimeError("power cut")
        return real(model, questions, c, seed)
    monkeypatch.setattr(train, "rollouts", fails)
    with pytest.raises(RuntimeError):
        train.train(*flags(train.Train, [f"--out={broken}", *run]))
    monkeypatch.setattr(train, "rollouts", real)
    train.train(*flags(train.Train, [f"--out={broken}", "--resume"]))
    a, b = (torch.load(d / "ckpt.pt", weights_only=True)["model"]["weights"] for d in (tmp_path / "straight", broken))
    start = torch.load(tmp_path / "base" / "ckpt.pt", weights_only=True)["model"]["weights"]
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], start[k]) for k in a)

def test_a_reward_that_says_nothing_is_said_and_training_goes_on(tmp_path, base, capsys, monkeypatch):
    monkeypatch.setattr(train, "judge", lambda asked, rows: torch.ones(len(rows)))
    s = train.train(*flags(train.Train, ["--method=grpo", "--steps=20", "--group=2", "--batch=2", "--max_new=2", "--questions=2", base, f"--out={tmp_path / 'run'}", "--threads=1"]))
    assert "nothing to learn from" in capsys.readouterr().err and s["steps"] == 20

def test_bad_input_is_one_line(tmp_path, base, refused):
    out = f"--out={tmp_path / 'run'}"
    for args, words in ((["--method=grpo"], ["--init"]), (["--method=grpo", base, "--update=17"], ["--update"]), (["--method=dpo", base, "--group=1"], ["--group"]),
                        (["--method=grpo", base, "--batch=20"], ["--batch"]), (["--method=ppo"], ["ppo"]), ([base, "--width=32"], ["--width=32"]), (["--domains=expr,diff"], ["diff"]),
                        (["--operands=9"], ["expr", "2, 3, 4"]), (["--style=long,loud"], ["loud"]), (["--method=grpo", "--init=nowhere.pt"], ["nowhere.pt"])):
        refused(train, [*args, out, "--threads=1"], words)
        assert not (tmp_path / "run").exists()
    torch.save({"format": train.FORMAT, "encoding": "another"}, tmp_path / "foreign.pt")
    refused(train, ["--method=grpo", f"--init={tmp_path / 'foreign.pt'}", out], ["foreign.pt"])
    for args, words in ((["compare", "--arm=--steps=3"], ["two arms"]), (["compare", "--arm=--steps=3", "--arm=--stepz=3"], ["--stepz"]),
                        (["compare", "--arm=--steps=3", "--arm=--steps=4", "--cells=expr:9"], ["expr:9"]), (["patch", "--cells=expr:4", "--questions=1", base.replace("--init=", "--sft=").replace("/ckpt.pt", "")], ["different answers"])):
        refused(analyze, [*args, f"--out={tmp_path / 'x'}"], words)


def test_a_pool_holds_the_same_questions_whatever_its_support():
    mix = text.Mix(domains={"sum": 1}, operands={"sum": (0, 0, 1, 0)})
    one, many = mix.limited(20, 1, 0).pool, mix.limited(20, 8, 0).pool
    assert [q for q, _ in one] == [q for q, _ in many] and all(len(t) == 1 for _, t in one) and all(len(set(t)) == len(t) == 8 for _, t in many)
    assert all(t[0] in u for (_, t), (_, u) in zip(one, many))
    rng, seen = random.Random(0), set()
    for _ in range(300):
        e = mix.limited(20, 1, 0).sample(rng)
        seen.add((e.question, e.think) if e.learn == "all" else (e.question,))
    assert len({s for s in seen if len(s) == 2}) <= 20


def test_compare_trains_what_is_missing_and_pairs_the_same_questions(tmp_path, capsys):
    small = " ".join(TINY)
    args = ["--seeds=2", "--questions=3", f"--out={tmp_path}", "--threads=1"]
    c, _ = flags(analyze.Analyze, [f"--arm={small} --steps=2", f"--arm={small} --steps=2 | meta.py --batch=2 --steps=1", f"--arm={small} --steps=2", *args])
    _, result = analyze.compare(c)
    assert {"weights", "weights, cut", "theta", "context, cut"} <= {*result["numbers"]["arms"][c.arm[1]]}
    assert len(list((tmp_path / "runs").glob("*/*/summary.json"))) == 4     # shared stages are trained once
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*/ckpt.pt")}
    _, result = analyze.compare(c)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*/ckpt.pt")}
    assert all(g == [0, 0, 0] for name, g in result["numbers"]["gaps"].items() if name.startswith(f"{small} --steps=2 - "))
    analyze.plt.close("all")
