"""Rewards, metrics, GRPO and DPO against enumeration, finite differences and slow paths."""
import itertools
import math
import random
import time

import pytest
import torch

import train
from data import arithmetic, text
from lab import score
from lab.flags import flags
from lab.run import FORMAT, load, read_log

Q = arithmetic.parse("(3+5)*2-7")
SMALL = ["--batch=8", "--questions=2", "--device=cpu", "--threads=1"]


def trained(*args):
    return train.train(*flags(train.Train, args))

def always(value):
    """A function that returns this value, whatever it is asked."""
    def f(*args, **kw):
        return value
    return f


# ------------------------------------------------------------------------------- rewards, metrics

@pytest.mark.parametrize("output,reward", [
    ("3+5=8;8*2=16;16-7=9</think>9<eos>", 1), ("</think>9<eos>", 1), ("...</think>8<eos>", 0),
    ("3+5=8;16-7=9<eos>", -0.5), ("</think>9", -0.5), ("</think>09<eos>", -1),
    ("9</think></think>9<eos>", -0.5), ("</think>9<eos>9", -0.5), ("</think><eos>", -1), ("", -1),
    ("3+5=8", -1)])
def test_reward_is_that_of_the_paper(output, reward):
    assert arithmetic.reward(Q, output) == reward


PIECES = ("9**9**9", "(" * 10_000 + "1" + ")" * 10_000, "٩", "²", "", "9" * 10_000, "-9", "+9",
          " 9", "9 ", "0x9", "9e0", "9_0", "\x00", "\n", "=", ";", "W", "</think>", "<eos>",
          "__import__('os').abort()", "9.0", "９", "inf", "nan", "1/0", "<think>", "9", "16-7=9")

def evaluated(*args, **kw):
    pytest.fail("evaluated")

