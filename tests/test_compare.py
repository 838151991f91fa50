"""Comparisons of trainings: what an arm may be, what a run is known by, and verdicts on made-up
numbers."""
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import contents, drawn

import experiments
import meta
from experiments import Analyze, arms, compare, coverage, cuts, trainings
from lab.run import load, save

TINY = "--layers=1 --heads=2 --width=16 --batch=8"


def of(tmp_path, *arm, **changes):
    """The command line of a small compare."""
    given = {"seeds": 1, "questions": 20, "threads": 1, "device": "cpu", "out": str(tmp_path)}
    return Analyze(names=("compare",), arm=arm, **{**given, **changes})

def digests(c, arm):
    return [stage.digest for stage in arms.chain_of(c, arm, 0)]


@pytest.mark.parametrize("arm, words", (
    ("--steps=2 --seed=5", ["--seed=5", "not for an arm"]),
    ("--steps=2 --out=x", ["--out=x", "not for an arm"]),
    ("--steps=2 --overwrite", ["--overwrite", "not for an arm"]),
    ("--steps=2 |", ["not nothing"]), ("--steps=2 || meta.py", ["not nothing"]), ("", ["nothing"]),
    ("analyze.py --steps=2", ["train.py or meta.py", "analyze.py"]),
    ("data/text.py", ["data/text.py"]), ("../train.py --steps=2", ["../train.py"]),
    ("--stepz=3", ["--stepz"]), ("--steps=0", ["--steps=0", "allowed"]),
    ("--steps=2 | --init=x", ["--init", "twice"]), ("--style='short", ["quotation"]),
    ("meta.py --steps=2", ["no checkpoint", "out/sft/ckpt.pt"]),
    ("--method=grpo --init=no.pt", ["no checkpoint", "no.pt"]),
    ("--init=BASE/config.json", ["cannot be read"]), ("--init='a b/x.pt'", ["at a b/x.pt"]),
    ("--width=17 --heads=2", ["multiple"])))
