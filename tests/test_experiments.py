"""Experiments: criteria on made-up data, constructions against slow paths, figures from JSON."""
import json
import random

import numpy as np
import pytest
import torch

import analyze
import experiments
import meta
from data import arithmetic, text
from data.tasks import Task, tensors
from experiments import (arms, curve, cuts, delimiter, explicit, further, generalize, gradient,
                         landscape, length, methods, order, patch, prune, race, readout, speed,
                         support, tokens)
from lab import page
from lab.run import ROOT
from lab.verdict import bootstrap, decide
from model import Config, Model

RNG = np.random.default_rng(0)


def near(centre, *shape):
    """200 numbers, or as many as `shape` says, around a centre."""
    return centre + 0.1 * RNG.normal(size=shape or (200,))

def steady(centre):
    return np.full(200, centre)


@pytest.fixture
def few_draws(monkeypatch):
    """A tenth of the bootstrap's draws, for margins that are wide."""
    monkeypatch.setattr(bootstrap, "__defaults__", (np.mean, 200, 0.95))


# -------------------------------------------------------------------- every criterion, either way

FALL = {"correct": near(2), "wrong": near(-1), "filler": near(0)}
ERRORS = {"float32": steady(1e-6), "float64": steady(1e-14), "float64, one theta'": steady(1e-13),
          "unpatched": near(9), "other": near(9)}

CRITERIA = {                                # {what: (margins for the claim, margins against it)}
    "patch": (patch.margins(ERRORS),
              patch.margins(ERRORS | {"float32": abs(near(1)), "float64": abs(near(1))})),
    "curve, direction": (curve.direction(FALL), curve.direction(FALL | {"filler": near(3)})),
    "curve, progressive": (curve.progressive(near(-0.8), near(0.3)),
                           curve.progressive(near(-0.8), near(0.9))),
    "cuts": (cuts.margins(near(-0.8, 5, 100), near(0.3, 5, 100)),
             cuts.margins(near(-0.8, 5, 100), near(0.9, 5, 100)))}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_can_go_either_way(name):
    good, bad = CRITERIA[name]
    assert decide(good)[0] == "supported"
    assert decide(bad)[0] == "refuted"



# ----------------------------------------------------------------- verdicts of several parts

THINK = "1+2=3;3+4=7;7+5=12"

def cell_of_steps(domain, *levels):
    """A cell of `curve` whose loss has these levels after whole steps of THINK, and along the other
    trajectories stays."""
    ends = [0, *(i for i, token in enumerate(THINK) if token == ";"), len(THINK)]
    falling = [np.interp(range(len(THINK) + 1), ends, levels) + near(0, 1) for _ in range(50)]
    curves = {kind: [np.full(2, levels[0]) + near(0, 2) for _ in falling] for kind in curve.KINDS}
    curves |= {"correct": falling, "implied": falling, "margin": falling}
    question = arithmetic.parse("1+2+4+5" + "%97" * (domain == "modsum"))
    return curve.Cell(4, [question] * 50, [THINK] * 50, curves)

def test_a_curve_is_read_at_the_ends_of_its_steps():
    assert curve.after_steps(THINK, np.arange(len(THINK) + 1)).tolist() == [0, 5, 11, 18]

def test_a_cliff_refutes_progress_in_any_domain_but_modsum(few_draws):
    slope, cliff = (3, 2, 1, 0), (3, 3, 3, 0)
    verdict, _ = curve.judge({"sum": cell_of_steps("sum", *slope),
                              "modsum": cell_of_steps("modsum", *cliff)})
    assert verdict == "direction: supported; progressive: supported"
    verdict, numbers = curve.judge({"sum": cell_of_steps("sum", *cliff),
                                    "modsum": cell_of_steps("modsum", *slope)})
    assert verdict == "direction: supported; progressive: refuted"
    assert numbers["modsum"]["progressive, kept apart"]["verdict"] == "supported"
    assert curve.draw(numbers)
    verdict, _ = curve.judge({"modsum": cell_of_steps("modsum", *slope)})
    assert verdict == "direction: supported; progressive: not tested (modsum alone)"


def test_every_share_of_cuts_has_a_verdict_of_its_own():
    def arm(*levels):
        steps = np.array(levels) + 0.01 * near(0, 3, 60, len(levels))
        return cuts.Raw(steps, near(0.5, 3, 60), [""] * 3)
    flat = arm(3, 3, 3, 3)
    verdict, numbers = cuts.judge(("", dict(zip(cuts.ARMS, (arm(3, 3.1, 3.2, 0), flat,
                                                            arm(3, 2, 1, 0))))))
    assert verdict == "--cut=0: refuted; --cut=0.05: refuted; --cut=0.5: supported"
    assert numbers["arms"]["--cut=0.5"]["spearman_medians"] == [-1, -1, -1]
    assert cuts.draw(numbers)


