"""The instruments of the figures, the walk, a step by hand: against slow forms of the same."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import close, logp_at_end

import analyze
import meta
from data import arithmetic, text
from data.tasks import Task, support
from experiments import byhand, walk

Q = arithmetic.parse("(3+5)*2-7")
STEPS = ["(8*2)-7", "6-7", "9"]
THINK = ";".join(STEPS)


def inner_of(model):
    """An inner loop of two steps whose rates differ, so that a mix-up shows."""
    inner = meta.Inner(model, meta.fast_layers(model, "*.up,*.down"), 2, 0.1, 3.0).double()
    inner.log_alpha.data += torch.sin(5.0 * torch.arange(12)).view(-1, 2)
    return inner

def some_questions():
    rng = random.Random(0)
    questions = [Q, *(arithmetic.draw(rng, "expr", n, "test") for n in (3, 6, 5))]
    return questions, [THINK, *(arithmetic.trajectory(q, rng) for q in questions[1:])]

def loss_of(model, q, weights):
    """NLL of the answer without a trajectory: a plain row, weights given."""
    return -float(logp_at_end(model, text.prompt(q.text, ""), weights)[int(q.answer)].detach())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_pass_equals_every_prefix_one_at_a_time(tiny, dtype, tolerance):
    (questions, thinks), model = some_questions(), tiny.to(dtype)
    found = analyze.prefix_logp(model, questions, thinks, size=3)
    curves = analyze.curves_of(model, questions, thinks)
    for q, t, logp, curve in zip(questions, thinks, found, curves, strict=True):
        prompts = [text.prompt(q.text, t[:i]) for i in range(len(t) + 1)]
        slow = torch.stack([logp_at_end(model, ids)[:10] for ids in prompts]).detach()
        close(logp, slow, tolerance)
        close(curve, -slow[:, int(q.answer)], tolerance)
    assert analyze.at_states(np.arange(len(THINK) + 1), THINK).tolist() == [0, 7, 11, 13]

def test_explicit_curves_are_those_of_each_prefix_alone(tiny):
    """Weights written out for every number of states; also along another question's trajectory."""
    inner, (questions, thinks) = inner_of(tiny), some_questions()
    trajectories = [t.split(";") for t in thinks]
    for solved in (questions, questions[1:] + questions[:1]):
        curves = analyze.explicit_curves(tiny, inner, questions, trajectories, solved)
        for q, of, steps, curve in zip(questions, solved, trajectories, curves, strict=True):
            tasks = [Task(of, steps[:i], [q]) for i in range(1, len(steps) + 1)]
            moved = [meta.theta_prime(tiny, inner, support([task])) for task in tasks]
            close(curve, [loss_of(tiny, q, weights) for weights in ({}, *moved)])


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("kind", ("as it is", "silent", "untrained"))
def test_patched_weights_without_the_trajectory_give_the_logits_with_it(tiny, kind, bias):
    """To 1e-10, at `</think>` and after the answer, for rows of different lengths; and the patches
    do so again as a hook of their own."""
    model = analyze.untrained(tiny).double() if kind == "untrained" else tiny
    model.blocks[1].up.weight.data *= kind != "silent"
    questions, thinks = some_questions()
    found = analyze.exact_patches(model, questions, thinks, bias)
    assert (found.full - found.plain).abs().amax((1, 2)).min() > 1e-2
    close(found.patched, found.full)
    ids, mask = analyze.tails(model, questions, [""] * 4)
    h = model(ids, mask=mask, hook=analyze.patch_hook(found.patches))
    close(model.logits(h[:, -2:]).detach(), found.full)
    assert set(found.patches) == {f"{i}.{layer}" for i in range(3) for layer in ("up", "down")}
    assert found.patches["0.down"][1].size(-1) == (1 if bias else 64)
    for q, t, full, plain in zip(questions, thinks, found.full, found.plain):
        for logits, think in ((full, t), (plain, "")):
            ids = torch.tensor([[*text.prompt(q.text, think), int(q.answer)]])
            close(logits, model.logits(model(ids)[0, -2:]).detach())

def test_cosines_equal_those_of_the_matrices_written_out(tiny):
    """Of inner loops of two steps; the implicit update may follow another trajectory."""
    inner, other = inner_of(tiny), ["6-7", "9"]
    got = analyze.cosines(tiny, inner, [(Q, STEPS, STEPS), (Q, STEPS, other)])
    moved = meta.theta_prime(tiny, inner, support([Task(Q, STEPS, [Q])]))
    assert set(got) == set(inner.names)
    for i, steps in enumerate((STEPS, other)):
        found = analyze.exact_patches(tiny, [Q], [";".join(steps)])
        for name in inner.names:
            path = meta.linear_layers(tiny)[name]
            explicit = (moved[path] - tiny.get_parameter(path)).detach()
            p, z = found.patches[name]
            implicit = torch.outer(p[0, 0], z[0, 0])
            cosine = torch.cosine_similarity(explicit.flatten(), implicit.flatten(), 0)
            assert got[name][i] == pytest.approx(float(cosine), abs=1e-10)

def test_an_untrained_model_has_the_shape_and_no_weights_that_are_zero(tiny):
    for name, p in analyze.untrained(tiny).named_parameters():
        assert p.abs().min() > 0 and p.shape == tiny.get_parameter(name).shape


def test_the_walk_shows_context_and_weights_after_every_state(tiny):
    inner = inner_of(tiny)
    numbers = walk.walked(tiny, inner, Q)
    states = numbers["think"].split(";")
    assert not numbers["own"] and len(states) == 3 and states[-1] == "9"    # tiny knows nothing
    for i in range(4):
        context = logp_at_end(tiny, text.prompt(Q.text, ";".join(states[:i])))
        moved = meta.theta_prime(tiny, inner, support([Task(Q, states[:i], [Q])])) if i else {}
        close(numbers["logp"]["context"][i], context[:10].detach())
        close(numbers["logp"]["weights"][i], logp_at_end(tiny, text.prompt(Q.text, ""), moved)[:10])
    frames = walk.frames_of(numbers["think"])
    shown = [n for n, beyond in dict.fromkeys(frames) if not beyond]
    assert shown == [*range(len(numbers["think"]) + 1)] and frames[-1] == (shown[-1], "answered")
    text_lines = walk.show(numbers | {"which": "yours"})
    assert len(walk.draw(numbers).axes) == 3 and text_lines[-1].startswith("beyond: ")

def test_a_question_is_refused_in_a_line(exits):
    assert walk.question_of("3+5*2").text == "3+(5*2)"
    for ask, word in (("3+5", "operands"), ("1+2+3+4+5+6+7", "operands"), ("3+a-1", "'a'")):
        exits(["--ask=", word], walk.question_of, ask)

def test_a_step_by_hand_is_theta_prime(tiny):
    inner = meta.Inner(tiny, ["1.up"], alpha=0.3, tau=2.0).double()
    runs = SimpleNamespace(meta=lambda: (tiny, inner, None))
    numbers = byhand.measure(SimpleNamespace(ask=Q.text, meta="tiny"), runs)
    assert numbers["off"] < 1e-12 and len(numbers["lines"]) <= 45
    assert max(numbers["far"]) > 1e-6             # and it was a step
    assert byhand.draw(numbers).axes