def test_what_cannot_be_an_arm_is_refused_before_anything_is_trained(
        arm, words, exits, tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    arm = arm.replace("BASE", str(base))
    exits(words, compare.measure, of(tmp_path, f"{TINY} --steps=2", arm), None)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("pair, changes, words", (
    (["--steps=2", "--steps=2 "], {}, ["one name"]),
    (["a: --steps=2", "a: --steps=3"], {}, ["one name"]),
    (["a: --steps=2", "b: --steps=2"], {}, ["same run"]),
    (["--steps=2 --batch=9", "--batch=9 --steps=2"], {}, ["same run"]),
    (["--steps=2", "--steps=2 | meta.py"], {"cells": "expr:5 sum:5"}, ["meta.py", "'expr' only"]),
    (["--steps=2", "--steps=3"], {"cells": "expr:2"}, ["expr:2"])))
def test_arms_that_cannot_be_compared_are_refused(pair, changes, words, exits, tmp_path):
    exits(words, compare.measure, of(tmp_path, *pair, **changes), None)
    assert not list(tmp_path.iterdir())

def test_arms_are_named_by_a_name_or_by_what_differs():
    names, shared = compare.named(("--steps=9 --batch=8", "--steps=9 --batch=8 --style=short",
                                   "--steps=9 --batch=8 | --method=dpo", "my way: --steps=3"))
    assert list(names) == ["--steps=9 --batch=8", "--steps=9 --batch=8 --style=short",
                           "--steps=9 --batch=8 then --method=dpo", "my way"] and not shared
    names, shared = compare.named(("--steps=9", "--steps=9 --style=short", "--steps=9 | x $"))
    assert list(names) == ["plain", "--style=short", "then x _"] and shared == "--steps=9"
    assert list(compare.named(("meta.py --init=C:/x", "C|$ d: x"))[0])[0] == "meta.py --init=C:/x"


def test_a_run_is_known_by_all_its_flags_and_its_chain(tmp_path, monkeypatch):
    c = of(tmp_path)
    plain, = digests(c, "--steps=9")
    assert [plain] == digests(c, "train.py --batch=48 --steps 9") != digests(c, "--steps=8")
    assert digests(c, "--steps=9 | meta.py --steps=5")[0] == plain
    assert digests(c, "--steps=9 | meta.py")[1] != digests(c, "--steps=8 | meta.py")[1]
    before = digests(c, "--steps=9 | meta.py")
    monkeypatch.setattr(meta.Meta.__init__, "__defaults__", tuple(
        11.0 if d == 10.0 else d for d in meta.Meta.__init__.__defaults__))
    after = digests(c, "--steps=9 | meta.py")               # another default of tau
    assert before[0] == after[0] and before[1] != after[1]

def test_a_run_is_known_by_the_weights_that_it_starts_from(base, tmp_path, monkeypatch, exits):
    """Whatever else stands in the file, and wherever it lies."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found, c, model = [], of(tmp_path), load(base / "ckpt.pt")["model"]
    for i in range(3):
        model["weights"]["head.weight"][0, 0] = i % 2
        save(tmp_path / f"{i}.pt", model=model, step=i, config={}, optimisers=[])
        found += digests(c, f"--steps=2 --init={tmp_path}/{i}.pt")
    assert found[0] == found[2] != found[1]
    assert digests(c, "--steps=2 --init ~/0.pt") == digests(c, "--init='~/0.pt' --steps=2")
    (tmp_path / "config.json").touch()
    exits(["has not ended"], digests, c, f"--steps=2 --init={tmp_path}/0.pt")


def near(mean, seed=0):
    """(5 seeds, 100 questions) of zeros and ones, about so many of them right."""
    rng = np.random.default_rng([seed, int(1000 * mean)])
    shares = np.clip(mean + 0.01 * rng.standard_normal((5, 1)), 0, 1)
    return (rng.random((5, 100)) < shares).astype(float)

def raw_of(one, level):
    """Made-up measurements of a Comparison, level(arm) being the share right in every metric."""
    metrics = {metric for pairs in one.parts.values() for _, _, metric, _ in pairs} | {"exact"}
    facts = {"flags": "", "seconds": 1.0, "tokens": 1, "dtype": "float32", "checksums": ["0"]}
    return {cells: ({name: arms.Arm({m: near(level(name)) for m in metrics}, dict(facts))
                     for name in row}, 0.15) for cells, row in one.asked.items()}

@pytest.mark.parametrize("name", trainings.TABLE)
def test_every_part_of_every_comparison_turns_both_ways(name):
    one = trainings.TABLE[name]
    for part, pairs in one.parts.items():
        better = {a for a, *_ in pairs}
        for levels, verdict in (((0.8, 0.4), "supported"), ((0.4, 0.8), "refuted"),
                                ((0.15, 0.05), "not testable here")):
            raw = raw_of(one, lambda arm: levels[arm not in better])
            verdicts, numbers = one.judge(raw)
            assert verdicts[part] == verdict
    drawn(one, numbers)

def test_every_comparison_has_its_parts_and_flags_that_are_accepted(tmp_path):
    for name, one in trainings.TABLE.items():
        assert one.__doc__.startswith(experiments.known()[name]) and one.CLAIM and one.TRAINS
        for arm in (arm for row in one.asked.values() for arm in row.values()):
            assert all(re.search(r"--steps=\d", " ".join(s.words))
                       for s in arms.chain_of(of(tmp_path), arm, 0))
        named = {(cells, arm) for cells, row in one.asked.items() for arm in row}
        assert named >= {(cells, arm) for pairs in one.parts.values()
                         for *pair, _, cells in pairs for arm in pair}

def test_a_sentence_says_what_follows():
    high, low = near(0.8, 1), near(0.6, 2)
    better, worse = compare.sentence(high, low, "A"), compare.sentence(low, high, "A")
    number = r"\d+\.\d"
    assert re.fullmatch(rf"{number} points better than A \[{number}, {number}\], in 5 of 5 seeds",
                        better)
    assert worse == better.replace("better", "worse")
    equal = compare.sentence(near(0.6, 1), low, "A")
    assert "no difference to A can be told: with 5 seeds and 100 questions" in equal
    assert "says nothing" in compare.sentence(high[:1], low[:1], "A")
    assert "loose" in compare.sentence(high[:2], low[:2], "A")
    assert "harder, or easier" in compare.sentence(low, low, "A")
    assert "both too weak" in compare.sentence(0 * low, 0 * low, "A")

def test_a_table_comes_first_with_a_note_where_arms_took_unequal_time():
    pair = "B", "A", "exact", "expr:5"
    one = compare.Comparison("", "", {"expr:5": {"A": "", "B": ""}}, {"B": [pair]})
    for seconds, notes in ((1.1, 0), (1.3, 1)):
        raw = raw_of(one, lambda arm: 0.5)
        raw["expr:5"][0]["B"].facts["seconds"] = seconds
        numbers = compare.judge((one, raw, ""))[1]
        first, head, *rows = compare.show(numbers)
        assert "nothing" in first and "15%" in head
        assert [row.split()[0] for row in rows] == ["A", "B", *["note:"] * notes]

def test_coverage_tells_true_intervals_from_false_ones():
    rng = np.random.default_rng(0)
    verdicts, numbers = coverage.judge(rng.normal(0.5, 0.1, 30))
    assert set(verdicts.values()) == {"supported"} and len(coverage.show(numbers)) == 6
    drawn(coverage, numbers)
    rare = coverage.judge(np.eye(30)[0])[0]                 # one seed of thirty differs
    assert rare["3 seeds, zero is held"] == rare["3 seeds, an effect is seen"] == "refuted"

def test_a_slope_turns_both_ways():
    states = np.linspace(2, 0, 6) + 0.01 * near(0.5)[..., None]
    cliff = states.copy()
    cliff[..., :4] = 2
    moved = states + 0.01 * near(0.5)[..., None]
    moved[..., 3] -= 0.5
    raw = {name: (y, near(0.5), []) for name, y in (
        ("as ever", states), ("style steps", cliff), ("half the steps", 0.1 * states),
        (cuts.OF_THREE, moved))}
    verdicts, numbers = cuts.judge(raw)
    assert list(verdicts.values())[:3] == ["supported", "refuted", "not testable here"]
    assert verdicts[cuts.OF_THREE] == "supported"
    raw[cuts.OF_THREE] = states - 0.5, near(0.5), []
    assert cuts.judge(raw)[0][cuts.OF_THREE] == "inconclusive"
    drawn(cuts, numbers)


def test_two_arms_are_trained_compared_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train.py')")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    more = f"more: {TINY} --steps=2 | meta.py --steps=1 --fast='*.up'"
    c = of(tmp_path / "out", f"{TINY} --steps=2", more, cells="expr:3")
    result = experiments.run("compare", c, torch.device("cpu"))
    said, before = capsys.readouterr().out, contents(tmp_path / "out" / "runs")
    assert "2 runs to train, 1 at a time\nthe first took" in said
    assert said.index(f"begin with: {TINY}") < said.index("plain") < said.index("more: ")
    assert list(result["verdicts"][0]) == ["more", "more, in the head"]
    assert "NaN" not in json.dumps(result) and result["config"]["device"] == "cpu"
    facts = result["numbers"]["asked"]["expr:3"]["arms"]["more"]
    assert facts["dtype"] in ("float32", "bfloat16")
    experiments.check(replace(c, arm=(), redraw=True))
    stages = arms.chain_of(c, compare.named(c.arm)[0]["more"], 0)
    scores = arms.ask(c, stages[1], [("expr", 4)], samples=8)
    assert set(scores) > {"exact", "direct", "pass", "mg", *meta.KINDS}
    assert all(len(scores[m]) == 20 for m in ("exact", "mg", "sibling", "sibling, in context"))

    with ThreadPoolExecutor() as notebook:          # nothing is trained again
        notebook.submit(experiments.run, "compare", c, torch.device("cpu")).result()
    assert "0 runs to train" in capsys.readouterr().out
    assert contents(tmp_path / "out" / "runs") == before

def test_an_arm_that_fails_is_said_at_once_and_ends_the_others(tmp_path, exits):
    long = f"{TINY} --steps=100000 --save_every=100000"
    few = f"{TINY} --steps=2 --domains=expr --operands=2 --pool=9 --support=9"
    exits(["--support=9", "trajectories each"], compare.measure,
          of(tmp_path / "out", long, few, jobs=2), None)
    log = next(tmp_path.glob("out/runs/*steps=100000*/0/metrics.jsonl"), None)
    size = log and log.stat().st_size
    time.sleep(0.5)
    assert not log or log.stat().st_size == size
