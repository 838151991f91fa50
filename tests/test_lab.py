"""The bench: flags, files, devices, intervals and verdicts, scores."""
import itertools
import subprocess
from functools import partial

import numpy as np
import pytest
import torch

import train
from data import arithmetic, text
from experiments import Analyze
from lab import flags, run, score, verdict

Q = arithmetic.parse("(3+5)*2-7")


def test_a_command_line_becomes_a_dataclass_and_what_was_given():
    c, given = flags.flags(train.Train, ["--steps=1000", "--lr=1e-3", "--method=dpo", "--resume"])
    assert given == {"steps": 1000, "lr": 0.001, "method": "dpo", "resume": True}
    assert c == train.Train(**given)
    c, _ = flags.flags(Analyze, ["a", "--arm=p", "b", "--arm=--steps=3"])
    assert c == Analyze(names=("a", "b"), arm=("p", "--steps=3"))

def test_a_revision_is_this_folders_own_and_says_where_code_is_new(tmp_path, monkeypatch):
    """Not that of GIT_DIR, nor of a repository around it."""
    for words in ("init -q", "-c user.name=a -c user.email=a commit -q --allow-empty -m a"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_DIR", "elsewhere")
    (tmp_path / "notes.txt").touch()
    name = run.revision()
    assert int(name, 16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "new.py").touch()
    assert run.revision() == name + "+"
    monkeypatch.setattr(run, "ROOT", tmp_path / "mine")
    assert run.revision() == "unknown"

def test_a_text_may_name_a_folder_whose_bytes_are_no_letters(tmp_path):
    run.write(tmp_path / "report.md", "out/\udcff/\xe4")
    assert (tmp_path / "report.md").read_bytes() == b"out/\\udcff/\xc3\xa4"

def test_rates_warm_up_stay_level_and_fall_to_zero():
    c = train.Train(steps=40, warmup=10)
    shares = [run.lr_at(c, step, 0.5) for step in range(40)]
    level, fall = [1] * 10, [(20 - i) / 20 for i in range(20)]
    assert shares == pytest.approx([(i + 1) / 10 for i in range(10)] + level + fall)
    assert run.lr_at(c, 20) == 0.5

def test_samples_drawn_ahead_are_the_same():
    draw = partial(train.pieces, train.Train(batch=6), text.Mix(), 4)
    for one, other in zip(*(run.ahead(draw, range(3, 6), torch.device(d)) for d in ("cpu", "cuda")),
                          strict=True):
        assert len(one) == len(other) == 2
        for a, b in zip(one, other):
            assert type(b) is text.Batch and a.trunk == b.trunk
            assert all(map(torch.equal, a[:6], b[:6]))

def test_intervals_have_the_published_values():
    """Wilson's for 200 right of 200 and for 1 of 10 (Brown, Cai, DasGupta 2001), Student's
    quantiles, and five seeds by hand."""
    assert verdict.interval([True] * 200) == [1, pytest.approx(0.9812, abs=1e-4), 1]
    one_of_ten = verdict.interval([True] + [False] * 9)
    assert one_of_ten == pytest.approx([0.1, 0.0179, 0.4042], abs=1e-4)
    found = [verdict.t_quantile(0.975, df) for df in (1, 2, 4, 10, 100)]
    assert found == pytest.approx([12.706, 4.303, 2.776, 2.228, 1.984], rel=1e-3)
    seeds = np.arange(5.0)[:, None] + np.linspace(-1, 1, 30)
    for values in (seeds, seeds.mean(1)):
        assert verdict.over_seeds(values) == pytest.approx((2, 0.0367, 3.9633), abs=1e-3)
    assert verdict.interval(np.ones((1, 30))) == [1, None, None] and verdict.interval([]) is None

def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(150):
        _, low, high = verdict.bootstrap(rng.normal(1, 1, 50), draws=300)
        covered += low <= 1 <= high
    assert 0.88 < covered / 150 < 0.99
    _, low, high = verdict.bootstrap(rng.normal(0, 1, 400))
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    mixed = np.concatenate((np.full(120, 1.0), np.full(80, -9.0)))
    assert verdict.interval(mixed, np.median) == [1, 1, 1] and verdict.interval(mixed)[0] == -3

def near(rng, centre, *shape):
    return centre + 0.1 * rng.normal(size=shape)

def test_margins_decide_either_way():
    """All above 0 support, one below refutes; seeds that disagree decide nothing, however many
    questions each was asked."""
    rng = np.random.default_rng(0)
    above, below, around = near(rng, 0.3, 200), near(rng, -0.2, 200), np.tile([1.0, -1.0], 100)
    seeds = np.array([3.0, 1.0, -1.0])[:, None] + near(rng, 0, 3, 100)
    for margins, word in (((above,), "supported"), ((below,), "refuted"),
                          ((above, below), "refuted"), ((around,), "inconclusive"),
                          ((above, around), "inconclusive"),
                          ((near(rng, 0.3, 5, 30),), "supported"),
                          ((near(rng, -0.3, 5, 30),), "refuted"), ((seeds,), "inconclusive"),
                          ((seeds.flatten(),), "supported"), ((above > 0,), "supported")):
        found, intervals = verdict.decide(dict(enumerate(margins)))
        assert found == word and list(intervals) == list(range(len(margins)))
        assert intervals[0] == verdict.interval(margins[0])
    assert verdict.decide({"one seed": np.ones((1, 30))})[0] == "inconclusive"
    assert verdict.widened(4) == pytest.approx(0.9875)          # Bonferroni
    for few in (np.ones(19), (np.ones((19, 2)), np.median)):
        assert verdict.decide({"few": few, "many": np.ones(20)}) == ("not testable here", {})

@pytest.mark.parametrize("right", range(9))
def test_pass_at_k_and_mg_pass_at_k_are_averages_over_all_subsets(right):
    n, k = 8, 4
    subsets = itertools.combinations([1] * right + [0] * (n - right), k)
    counts = [sum(subset) for subset in subsets]
    shares = [sum(count >= i for count in counts) / len(counts) for i in range(k + 1)]
    assert score.pass_at_k(n, right, k) == pytest.approx(shares[1])
    assert score.mg_pass_at_k(n, right, k) == pytest.approx(2 / k * sum(shares[k // 2 + 1:]))

@pytest.mark.parametrize("right,value", [(8, 0.0031), (16, 0.1181), (20, 0.2810), (24, 0.5031),
                                         (28, 0.75), (31, 0.9375), (32, 1)])
def test_mg_pass_at_8_of_32_has_the_published_values(right, value):
    assert score.mg_pass_at_k(32, right, 8) == pytest.approx(value, abs=5e-5)


class Scripted:
    """Stands for a model: writes these texts, and remembers the prompts."""
    device = torch.device("cpu")

    def __init__(self, *outputs):
        self.outputs, self.prompts = list(outputs), []

    def generate(self, prompts, stop, room, **kw):
        self.prompts += map(text.decode, prompts)
        rows = [self.outputs.pop(0) for _ in prompts]
        return [text.ENCODING.encode(row, allowed_special="all") for row in rows]

def test_an_output_is_a_trajectory_and_an_answer():
    model = Scripted("3+5=8</think>9", "3+5=8", "</think>", "3</think>4</think>5")
    outputs = score.respond(model, [Q] * 4, size=3)
    assert outputs == [("3+5=8", "9"), ("3+5=8", ""), ("", ""), ("3", "4</think>5")]
    assert model.prompts == [f"<bos>{Q.text}<think>"] * 4
    model = Scripted("9", "8")
    assert score.right(model, [Q] * 2, "direct") == [True, False]
    assert model.prompts == [f"<bos>{Q.text}<think></think>"] * 2
    outputs = ["</think>9", "</think>8", "</think>09", "</think>7", "7", "</think>7"]
    assert score.sampled(Scripted(*outputs), [Q, arithmetic.parse("3+4")], 3) == [1, 2]