def tokens_judged(at, reflects=True):
    """The verdict on 50 questions whose loss falls by at[kind] at a token of that kind."""
    kinds = ["operand", "result", "slip", "W", "W", "W"] * 10
    curves = [5 - np.cumsum([0, *(at[kind] for kind in kinds)]) + 0.01 * near(0, len(kinds) + 1)
              for _ in range(50)]
    verdict, numbers = tokens.judge(tokens.Raw("", curves, [kinds] * 50, reflects))
    assert tokens.draw(numbers)
    return dict(part.split(": ") for part in verdict.split("; "))

def test_results_are_held_against_other_tokens_on_both_sides():
    rest = {"slip": 0, "W": 0, "operand": 0}
    for fall, more, differ in ((1, "supported", "supported"), (-1, "refuted", "supported"),
                               (0, "inconclusive", "inconclusive")):
        found = tokens_judged(rest | {"result": fall}, reflects=False)
        assert (found["results lower it more"], found["roles differ"]) == (more, differ)
        assert found["reflection, net"].startswith("not tested")

def test_a_correction_that_only_mends_its_slip_gains_nothing():
    """W falls more than others in both; the net of slip and W decides."""
    level = {"operand": 0.5, "result": 0.5, "W": 1}
    assert tokens_judged(level | {"slip": 0})["reflection, net"] == "supported"
    assert tokens_judged(level | {"slip": -3})["reflection, net"] == "refuted"


def test_a_delimiter_is_judged_behind_place_0_and_before_the_last_result():
    """What stands at the other places is the other way round."""
    def places(first, early, late):
        return np.stack([near(first), near(early), near(early), near(late)], 1)
    early = places(0, 1, 0).round()
    on = places(0, 0.9, 0)
    good = delimiter.Raw("", places(2, 1, 9), near(1, 200, 4), places(1, 0.2, 1), on, early)
    bad = good._replace(loss=places(1, 2, 0), forced=places(0, 0.95, 0), on=places(1, 0.2, 1))
    verdict, numbers = delimiter.judge(good)
    assert verdict == ("momentum: not testable here; of use at once: supported; "
                       "early costs accuracy: supported")
    assert delimiter.judge(bad)[0] == verdict.replace("supported", "refuted")
    assert delimiter.early_in("3+5=8;8*2=16") == [False] + [True] * 7 + [False] * 3


def test_a_basin_has_a_verdict_at_every_radius():
    def rings(*levels):
        return np.stack([near(level) for level in levels])
    loss = {"without": rings(1, 2, 2, 2, 2), "context": rings(0, 0, 0.5, 1, 2),
            "other": rings(5, 9, 9, 11, 20)}
    raw = landscape.Raw(loss, "", {}, {})
    assert landscape.judge(raw)[0] == (
        "lower at theta: supported; wider at 0.1: supported; wider at 0.25: inconclusive; "
        "wider at 0.5: refuted; wider at 1: refuted")
    worse = landscape.judge(raw._replace(loss=loss | {"other": loss["context"] - 1}))[0]
    assert worse.startswith("lower at theta: refuted")
    flat = landscape.judge(raw._replace(loss=loss | {"other": rings(5, 4, 4, 4, 4)}))[0]
    assert flat.startswith("lower at theta: supported; wider at 0.1: refuted")

def test_relative_sharpness_is_a_rise_over_one_more_than_the_loss():
    L = np.array([[1.0, 0.0], [2.0, 0.5], [0.0, 3.0]])
    assert landscape.sharpness(L).tolist() == [[0.5, 0.5], [-0.5, 3.0]]


def pruned(styles, **better):
    """A Raw of `prune`, six parts with two slips; better: shares right, or slips deleted."""
    level = {"short": 0.9, "long": 0.9, "whole": 0.9, "least": 0.8, "random": 0.4,
             "least_cut": 0.5, "random_cut": 0.2, "found": 1.5} | better
    keys = {("whole", 6): "whole", ("long", 4): "long", ("short", 0): "short",
            ("least change", 4): "least", ("random", 4): "random",
            ("least change, cut", 4): "least_cut", ("random, cut", 4): "random_cut"}
    right = {key: near(level[name]) for key, name in keys.items()}
    spared = {key: near(0.7) for key in keys} | {("least change", 4): near(level["found"])}
    return prune.Raw("", styles, 6, 2, right, right, spared, dict.fromkeys(keys, 9.0))

def test_prune_can_go_either_way_in_every_part():
    verdict, numbers = prune.judge(pruned(["long", "short", "reflect"]))
    assert verdict.count("supported") == 4
    assert prune.draw(numbers)
    worse = pruned(["short", "reflect"], short=0.5, whole=1.3, least_cut=0.1, found=0.2)
    assert prune.judge(worse)[0].count("refuted") == 4

def test_what_a_run_never_saw_is_not_testable_on_it():
    verdict, numbers = prune.judge(pruned(["long"]))
    assert verdict == ("short equivalent: not testable here (never saw `short`); "
                       "slips can be spared: not testable here (never saw `reflect`); "
                       "least change finds slips: not testable here (never saw `reflect`); "
                       "least change beats random: supported")
    assert set(numbers["gaps"]) == {"least change beats random"}


# ------------------------------------------------------------------ verdicts on runs and arms

