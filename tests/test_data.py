"""Questions, trajectories, splits, encoding, batches."""
import itertools
import random

import pytest
import torch

from data import arithmetic as A
from data import text

ALL = [(d, k) for d in A.OOD for k in (*A.TRAINED.get(d, ()), *A.OOD[d])]
part_of = lambda d, k: "train" if k in A.TRAINED.get(d, ()) else "ood"


@pytest.mark.parametrize("domain,k", ALL)
def test_every_trajectory_passes_its_checker_and_every_corrupted_one_fails(domain, k):
    rng = random.Random(k)
    for _ in range(150):
        q = A.draw(rng, domain, k, part_of(domain, k))
        assert q.operands == k and A.parse(q.text).answer == q.answer and A.verify(q, q.answer)
        for style in ("long", "short", "reflect"):
            steps, implied = A.steps(q, rng, style)
            assert implied == q.answer and steps[-1].endswith(f"={q.answer}")
            assert all(A.check(q, ";".join(steps))), (q.text, style, steps)
            assert style != "long" or len(steps) == k - 1
        at = rng.randrange(k - 1)
        found = A.corrupt(q, rng, at)
        if found:
            steps, implied = found
            verdicts = A.check(q, ";".join(steps))
            assert not any(verdicts[at:]) and implied != q.answer and steps[-1].endswith(f"={implied}")
            assert all(verdicts[:at])


def test_reference_arithmetic():
    """The trajectory's values against an independent reading of the question's text (Python's own parser, in a test only)."""
    rng = random.Random(1)
    for domain, k in ALL:
        for _ in range(50):
            q = A.draw(rng, domain, k, part_of(domain, k))
            left = q.text.removesuffix("%97")
            assert set(left) <= set("0123456789+-*()")
            assert int(q.answer) == (eval(left) % 97 if domain == "modsum" else eval(left))


def test_expr_values_stay_within_two_digits():
    rng = random.Random(2)
    for _ in range(2000):
        q = A.draw(rng, "expr", rng.choice((3, 4)))
        assert all(0 <= int(s.split("=")[1]) <= 99 for s in A.steps(q, rng)[0])


def test_splits_are_disjoint_up_to_commuting():
    """100,000 draws, three seeds: no canonical form in two splits; and any order of the operands lands in the same one."""
    seen, rngs = {}, [random.Random(s) for s in (0, 1, 2)]
    for i in range(100_000):
        rng = rngs[i % 3]
        domain = rng.choice(list(A.OOD))
        k = rng.choice((*A.TRAINED.get(domain, ()), *A.OOD[domain]))
        part = rng.choice(("train", "train", "val", "test")) if k in A.TRAINED.get(domain, ()) else "ood"
        q = A.draw(rng, domain, k, part)
        form = A.canonical(q) if domain != "diff" else "diff " + q.text
        assert seen.setdefault(form, part) == part
    assert {"train", "val", "test", "ood"} == set(seen.values())
    for order in itertools.permutations((3, 14, 15, 9)):
        assert A.split(A.question("sum", order)) == A.split(A.question("sum", (3, 14, 15, 9)))
    flip = lambda n: n if isinstance(n, int) else (n[0], *((flip(n[2]), flip(n[1])) if n[0] != "-" else (flip(n[1]), flip(n[2]))))
    for _ in range(500):
        q = A.draw(rngs[0], "expr", 4)
        assert A.canonical(q) == A.canonical(A.question("expr", flip(q.state)))


def test_sum_of_five_has_32_distinct_trajectories():
    rng = random.Random(3)
    for _ in range(30):
        q = A.draw(rng, "sum", 5)
        found = A.distinct(q, rng, 32)
        assert len({";".join(t) for t in found}) == 32 and all(all(A.check(q, ";".join(t))) for t in found)
    with pytest.raises(ValueError, match="distinct"):
        A.distinct(A.draw(rng, "sum", 2), rng, 2)


