"""The walk's numbers are those of theta and theta_prime; a step by hand is Eq. 4."""
from types import SimpleNamespace

import pytest
from conftest import close, logp_at_end

from data import arithmetic, text
from data.tasks import Task, support
from experiments import byhand, walk
from meta import Inner, fast_layers, theta_prime

Q = arithmetic.parse("(3+5)*2-7")


@pytest.fixture
def inner(tiny):
    return Inner(tiny, fast_layers(tiny, "*.up,*.down"), alpha=0.3, tau=2.0).double()

def test_the_walk_shows_context_and_weights_after_every_state(tiny, inner):
    numbers = walk.walked(tiny, inner, Q)
    states = numbers["think"].split(";")
    assert not numbers["own"] and len(states) == 3 and states[-1] == "9"    # tiny knows nothing
    for i in range(4):
        context = logp_at_end(tiny, text.prompt(Q.text, ";".join(states[:i])))
        moved = theta_prime(tiny, inner, support([Task(Q, states[:i], [Q])])) if i else {}
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
    inner = Inner(tiny, ["1.up"], alpha=0.3, tau=2.0).double()
    runs = SimpleNamespace(meta=lambda: (tiny, inner, None))
    numbers = byhand.measure(SimpleNamespace(ask=Q.text, meta="tiny"), runs)
    assert numbers["off"] < 1e-12 and len(numbers["lines"]) <= 45
    assert max(numbers["far"]) > 1e-6             # and it was a step
    assert byhand.draw(numbers).axes