def test_explicit_is_judged_on_questions_beyond_their_trajectories():
    def pooled(theta, further, other, follows, wrong):
        shares = {"theta": theta, "further": further, "other": other, "implied": follows,
                  "wrong": wrong}
        rows = {name: [i < 200 * share for i in range(200)] for name, share in shares.items()}
        return {"further": {"theta": rows["theta"], "theta_prime": rows["further"]},
                "further_other": {"theta_prime": rows["other"]},
                "further_wrong": {"implied": rows["implied"], "theta_prime": rows["wrong"]}}
    assert explicit.decide_on(pooled(0.1, 0.9, 0.0, 0.7, 0.1))[0] == "supported"
    assert explicit.decide_on(pooled(0.1, 0.4, 0.0, 0.4, 0.1))[0] == "inconclusive"
    assert explicit.decide_on(pooled(0.5, 0.5, 0.0, 0.4, 0.1))[0] == "inconclusive"
    assert explicit.decide_on(pooled(0.5, 0.2, 0.0, 0.4, 0.1))[0] == "refuted"
    assert explicit.decide_on(pooled(0.1, 0.9, 0.0, 0.1, 0.7))[0] == "refuted"

def test_verdicts_on_several_models_are_counted_part_by_part():
    together = experiments.together
    assert together(["supported"]) == "supported"
    assert together(["supported", "refuted", "supported"]) == "supported in 2, refuted in 1 of 3"
    said = together(["a: yes; b: no", "a: yes; b: yes"])
    assert said == "a: yes in 2 of 2; b: no in 1, yes in 1 of 2"

def test_runs_of_two_kinds_are_looked_at_in_pairs(exits):
    c = analyze.Analyze(sft="a,b", meta="x,y")
    pairs = [(one.sft, one.meta) for one in experiments.each_model(c, ("c", "model", "run"))]
    assert pairs == [("a", "x"), ("b", "y")]
    assert len(experiments.each_model(c, ("c",))) == 1
    c = analyze.Analyze(sft="a,b", meta="x")
    assert [one.sft for one in experiments.each_model(c, ("c", "model"))] == ["a", "b"]
    exits(["pairs"], experiments.each_model, c, ("c", "model", "run"))