@pytest.mark.parametrize("bad", ["", "  ", "3", "3+x", "3++5", "(3+5", "3+5)", "3/5", "²+3", "٣+1", "9999+1", "3-5", "99*99", "2**3",
                                 "3+5%96", "3*5%97", "%97", "1+" * 60 + "1", "(" * 5000, "1+1+1+1+1+1+1+1+1"])
def test_bad_questions_are_refused_with_a_reason(bad):
    with pytest.raises(ValueError):
        A.parse(bad)


def test_questions_in_ordinary_notation():
    assert A.parse("(3+5)*2-7").text == "((3+5)*2)-7" and A.parse("3+5*2").text == "3+(5*2)"
    assert A.parse(" 12 + 7+30 ").domain == "sum" and A.parse("45+88%97").answer == "36" and A.parse("90-12-5").domain == "diff"


@pytest.mark.parametrize("bad", ["", "08", "-1", "1000", "9**9", "٣", "1 ", "1e2", "0x1", "nine", "²"])
def test_verifier_takes_plain_digits_only(bad):
    assert A.number(bad) is None


def test_encoding_round_trip_and_unknown_characters():
    rng = random.Random(4)
    for domain, k in ALL:
        q = A.draw(rng, domain, k, part_of(domain, k))
        t = ";".join(A.steps(q, rng, "reflect")[0])
        assert text.decode(text.encode(t)) == t and len(text.encode(t)) == len(t)
    with pytest.raises(ValueError, match="'x'"):
        text.encode("3x5")


def test_batches_teach_exactly_what_their_examples_say():
    rng, mix = random.Random(5), text.Mix()
    kinds = set()
    for _ in range(300):
        e = mix.sample(rng)
        b = text.batch([e])
        learned = text.decode([i for i in b.targets[0].tolist() if i >= 0])
        full = f"{e.think}</think>{e.answer}<eos>"
        assert learned == {"all": full, "cut": f"{e.think}{e.answer}<eos>", "answer": f"{e.answer}<eos>"}[e.learn]
        assert text.decode(b.ids[b.sample > 0].tolist()) == f"<bos>{e.question}<think>{full}".removesuffix("<eos>")
        kinds.add(e.learn)
    assert kinds == {"all", "cut", "answer"}


def test_batch_is_a_function_of_seed_and_step_and_packing_keeps_every_sample_once():
    mix, rng = text.Mix(), random.Random("0/7")
    a, b = (text.batch_at(7, 64, mix, 0) for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip(a, b)) and not torch.equal(a.ids[:20], text.batch_at(8, 64, mix, 0).ids[:20])
    alone = [text.batch([mix.sample(rng)], room=1) for _ in range(64)]
    triples = lambda b: [tuple(map(tuple, (b.ids[r][m].tolist(), b.targets[r][m].tolist(), b.pos[r][m].tolist())))
                         for r in range(len(b.ids)) for n in range(1, int(b.sample[r].max()) + 1) for m in [b.sample[r] == n]]
    assert sorted(triples(a)) == sorted(t for b in alone for t in triples(b)) and (a.sample > 0).float().mean() > 0.85
    assert (a.ids[a.sample == 0] == text.PAD).all() and (a.targets[a.sample == 0] == text.IGNORE).all()


def test_packed_samples_do_not_see_each_other(tiny):
    """Loss and gradients of a packed batch are those of its samples, one at a time."""
    rng, mix = random.Random(3), text.Mix()
    examples = [mix.sample(rng) for _ in range(12)]
    def gradients(batches):
        total = sum(tiny.nll(b.ids, b.targets, pos=b.pos, mask=b.mask()).sum() for b in batches)
        return torch.autograd.grad(total, list(tiny.parameters()))
    packed = text.batch(examples)
    assert len(packed.ids) < 12
    for g, h in zip(gradients([packed]), gradients([text.batch([e], room=1) for e in examples])):
        torch.testing.assert_close(g, h, rtol=0, atol=1e-12)