def test_ten_thousand_hostile_strings_get_a_verdict_in_seconds_and_run_nothing(monkeypatch):
    for name in ("eval", "exec", "compile", "__import__"):
        monkeypatch.setattr(f"builtins.{name}", evaluated)
    rng, began = random.Random(0), time.perf_counter()
    for i in range(10_000):
        s = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 4)))
        assert arithmetic.reward(Q, s) in (1.0, 0.0, -0.5, -1.0)
        assert arithmetic.verify(Q, s) == (s == "9")
        if i % 10 == 0:
            arithmetic.check(Q, s)
            with pytest.raises(ValueError):
                arithmetic.parse(s + "x")
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("right", range(9))
def test_pass_at_k_and_mg_pass_at_k_are_averages_over_all_subsets(right):
    n, k = 8, 4
    outcomes = [1] * right + [0] * (n - right)
    counts = [sum(subset) for subset in itertools.combinations(outcomes, k)]
    shares = [sum(count >= i for count in counts) / len(counts) for i in range(k + 1)]
    assert score.pass_at_k(n, right, k) == pytest.approx(shares[1])
    reliably = 2 / k * sum(shares[k // 2 + 1:])
    assert score.mg_pass_at_k(n, right, k) == pytest.approx(reliably)


@pytest.mark.parametrize("right,value", [(8, 0.0031), (16, 0.1181), (20, 0.2810), (24, 0.5031),
                                         (28, 0.75), (31, 0.9375), (32, 1)])
def test_mg_pass_at_8_of_32_has_the_published_values(right, value):
    assert score.mg_pass_at_k(32, right, 8) == pytest.approx(value, abs=5e-5)


class Scripted:
    """Stands for a model: writes these texts, behind prompts that it remembers."""
    head = torch.nn.Linear(1, 1)

    def __init__(self, *outputs):
        self.outputs, self.prompts = list(outputs), []

    def generate(self, prompts, stop, max_new, **kw):
        self.prompts += map(text.decode, prompts)
        rows = [self.outputs.pop(0) for _ in prompts]
        return [text.ENCODING.encode(row, allowed_special="all") for row in rows]

def test_an_output_is_a_trajectory_and_an_answer():
    model = Scripted("3+5=8</think>9", "3+5=8", "</think>", "3</think>4</think>5")
    outputs = score.respond(model, [Q] * 4)
    assert outputs == [("3+5=8", "9"), ("3+5=8", ""), ("", ""), ("3", "4</think>5")]
    assert model.prompts == [f"<bos>{Q.text}<think>"] * 4
    model = Scripted("9", "8")
    assert score.right(model, [Q] * 2, "direct") == [True, False]
    assert model.prompts == [f"<bos>{Q.text}<think></think>"] * 2


def test_sampled_outputs_are_counted_a_question():
    """(right, a plain number at all) of each question's own n outputs, however they are batched."""
    outputs = ["</think>9", "</think>8", "</think>09", "</think>7", "7", "</think>7"]
    questions = [Q, arithmetic.parse("3+4")]
    for size in (2, 4, 100):
        counts = score.sampled(Scripted(*outputs), questions, 3, size=size)
        assert counts == [(1, 2), (2, 2)]


def test_exact_match_is_the_share_right_of_every_cell_and_mode():
    cells = {"expr": (2, 5), "diff": (3,)}
    thinking, direct = [], []
    for domain, operands in (("expr", 2), ("expr", 5), ("diff", 3)):
        for i, q in enumerate(score.held_out(domain, operands, 4)):
            thinking.append(f"...</think>{q.answer if i < 3 else 'W'}")
            direct.append(q.answer if operands == 2 else "")
    table, mistakes = score.exact_match(Scripted(*thinking, *direct), cells, 4, size=5)
    assert table == {"expr": {"2": {"trajectory": 0.75, "direct": 1.0},
                              "5": {"trajectory": 0.75, "direct": 0.0}},
                     "diff": {"3": {"trajectory": 0.75, "direct": 0.0}}}
    q = score.held_out("expr", 2, 4)[3]                 # the others were never trained on
    assert mistakes == [f"{q.text} -> ... -> W, but it is {q.answer}"]


# ----------------------------------------------------------------------------------------- losses

# A policy of seven outputs: two tokens of a = 0, b = 1, or fewer before the end, 2.
OUTPUTS = [(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)]
MASK = torch.tensor([[True, len(output) > 1] for output in OUTPUTS])
REWARD = torch.tensor([0.0, 1.0, 0.3, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)

def log_probs(theta):
    """theta (4, 3): scores of the first token, and of the second behind each -> (7, 2)."""
    p, rows = theta.log_softmax(-1), []
    for output in OUTPUTS:
        second = p[1 + output[0], output[1]] if len(output) > 1 else torch.zeros_like(p[0, 0])
        rows.append(torch.stack((p[0, output[0]], second)))
    return torch.stack(rows)

def expected_gradient(theta, adv):
    """Of `policy_loss`, negated, over all 49 groups of two outputs."""
    c, logp, total = train.Train(adv=adv, max_new=2), log_probs(theta), 0
    p = (logp * MASK).sum(1).exp().detach()
    for pair in itertools.product(range(len(OUTPUTS)), repeat=2):
        pair = list(pair)
        A = train.advantages(REWARD[pair][None], adv).flatten()
        loss = train.policy_loss(logp[pair], logp[pair].detach(), MASK[pair], A, c)
        grad, = torch.autograd.grad(loss, theta, retain_graph=True)
        total = total - p[pair].prod() * grad
    return total

def test_policy_gradient_against_the_sum_over_all_outputs():
    """dr_grpo's expected gradient is (G - 1) / G / L_max times that of the expected reward,
    exactly; grpo's is not along it."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    p = (log_probs(theta) * MASK).sum(1).exp()
    assert float(p.sum().detach()) == pytest.approx(1)
    true, = torch.autograd.grad((p * REWARD).sum(), theta)
    exact, biased = (expected_gradient(theta, adv) for adv in ("dr_grpo", "grpo"))
    torch.testing.assert_close(exact, true * 0.5 / 2, rtol=1e-10, atol=1e-12)
    assert torch.cosine_similarity(biased.flatten(), true.flatten(), 0) < 0.99


@pytest.mark.parametrize("ratio,A,moves", [(1.0, 1.0, True), (1.3, 1.0, False), (0.7, 1.0, True),
                                           (0.7, -1.0, False), (1.3, -1.0, True)])
def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough(ratio, A, moves):
    logp, mask = torch.tensor([[math.log(ratio)]], requires_grad=True), torch.tensor([[True]])
    c = train.Train(max_new=1)
    train.policy_loss(logp, torch.zeros(1, 1), mask, torch.tensor([A]), c).backward()
    assert bool(logp.grad.abs().sum() > 0) == moves


def test_the_divergence_from_a_reference_is_k3():
    """p_ref / p - log(p_ref / p) - 1."""
    zero, mask, c = torch.zeros(1, 1), torch.tensor([[True]]), train.Train(max_new=1, kl=1.0)
    loss = train.policy_loss(zero, zero, mask, torch.zeros(1), c, torch.tensor([[0.5]]))
    assert float(loss) == pytest.approx(math.exp(0.5) - 0.5 - 1)


def full_log_probs(model, head, row):
    """log p of every token of a row, from one forward pass of head and row together."""
    logp = model.logits(model(torch.tensor([head + row])))[0].log_softmax(-1)
    return torch.stack([logp[len(head) + j - 1, token] for j, token in enumerate(row)])

def cached_log_probs(model, head, row):
    """The same, token by token through the KV cache."""
    H, found = len(head), []
    cache, at = model.new_cache(1, H + len(row)), torch.arange(H)
    h = model(torch.tensor([head]), mask=(at[:, None] >= at)[None, None], cache=cache)
    for j, token in enumerate(row):
        found.append(model.logits(h[:, -1])[0].log_softmax(-1)[token])
        slot = slice(H + j, H + j + 1)
        h = model(torch.tensor([[token]]), torch.tensor([[H + j]]), cache=cache, slot=slot)
    return torch.stack(found)

def test_log_probabilities_of_rollouts_are_those_of_a_full_forward_and_of_the_cache(tiny):
    c, questions = train.Train(group=3, max_new=7), [Q, arithmetic.parse("3+4")]
    asked, rows = train.rollouts(tiny, questions, c, 5)
    assert len(asked) == len(rows) == 6
    assert train.rollouts(tiny, questions, c, 5)[1] == rows
    logp, mask = train.log_prob(tiny, asked, rows)
    assert mask.sum(1).tolist() == list(map(len, rows))
    assert (logp[~mask] == 0).all()
    for q, row, own, real in zip(asked, rows, logp, mask):
        for slow in (full_log_probs, cached_log_probs):
            expected = slow(tiny, text.prompt(q.text), row)
            torch.testing.assert_close(own[real], expected, rtol=0, atol=1e-12)


def preference_loss(model):
    """DPO's loss of two pairs of outputs of one question, references made up."""
    rows = [[*text.encode("3+5=8"), text.END_THINK, 9, text.EOS],
            [*text.encode("9"), text.END_THINK, 9], text.encode("1"), [text.END_THINK, 3, text.EOS]]
    better, worse = train.log_prob(model, [Q] * 4, rows)[0].sum(1).split(2)
    ref_better = torch.tensor([-9.0, -8.0], dtype=torch.float64)
    ref_worse = torch.tensor([-7.0, -9.0], dtype=torch.float64)
    return train.dpo_loss(better, worse, ref_better, ref_worse, 0.3)[0]

@pytest.mark.parametrize("name", ("embed.weight", "blocks.1.up.weight", "head.weight"))
def test_dpo_gradient_against_finite_differences(tiny, name):
    p, h, losses = tiny.get_parameter(name), 1e-6, []
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    grad, = torch.autograd.grad(preference_loss(tiny), p)
    with torch.no_grad():
        for move in (h, -2 * h):
            p += move * direction
            losses.append(float(preference_loss(tiny)))
    measured = (losses[0] - losses[1]) / (2 * h)
    assert float((grad * direction).sum()) == pytest.approx(measured, rel=1e-6, abs=1e-9)


def test_pairs_are_a_right_output_and_a_wrong_one_of_the_same_question():
    """Each output at most once, none of a group that is all right or all wrong."""
    rewards = torch.tensor([1.0, 0.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -0.5, 0.0, 1.0, 0.0])
    assert train.pairs_of(rewards, 4) == [(0, 1), (2, 3), (10, 8)]


# ------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The checkpoint of a hardly trained model."""
    out = tmp_path_factory.mktemp("base")
    trained("--steps=2", f"--out={out}", "--layers=1", "--heads=2", "--width=16", *SMALL)
    return out / "ckpt.pt"

def weights(path):
    return load(path)["model"]["weights"]

def odd_lengths(asked, rows):
    """A reward that a weak model gets sometimes."""
    return torch.tensor([float(len(row) % 2) for row in rows])

@pytest.mark.parametrize("extra", (["--method=grpo", "--kl=0.1", "--epochs=2", "--update=2"],
                                   ["--method=dpo", "--beta=0.5"]))
def test_interrupted_and_resumed_equals_straight(tmp_path, base, monkeypatch, extra):
    straight, broken, real = tmp_path / "straight", tmp_path / "broken", train.rollouts
    args = ["--steps=4", "--group=4", "--max_new=6", "--save_every=2", f"--init={base}", *extra,
            *SMALL]
    monkeypatch.setattr(train, "rewards_of", odd_lengths)
    trained(f"--out={straight}", *args)

    def failing(model, questions, c, seed):
        if seed == 3:
            raise RuntimeError("power cut")
        return real(model, questions, c, seed)
    monkeypatch.setattr(train, "rollouts", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(f"--out={broken}", *args)
    assert load(broken / "ckpt.pt")["step"] == 2
    monkeypatch.setattr(train, "rollouts", real)
    trained(f"--out={broken}", "--resume")

    seconds = [row["seconds"] for row in read_log(broken)]
    assert len(seconds) == 4 and seconds == sorted(seconds)
    a, b, start = (weights(path) for path in (straight / "ckpt.pt", broken / "ckpt.pt", base))
    for name in a:
        assert torch.equal(a[name], b[name])
    assert any(not torch.equal(a[name], start[name]) for name in a)


def test_a_reward_that_says_nothing_is_said_and_training_goes_on(tmp_path, base, capsys,
                                                                 monkeypatch):
    monkeypatch.setattr(train, "rewards_of", always(torch.ones(2)))
    summary = trained("--method=grpo", "--steps=20", "--group=2", "--max_new=2", f"--init={base}",
                      f"--out={tmp_path / 'run'}", *SMALL[1:], "--batch=2")
    assert "nothing to learn from" in capsys.readouterr().err
    assert summary["steps"] == 20


@pytest.mark.parametrize("args,words", [
    (["--method=grpo"], ["--init"]), (["--method=grpo", "BASE", "--update=17"], ["--update"]),
    (["--method=dpo", "BASE", "--group=1"], ["--group"]),
    (["--method=grpo", "BASE", "--batch=20"], ["--batch"]), (["--method=ppo"], ["ppo"]),
    (["BASE", "--width=32"], ["--width=32"]), (["--domains=expr,diff"], ["diff"]),
    (["--operands=9"], ["expr", "2, 3, 4"]), (["--style=long,loud"], ["loud"]),
    (["--method=grpo", "--init=nowhere.pt"], ["nowhere.pt"]),
    (["--method=grpo", "--init=foreign.pt"], ["foreign.pt"])])
def test_bad_input_is_one_line(tmp_path, base, refused, args, words):
    torch.save({"format": FORMAT, "encoding": "another"}, tmp_path / "foreign.pt")
    out, args = tmp_path / "run", [f"--init={base}" if a == "BASE" else a for a in args]
    refused(train, [*args, f"--out={out}", "--threads=1", "--device=cpu"], words)
    assert not out.exists()


USED_BY = {"update=1": ["grpo"], "adv=grpo": ["grpo"], "epochs=2": ["grpo"], "eps=0.1": ["grpo"],
           "kl=0.1": ["grpo"], "beta=0.2": ["dpo"], "group=8": ["grpo", "dpo"],
           "max_new=32": ["grpo", "dpo"], "chunks=2": ["sft"], "style=short": ["sft"],
           "direct=0.2": ["sft"], "cut=0.2": ["sft"], "support=2": ["sft"]}

@pytest.mark.parametrize("flag", USED_BY)
def test_a_method_refuses_the_flags_that_it_has_no_use_for(flag, exits):
    for method in train.METHODS:
        args = [f"--method={method}", "--init=x", "--pool=5", f"--{flag}"]
        c, given = flags(train.Train, args)
        if method in USED_BY[flag]:
            train.configure(c, given)
        else:
            exits([f"--{flag.split('=')[0]}"], train.configure, c, given)