def tokens_of(every, bias, slope=0.0, falls=(0.2, 0.35, 0.9), shares=None):
    """Four tokens of each of 100 questions, their cosines close to level + slope * fall."""
    fall = RNG.choice(falls, 400, p=shares)
    levels = zip(gradient.MEMBERS, (every, bias))
    cosine = {member: level + slope * fall + 0.3 * near(0, 400) for member, level in levels}
    return gradient.Tokens(np.arange(400) // 4, fall, cosine)

def judged_gradient(trained, control, **changes):
    found = {name: control for name in gradient.CONDITIONS} | {"trained": trained} | changes
    one_each = {member: {"another's gradient": near(0)} for member in gradient.MEMBERS}
    return gradient.judge(("", found, one_each))

def test_gradient_can_go_either_way(few_draws):
    low, middle, high = tokens_of(0, 0.1), tokens_of(0.3, 0.3), tokens_of(0.7, 0.8)
    assert judged_gradient(high, low)[0] == "aligned: supported; a gradient step: supported"
    assert judged_gradient(middle, low)[0] == "aligned: supported; a gradient step: refuted"
    assert judged_gradient(middle, high)[0] == "aligned: refuted; a gradient step: refuted"
    against_one = judged_gradient(middle, low, shuffled=high)
    assert against_one[0] == "aligned: refuted; a gradient step: refuted"

def test_gradient_is_decided_where_both_patches_agree(few_draws):
    low, one, other = tokens_of(0, 0), tokens_of(0.3, 0.8), tokens_of(-0.3, 0.3)
    verdict = judged_gradient(one, low)[0]
    assert verdict == "aligned: supported; a gradient step: inconclusive"
    assert judged_gradient(other, low)[0] == "aligned: inconclusive; a gradient step: refuted"

def test_gradient_is_not_testable_without_falls_to_compare(few_draws):
    low, high, flat = tokens_of(0, 0), tokens_of(0.7, 0.7), tokens_of(0, 0, falls=(0.0, 0.2))
    verdict, numbers = judged_gradient(high, low, shuffled=flat)
    assert verdict == "aligned: not testable here; a gradient step: supported"
    assert set(numbers["gaps"]["a gradient step"]) == set(gradient.MEMBERS)
    # Untrained models have no such falls and are looked at elsewhere: at the trained one's tokens.
    assert judged_gradient(high, low, untrained=flat)[0].startswith("aligned: supported")
    steep = tokens_of(0, 0, falls=(0.0, 3.0))               # falls, but no equal ones
    verdict, _ = judged_gradient(high, low, shuffled=steep)
    assert verdict.startswith("aligned: not testable here")
    nowhere = judged_gradient(flat, flat)[0]
    assert nowhere == "aligned: not testable here; a gradient step: not testable here"

def test_gradient_compares_conditions_at_equal_falls(few_draws):
    """Cosines that follow the fall alone: a condition of larger falls has larger ones, and is not
    ahead; a condition that follows it faster is. Falls that the other never has do not count."""
    falls, large, small = (0.2, 0.35, 0.9, 2.0), (0.1, 0.2, 0.4, 0.3), (0.1, 0.7, 0.2, 0)
    trained, control = (tokens_of(0, 0, 0.3, falls, shares) for shares in (large, small))
    verdict, numbers = judged_gradient(trained, control)
    assert not verdict.startswith("aligned: supported")
    for member in gradient.MEMBERS:
        means = numbers[member]["above 0.3 nats"]
        assert means["trained"][0] - means["shuffled"][0] > 0.05
        assert abs(numbers["gaps"]["aligned"][member]["above shuffled"][0]) < 0.025
    faster = tokens_of(0, 0, 0.5, falls, small)
    verdict, _ = judged_gradient(faster, trained, untrained=tokens_of(0, 0))
    assert verdict.startswith("aligned: supported")

def made_up(names, level, metrics=("exact", "mg")):
    """{arm: Arm} with every metric of an arm near level(arm)."""
    return {name: arms.Arm({m: near(level(name), 5, 100) for m in metrics}, {"checksums": [""]})
            for name in names}

ORDER = ("further", "further, theta", "weights, cut", "context, cut")

def test_methods_can_go_either_way():
    levels = {"base": 0.1, "GRPO": 0.3, "SFT": 0.6, "SFT, then GRPO": 0.8, "SFT, then DPO": 0.5,
              "pool: SFT": 0.3, "pool: SFT, longer": 0.4, "pool: SFT, then GRPO": 0.6}
    assert methods.judge(made_up(levels, levels.get))[0].count("supported") == 4
    worse = {name: 1 - level for name, level in levels.items()}
    assert methods.judge(made_up(worse, worse.get))[0].count("refuted") == 4

def test_length_can_go_either_way():
    levels = {"short": 0.2, "long": 0.8, "padded short": 0.3, "short, as many tokens": 0.4}
    def verdict(**changed):
        return length.judge(made_up(levels, {**levels, **changed}.get))[0]
    assert verdict() == "finer steps: supported; a token is a step: refuted"
    padded = verdict(**{"padded short": 0.7})
    assert padded == "finer steps: supported; a token is a step: supported"
    assert verdict(long=0.1).startswith("finer steps: refuted")

def test_generalize_can_go_either_way():
    levels = {"direct answers": 0.2, "base": 0.1, "SFT": 0.8, "GRPO": 0.5}
    good = made_up(levels, levels.get)
    bad = made_up(levels, {**levels, "SFT": 0}.get)
    floor = made_up(levels, lambda name: levels[name] / 20)
    verdict, _ = generalize.judge({"trained sizes": good, "new domain": bad, "longer": floor})
    assert verdict == ("trained sizes: supported; new domain: refuted; longer: not testable here")

def test_order_can_go_either_way():
    levels = {"MAML": 0.9, "no inner loop": 0.6}
    names = list(order.ARMS)
    good = made_up(names, lambda name: levels.get(name, 0.2), ORDER)
    assert order.judge(good)[0] == "in the weights: supported; in context: supported"
    bad = made_up(names, lambda name: 1 - levels.get(name, 0.2), ORDER)
    assert order.judge(bad)[0] == "in the weights: refuted; in context: refuted"

def test_support_can_go_either_way():
    sft = dict(zip(support.SFT, (0.1, 0.4, 0.8, 0.9, 0.2)))
    grpo = dict(zip(support.GRPO, (0.8, 0.5, 0.3, 0.9, 0.6, 0.6)))
    raw = {"SFT": made_up(sft, sft.get), "GRPO": made_up(grpo, grpo.get)}
    for name, arm in raw["GRPO"].items():
        arm.scores["mg"] = near(1 - grpo[name], 5, 100)
    verdict, _ = support.judge(raw)
    assert verdict == ("Fig. 8: supported; Fig. 8 at as many trajectories: refuted; "
                       "Fig. 9: supported; Fig. 9, mG-Pass@8: refuted")

def test_further_can_go_either_way():
    def judged(theta, theta_prime):
        metrics = {"further": theta_prime, "further, theta": theta, "theta": theta,
                   "weights, cut": theta_prime, "copied": 0}
        def made(names):
            return {name: arms.Arm({m: near(v, 5, 100) for m, v in metrics.items()},
                                   {"checksums": [""]}) for name in names}
        return further.judge((made(further.ARMS), made(further.MODSUM)))[0]
    assert judged(0.1, 0.9).count("supported") == 3
    assert judged(0.9, 0.1).count("refuted") == 3

def test_readout_can_go_either_way():
    def judged(theta, theta_prime):
        shares = {"theta": theta, "theta_prime": theta_prime, "other": theta}
        right = {name: {result: {0: np.zeros(200, bool), 1: np.arange(200) < 200 * share}
                        for result in readout.RESULTS} for name, share in shares.items()}
        best = {name: dict.fromkeys(readout.RESULTS, 1) for name in shares}
        return readout.judge((right, best))[0]
    for levels, verdict in (((0.1, 0.9), "supported"), ((0.9, 0.1), "refuted"),
                            ((0.5, 0.5), "inconclusive")):
        assert judged(*levels) == f"first result: {verdict}; last result: {verdict}"

def test_a_probe_reads_what_is_linearly_there_and_nothing_else():
    """Units that hold both digits among noise, and units of noise alone."""
    generator = torch.Generator().manual_seed(0)
    def sample(n):
        digits = torch.randint(0, 10, (n, 2), generator=generator)
        codes = torch.cat([torch.eye(10)[digits[:, d]] for d in (0, 1)], 1)
        noise = torch.randn(n, 2, 30, generator=generator)
        held = torch.cat((codes, 0.1 * noise[:, 0, 20:]), 1)
        return digits, torch.stack((held, noise[:, 1]), 1)
    drawn = {part: sample(n) for part, n in (("train", 1000), ("val", 100), ("test", 100))}
    units = {part: {0: x} for part, (_, x) in drawn.items()}
    labels = {part: digits for part, (digits, _) in drawn.items()}
    assert readout.probe(units, labels, 0, 0)["test"].mean() == 1
    assert readout.probe(units, labels, 0, 1)["test"].mean() < 0.1

def test_partial_results_are_read_where_their_bracket_closes():
    q = arithmetic.parse("9-((3+5)*1)")
    ids = text.decode(text.prompt(q.text, ""))
    places = [len("<bos>9-((3+5)") - len("<bos>") , len("<bos>9-((3+5)*1)") - len("<bos>")]
    assert ids.startswith("<bos>9-((3+5)*1)") and readout.brackets(q) == places
    less = arithmetic.part(q)
    held = readout.Sample([q], [""], [less], [])
    assert [readout.digits_of(held, j).tolist() for j in (0, 1)] == [[[0, 8]], [[0, 8]]]

def test_race_can_go_either_way():
    def runs(theirs, best, reached=True):
        rows = {name: {"seconds": [theirs] * 3, "reached": [True] * 3} for name in race.ARMS}
        rows["nanoGPT's at a better rate"]["seconds"] = [best] * 3
        rows["ours"] = {"seconds": [10] * 3, "reached": [reached] * 3}
        return race.judge(rows)[0]
    assert runs(40, 21) == "supported"
    assert runs(40, 19) == runs(19, 40) == "refuted"
    assert runs(40, 21, reached=False) == "inconclusive"


# -------------------------------------------------------------------- constructions, slow paths

def test_proposition_2_1_fails_as_printed_and_holds_repaired():
    errors = patch.proposition(n=50)
    assert np.median(errors["printed"]) > 0.5
    assert np.median(errors["direction mended"]) > 0.5
    assert max(errors["rank-1 repair"]) < 1e-9

@pytest.mark.parametrize("silent", (False, True))
def test_one_theta_prime_does_for_the_whole_row_what_the_trajectory_does(silent):
    """With hidden units that never fire as well."""
    torch.manual_seed(0)
    model = analyze.untrained(Model(Config(text.VOCAB, layers=2, heads=2, width=64))).double()
    if silent:
        with torch.no_grad():
            model.blocks[0].up.weight.zero_()
    questions = [arithmetic.parse(q) for q in ("(3+5)*2-7", "2+3+4+5+6")]
    ids = analyze.as_ids(questions, ["3+5=8;8*2=16;16-7=9", "2+3=5;5+4=9"])
    found = analyze.exact_patches(model, *ids)
    logits = patch.one_theta_prime(model, *ids)
    assert patch.largest(found.plain, found.full, found.valid).min() > 1e-2
    assert patch.largest(logits, found.full, found.valid).max() < 1e-11

def test_patches_that_do_not_exist_have_no_norm(tiny):
    with torch.no_grad():
        tiny.blocks[1].up.weight.zero_()
    ids = analyze.as_ids([arithmetic.parse("3+5")] * 2, ["3+5=8", "5+3=8"])
    sizes, silent, _ = patch.at_the_delimiter(tiny, analyze.exact_patches(tiny, *ids).patches)
    assert silent["1.down"].all() and len(sizes["1.down"]) == 0
    assert not silent["2.down"].any() and len(sizes["2.down"]) == 2

def test_an_inner_loss_heeds_the_tokens_it_is_told_to(tiny):
    """All of them: theta' as ever; none: theta; and one alone moves as if it stood alone."""
    inner = meta.Inner(meta.fast_layers(tiny, "*.up,*.down"), alpha=3.0, tau=3.0).double()
    qs = [arithmetic.parse(q) for q in ("(3+5)*2", "9-4", "2+3+4")]
    thinks = ["3+5=8;8*2=16", "9-4=5", "2+3=5;5+4=9"]
    for heed, where in ((True, "theta_prime"), (False, "theta")):
        told = explicit.heeding(inner, [heed] * text.VOCAB)
        said = meta.answers(tiny, qs, thinks, told)
        assert said == meta.answers(tiny, qs, thinks, inner, where)
    closing = explicit.heeding(inner, [i == text.END_THINK for i in range(text.VOCAB)])
    support, _ = tensors([Task(qs[0], thinks[:1])])
    h = tiny(support.ids)
    alone = support.inner.masked_fill(support.inner != text.END_THINK, text.IGNORE)
    torch.testing.assert_close(closing.loss(tiny, h, support.inner), inner.loss(tiny, h, alone))

def test_a_ring_is_eight_points_of_every_plane(tiny):
    """Their mean loss is that of `surface`, where every row carries its own point."""
    asked = analyze.queries(tiny, [arithmetic.parse(q) for q in ("3+5", "9-4")], ["3+5=8", ""])
    planes = [analyze.directions(tiny, seed) for seed in (0, 1)]
    rings = landscape.around(tiny, planes, *asked)
    angles = torch.arange(8) * torch.pi / 4
    circle = torch.stack((angles.cos(), angles.sin()), 1).double()
    ids, targets = (v.repeat_interleave(8, 0) for v in asked)
    for radius, ring in zip(landscape.RADII, rings[1:]):
        points = (radius * circle).repeat(2, 1)
        slow = [analyze.surface(tiny, ids, targets, plane, points) for plane in planes]
        expected = torch.stack(slow).mean(0).view(2, 8).mean(1)
        np.testing.assert_allclose(ring, expected, atol=1e-7)
    np.testing.assert_allclose(rings[0], analyze.row_loss(tiny, *asked).detach(), atol=1e-12)

def test_a_trajectory_is_its_parts_and_loses_them_one_by_one():
    t = "3+5=9W3+5=8;8*2=16"
    parts = prune.parts_of(t)
    assert parts == ["3+5=9W", "3+5=8;", "8*2=16"]
    assert prune.joined(parts) == t and prune.joined(parts[:2]) == "3+5=9W3+5=8"
    y = np.zeros(len(t) + 1)
    y[6], y[12] = 5, 4                      # behind the W, behind the `;`
    assert prune.changes(parts, y).tolist() == [5, 1, 4]
    for n in (0, 1, 2):
        q = arithmetic.parse("2+3+4+5+6")
        assert prune.with_slips(q, random.Random(n), n).count("W") == n

def test_the_part_with_the_least_change_is_deleted_first(monkeypatch):
    """A loss that knows what every part is worth; measured again after every deletion."""
    worth = {"2+3=5": 3, "5+4=9": 1, "9+6=15": 2}

    def curves(model, questions, thinks):
        rows = []
        for t in thinks:
            falls = [worth.get(part, 0) for part in t.split(";")]
            ends = np.cumsum([0, *(len(part) + 1 for part in t.split(";"))])
            rows.append(np.interp(range(len(t) + 1), ends, 9 - np.cumsum([0, *falls])))
        return rows
    monkeypatch.setattr(prune, "curves_of", curves)
    whole = prune.parts_of("2+3=5;5+4=9;9+6=15")
    ways = prune.shortened(None, [None], [whole], random.Random(0))
    assert [ways["least change", k] for k in (3, 2, 1, 0)] == [
        ["2+3=5;5+4=9;9+6=15"], ["2+3=5;9+6=15"], ["2+3=5"], [""]]
    assert [ways["last", k] for k in (2, 1)] == [["2+3=5;5+4=9"], ["2+3=5"]]
    assert all(ways["random", k][0].count("=") == k for k in range(4))

def test_every_token_has_a_kind():
    kinds = ["operand", "operator", "operand", "operator", "slip", *["W"] * 6, "end", "operand",
             "operator", "operand", "operator", "last", "last"]
    assert tokens.kinds_of("3+5=9W3+5=8;8*2=16") == kinds
    assert tokens.kinds_of("3+5=8;8*2=15W8*2=16")[4:6] == ["result", "end"]
    assert tokens.kinds_of("3+5=8;8*2=15W8*2=16")[-6:] == ["W"] * 6

# Two trajectories of different lengths, answers of one digit and two, a token in their middle.
GRADIENT = (("1+2", "1+2=3", 2), ("(3+5)*2-4", "3+5=8;8*2=16;16-4=12", 7))

def gradient_trials():
    questions = [arithmetic.parse(q) for q, _, _ in GRADIENT]
    return questions, [t for _, t, _ in GRADIENT]

def test_at_the_patched_weights_an_answer_has_the_loss_behind_its_prefix(tiny):
    """Of `prefix_nll`, to rounding, for both patches; and that is what falls."""
    questions, thinks = gradient_trials()
    ids = analyze.as_ids(questions, thinks)
    rows = gradient.branches(tiny, *ids)
    _, outputs, nll, _ = gradient.at_patched(tiny, rows, *ids)
    bias = {"2.down": gradient.last_bias(tiny, rows, outputs)}
    h, _ = gradient.without_trajectory(tiny, rows, bias)
    targets = text.padded([tail[1:] for tail in ids[2]], text.IGNORE)
    again = tiny.score(h, targets.repeat(1, len(thinks[1]) + 1)).detach()

    curves = analyze.prefix_nll(tiny, *ids)
    table = gradient.increments(tiny, questions, thinks)
    for row, L_hat in enumerate(curves):
        for found in (nll, again):
            losses = rows.by_copy(found)[row].sum(-1) / (len(ids[2][row]) - 1)
            np.testing.assert_allclose(losses[:len(L_hat)], L_hat, rtol=0, atol=1e-10)
        np.testing.assert_allclose(table[row][0], -np.diff(L_hat), rtol=0, atol=1e-10)
        assert np.ptp(L_hat) > 1e-3

@pytest.mark.parametrize("row", (0, 1))
def test_increments_equal_those_of_the_matrices_written_out(tiny, row):
    """One token of one question alone, patches as matrices of every position's own, autograd at the
    patched weights; and the bias as a difference of residuals."""
    _, every, single = gradient.increments(tiny, *gradient_trials())[row]
    q, t, i = GRADIENT[row]
    prefixes = [analyze.as_ids([arithmetic.parse(q)], [t[:n]]) for n in (i, i + 1)]
    now, then = (written_out(analyze.exact_patches(tiny, *ids, bias=True).patches)
                 for ids in prefixes)
    own = {name: m.clone().requires_grad_() for name, m in now.items()}     # (n, out, in)
    gradients = gradients_of(tiny, prefixes[0], own)
    steps = [then[name] - now[name] for name in own]
    assert every[i] == pytest.approx(cosine([-g for g in gradients], steps), abs=1e-8)

    before, after = (residual(tiny, ids, True) - residual(tiny, ids, False) for ids in prefixes)
    along = -gradients[-1][..., 0]
    assert single[i] == pytest.approx(cosine([along], [after - before]), abs=1e-8)

def gradients_of(model, ids, own):
    """Of one answer's summed NLL without its trajectory, at {layer: matrices (n, out, in)} of its
    positions' own, in: 1 for a bias."""
    rows = analyze.layout(model, *ids)

    def hook(name, x, y):
        if name not in own:
            return y
        z = x[:, -rows.n:]
        if own[name].size(-1) == 1:
            z = torch.ones_like(z[..., :1])
        change = torch.einsum("bti,toi->bto", z, own[name])
        return torch.cat((y[:, :-rows.n], y[:, -rows.n:] + change), 1)

    mask = rows.mask(rows.nothing())
    h = model(rows.ids, pos=rows.pos, mask=mask, hook=hook)[:, -rows.n:]
    loss = model.score(h, torch.tensor([ids[2][0][1:]])).sum()
    return torch.autograd.grad(loss, list(own.values()))

def residual(model, ids, with_trajectory):
    """What leaves the last block at the answer (n, C), at its place behind the trajectory."""
    rows, left = analyze.layout(model, *ids), []
    seen = torch.tensor([len(ids[1][0]) if with_trajectory else 0])
    watch = model.norm.register_forward_pre_hook(lambda _, x: left.append(x[0].detach()))
    model(rows.ids, pos=rows.pos, mask=rows.mask(seen))
    watch.remove()
    return left[0][0, -rows.n:]

def written_out(patches):
    """{layer: (p, z)} of one row -> {layer: matrices (n, out, in)}"""
    return {name: p[0, :, :, None] * z[0, :, None, :] / z[0].square().sum(-1)[:, None, None]
            for name, (p, z) in patches.items()}

def cosine(a, b):
    a, b = (torch.cat([m.flatten() for m in side]) for side in (a, b))
    return float(torch.cosine_similarity(a, b, 0))

def test_yardsticks_are_the_cosines_of_gradients_written_out(tiny):
    """Of the same matrices at all positions of an answer."""
    questions = [arithmetic.parse(q) for q in ("1+2", "(3+5)*2-4", "9-4")]
    shapes = {}
    for k, block in enumerate(tiny.blocks):
        shapes |= {f"{k}.up": block.up.weight.shape, f"{k}.down": (16, 1)}
    every, single = [], []
    for q in questions:
        ids = analyze.as_ids([q], [""])
        zeros = {name: torch.zeros(len(ids[2][0]) - 1, *shape, dtype=torch.float64).requires_grad_()
                 for name, shape in shapes.items()}
        gradients = [g.sum(0).flatten() for g in gradients_of(tiny, ids, zeros)]
        every.append(torch.cat(gradients))
        single.append(gradients[-1])
    got = gradient.yardsticks(tiny, questions)
    for member, g in zip(gradient.MEMBERS, (every, single)):
        for k, name in enumerate(gradient.YARDSTICKS):
            first = cosine([g[0]], [g[1]]), cosine([g[0]], [g[2]])
            expected = np.mean(first) if k == 0 else cosine([g[0]], [g[1] + g[2]])
            assert got[member][name][0] == pytest.approx(expected, abs=1e-8)

def test_the_slow_side_of_the_benchmark_computes_the_same_meta_gradient(tiny):
    """A loop over questions against the dual form, on tasks of unequal lengths; and first order is
    another gradient."""
    inner = meta.Inner(meta.fast_layers(tiny, "*.up,*.down"), alpha=0.05, tau=3.0).double()
    questions = [arithmetic.parse(text) for text in ("3+5", "12+7+30", "12+7+30+5", "9+8+2")]
    rng = random.Random(0)
    tasks = [Task(q, [arithmetic.trajectory(q, rng)]) for q in questions]
    dual, first = (flat(speed.meta_by_dual(tiny, inner, tasks, k)) for k in (2, 1))
    loop = flat(speed.meta_by_loop(tiny, inner, tasks))
    torch.testing.assert_close(dual, loop, rtol=1e-10, atol=1e-10)
    assert (dual - first).norm() > 1e-3 * dual.norm()

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])

