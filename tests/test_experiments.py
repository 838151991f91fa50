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
from experiments import (arms, curve, delimiter, explicit, generalize, gradient, landscape, length,
                         methods, order, patch, prune, race, speed, support, tokens)
from lab import page
from lab.run import ROOT
from lab.verdict import decide
from model import Config, Model

RNG = np.random.default_rng(0)


def near(centre, *shape):
    """200 numbers, or as many as `shape` says, around a centre."""
    return centre + 0.1 * RNG.normal(size=shape or (200,))

def steady(centre):
    return np.full(200, centre)


# -------------------------------------------------------------------- every criterion, either way

FALL = {"correct": near(2), "wrong": near(-1), "filler": near(0)}
COSINE = {"trained": near(0.3), "shuffled": near(0), "untrained": near(0.1)}
ERRORS = {"float32": steady(1e-6), "float64": steady(1e-14), "float64, one theta'": steady(1e-13),
          "unpatched": near(9), "other": near(9)}
LOSS = {"without": (near(2), near(3)), "context": (near(0), near(1)), "other": (near(5), near(5))}
RIGHT = {"oracle short": near(0.9), "own": near(0.9), "least change": near(0.8),
         "random": near(0.4), "least change, cut": near(0.5), "random, cut": near(0.2)}
KINDS = [["W", "x"]] * 50 + [["x", "x"]] * 49


def falls_at_w(fall):
    """Curves of KINDS whose loss changes by `fall` at a W, and by 1 elsewhere."""
    curves = []
    for kinds in KINDS:
        first = fall if kinds[0] == "W" else -1
        curves.append(np.cumsum([5, first, -1]) + near(0, 3))
    return {"W": tokens.beyond_others(curves, KINDS, "W")}

CRITERIA = {                                # {what: (margins for the claim, margins against it)}
    "patch": (patch.margins(ERRORS),
              patch.margins(ERRORS | {"float32": abs(near(1)), "float64": abs(near(1))})),
    "gradient, aligned": (gradient.margins_aligned(COSINE),
                          gradient.margins_aligned(COSINE | {"untrained": near(0.5)})),
    "gradient, a step": (gradient.margins_step({"trained": near(0.9)}),
                         gradient.margins_step({"trained": near(0.1)})),
    "curve, direction": (curve.direction(FALL), curve.direction(FALL | {"filler": near(3)})),
    "curve, progressive": (curve.progressive(near(-0.8), near(0.2)),
                           curve.progressive(near(-0.8), near(0.9))),
    "landscape": (landscape.margins(LOSS),
                  landscape.margins(LOSS | {"context": (near(0), near(4))})),
    "tokens": (falls_at_w(-2), falls_at_w(1)),
    "delimiter": (delimiter.margins(near(1), near(2), near(0.2), near(0.9)),
                  delimiter.margins(near(2), near(1), near(0.2), near(0.9))),
    "prune": (prune.margins(RIGHT),
              prune.margins(RIGHT | {"least change, cut": near(0.2), "random, cut": near(0.5)}))}


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_can_go_either_way(name):
    good, bad = CRITERIA[name]
    assert decide(good)[0] == "supported"
    assert decide(bad)[0] == "refuted"

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


def made_up(names, level, metrics=("exact", "mg")):
    """{arm: Arm} with every metric of an arm near level(arm)."""
    return {name: arms.Arm({m: near(level(name), 5, 100) for m in metrics}, {"checksums": [""]})
            for name in names}

ORDER = ("weights", "weights, cut", "theta", "context, cut")

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
    levels = {"MAML": 0.9, "no inner loop": 0.6, "no inner loop, as many steps": 0.6}
    names = list(order.ARMS)
    good = made_up(names, lambda name: levels.get(name, 0.2), ORDER)
    assert order.judge(good)[0] == "in the weights: supported; in context: supported"
    bad = made_up(names, lambda name: 1 - levels.get(name, 0.2), ORDER)
    assert order.judge(bad)[0] == "in the weights: refuted; in context: refuted"

def test_support_can_go_either_way():
    sft = dict(zip(support.SFT, (0.1, 0.4, 0.8, 0.9, 0.2)))
    grpo = dict(zip(support.GRPO, (0.8, 0.5, 0.3, 0.9, 0.6, 0.6)))
    raw = {"SFT": made_up(sft, sft.get), "GRPO": made_up(grpo, grpo.get)}
    verdict, _ = support.judge(raw)
    assert verdict == ("Fig. 8: supported; Fig. 8 at as many trajectories: refuted; "
                       "Fig. 9: supported")