def test_one_prefix_after_the_other_gives_the_curve_of_one_pass(tiny):
    head, t, tail = [1, 2, 3], [4, 5, 6, 7, 8], [10, 3, 11]
    fast, = analyze.prefix_nll(tiny, [head], [t], [tail])
    slow = speed.prefix_by_prefix(tiny, head, t, tail, size=4)
    np.testing.assert_allclose(slow, fast, atol=1e-12)


# ---------------------------------------------------------------------------- arms, pages, figures

SMALL = "--layers=1 --heads=2 --width=16 --batch=8 --questions=2"

def run_compare(tmp_path, arm_flags):
    c = analyze.Analyze(names=("compare",), arm=tuple(arm_flags), seeds=2, questions=3, threads=1,
                        device="cpu", out=str(tmp_path))
    return experiments.run("compare", c, torch.device("cpu"), {})

def test_compare_trains_and_scores_what_is_missing_or_has_changed(tmp_path, capsys):
    first = f"{SMALL} --steps=2"
    arm_flags = [first, f"{first} | meta.py --batch=2 --steps=1", f"{first} "]
    numbers = run_compare(tmp_path, arm_flags)["numbers"]
    assert set(numbers["arms"][arm_flags[1]]["scores"]) == set(arms.METRICS)
    assert len(list(tmp_path.glob("runs/*/*/summary.json"))) == 4      # stages are shared
    same = [gap for name, gap in numbers["gaps"].items() if name.startswith(f"{first}  - ")]
    assert same and all(gap == [0, 0, 0] for gap in same)

    changed, *others = tmp_path.glob("runs/*/*/compare.json")
    checkpoint = changed.with_name("ckpt.pt")
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["weights"]["head.weight"] += 1
    torch.save(state, checkpoint)
    before = written(tmp_path)
    run_compare(tmp_path, arm_flags)
    assert before == written(tmp_path)
    assert len(json.loads(changed.read_text())) == 2
    assert all(len(json.loads(path.read_text())) == 1 for path in others)

def written(folder):
    """When every checkpoint of a comparison was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/ckpt.pt")}

def test_an_arm_with_bad_flags_is_refused_before_anything_is_trained(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        run_compare(tmp_path, [f"{SMALL} --steps=2", "--stepz=3"])
    assert error.value.code == 2 and "--stepz" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


ASSETS = sorted((ROOT / "assets").glob("*.json"))

@pytest.mark.parametrize("path", ASSETS, ids=[path.stem for path in ASSETS])
def test_every_committed_figure_is_drawn_from_its_json_alone(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    experiments.draw(copy, json.loads(copy.read_text()))
    assert copy.with_suffix(".png").stat().st_size > 10_000
    assert path.with_suffix(".png").exists()

def test_the_results_page_is_what_its_generator_makes():
    assert (ROOT / "assets" / "README.md").read_text() == page.page(ROOT / "assets")

def test_every_experiment_has_its_four_parts():
    for name in experiments.known():
        module = __import__(f"experiments.{name}", fromlist=["x"])
        assert module.__doc__ and module.CLAIM
        assert callable(module.measure) and callable(module.judge) and callable(module.draw)

def test_patch_refuses_reduced_precision(tiny, capsys):
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(SystemExit) as error:
            patch.measure(analyze.Analyze(questions=3), tiny.float())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert error.value.code == 2 and "full float32" in capsys.readouterr().err

def test_an_arm_that_starts_from_other_weights_is_another_run(tmp_path):
    c, base = analyze.Analyze(out=str(tmp_path)), tmp_path / "base.pt"
    folders = []
    for content in (b"one", b"two", b"one"):
        base.write_bytes(content)
        folders.append(arms.stages(c, f"--init={base} --steps=2", 0)[0].folder)
    assert folders[0] != folders[1] and folders[0] == folders[2]

def test_the_page_says_where_its_figures_are_of_different_weights(tmp_path):
    result = {"experiment": "x", "claim": "c", "verdict": "v", "criterion": "", "numbers": {},
              "command": "", "config": {"questions": 1, "seeds": 1}, "revision": "", "seconds": 1}
    for name, digits in (("a", "1"), ("b", "1"), ("c", "2")):
        text = json.dumps({**result, "checkpoints": {"out/sft": digits}})
        (tmp_path / f"{name}.json").write_text(text)
    assert "`out/sft` had other weights" in page.page(tmp_path)
    (tmp_path / "c.json").unlink()
    assert "other weights" not in page.page(tmp_path)

def test_the_flags_of_every_named_arm_are_accepted():
    modules = (race, methods, length, generalize, cuts, order, support, further)
    c, tables = analyze.Analyze(), [further.MODSUM, *(module.ARMS for module in modules)]
    lines = [flags for table in tables for flags in table.values()]
    stages = {stage.folder: stage for flags in lines for stage in arms.stages(c, flags, 0)}
    for stage in stages.values():
        stage.parse()