def test_race_can_go_either_way():
    def runs(ours, theirs, reached=True):
        rows = {name: {"seconds": [theirs] * 3, "reached": [True] * 3} for name in race.ARMS}
        rows["ours"] = {"seconds": [ours] * 3, "reached": [reached] * 3}
        return race.judge(rows)[0]
    assert runs(10, 40) == "supported"
    assert runs(10, 20) == "refuted"
    assert runs(10, 40, reached=False) == "inconclusive"


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

def test_every_token_has_a_kind():
    kinds = ["operand", "operator", "operand", "operator", "slip", *["W"] * 6, "end", "operand",
             "operator", "operand", "operator", "result", "result"]
    assert tokens.kinds_of("3+5=9W3+5=8;8*2=16") == kinds

def test_increments_equal_those_of_the_matrices_written_out(tiny):
    """One question, patches as matrices of every position's own, autograd at the patched
    weights."""
    q, t, i = arithmetic.parse("(3+5)*2-7"), "3+5=8;8*2=16;16-7=9", 7
    got = gradient.increments(tiny, [q], [t], [i])
    ids = analyze.as_ids([q], [t])
    now, then = (written_out(analyze.exact_patches(tiny, *ids, [j], bias=True).patches)
                 for j in (i, i + 1))
    own = {name: m.clone().requires_grad_() for name, m in now.items()}     # (n, out, in)
    rows = analyze.layout(tiny, *ids)

    def hook(name, x, y):
        if name not in own:
            return y
        z = x[:, -rows.n:]
        if own[name].size(-1) == 1:
            z = torch.ones(1, rows.n, 1, dtype=x.dtype)
        return torch.cat((y[:, :-rows.n], y[:, -rows.n:]
                          + torch.einsum("bti,toi->bto", z, own[name])), 1)

    mask = rows.mask(rows.nothing())
    h = tiny(rows.ids, pos=rows.pos, mask=mask, hook=hook)[:, -rows.n:]
    loss = tiny.score(h, torch.tensor([ids[2][0][1:]])).sum()
    grads = dict(zip(own, torch.autograd.grad(loss, list(own.values()))))
    steps = {name: then[name] - now[name] for name in own}
    for name in own:
        assert got[name] == pytest.approx(cosine([-grads[name]], [steps[name]]), abs=1e-8)
    down = [-g for g in grads.values()]
    assert got["all"] == pytest.approx(cosine(down, list(steps.values())), abs=1e-8)

def written_out(patches):
    """{layer: (p, z)} of one row -> {layer: matrices (n, out, in)}"""
    return {name: p[0, :, :, None] * z[0, :, None, :] / z[0].square().sum(-1)[:, None, None]
            for name, (p, z) in patches.items()}

def cosine(a, b):
    a, b = (torch.cat([m.flatten() for m in side]) for side in (a, b))
    return float(torch.cosine_similarity(a, b, 0))

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

def test_compare_trains_what_is_missing_and_pairs_the_same_questions(tmp_path, capsys):
    first = f"{SMALL} --steps=2"
    arm_flags = [first, f"{first} | meta.py --batch=2 --steps=1", f"{first} "]
    numbers = run_compare(tmp_path, arm_flags)["numbers"]
    assert set(numbers["arms"][arm_flags[1]]["scores"]) == set(arms.METRICS)
    assert len(list(tmp_path.glob("runs/*/*/summary.json"))) == 4      # stages are shared
    same = [gap for name, gap in numbers["gaps"].items() if name.startswith(f"{first}  - ")]
    assert same and all(gap == [0, 0, 0] for gap in same)

    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/*/ckpt.pt")}
    run_compare(tmp_path, arm_flags)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/*/ckpt.pt")}

def test_a_run_scored_before_is_scored_anew_once_its_weights_have_changed(tmp_path):
    def kept():
        path, = tmp_path.glob("runs/*/0/compare.json")
        return json.loads(path.read_text())
    arm_flags = [f"{SMALL} --steps=2", f"{SMALL} --steps=2 "]
    run_compare(tmp_path, arm_flags)
    assert len(kept()) == 1
    checkpoint, = tmp_path.glob("runs/*/0/ckpt.pt")
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["weights"]["head.weight"] += 1
    torch.save(state, checkpoint)
    run_compare(tmp_path, arm_flags)
    assert len(kept()) == 2

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
    c = analyze.Analyze()
    for module in (race, methods, length, generalize):
        for flags in module.ARMS.values():
            for stage in arms.stages(c, flags, 0):
                stage.parse()
    for flags in (*support.SFT.values(), *support.GRPO.values()):
        for stage in arms.stages(c, flags, 0):
            stage.parse()
    for flags in order.ARMS.values():
        arms.stages(c, f"meta.py {flags}", 0)[0].parse()
