"""Questions, trajectories, splits, encoding, batches, and tasks as tensors."""
import itertools
import random

import pytest
import torch

from data import arithmetic, tasks, text
from data.arithmetic import parse
from lab.score import CELLS

ALL = [(domain, k) for domain, counts in CELLS.items() for k in counts]


def drawn(rng, domain, operands):
    """A training question, or one of a size that training never sees."""
    trained = operands in arithmetic.TRAINED.get(domain, ())
    return arithmetic.draw(rng, domain, operands, "train" if trained else "ood")


# ----------------------------------------------------------------------- questions, trajectories

@pytest.mark.parametrize("domain,k", ALL)
def test_every_trajectory_passes_its_checker(domain, k):
    """Every step of every style is right, and the last one ends at the question's answer."""
    rng = random.Random(k)
    for _ in range(150):
        q = drawn(rng, domain, k)
        assert q.operands == k
        assert parse(q.text).answer == q.answer
        assert arithmetic.verify(q, q.answer)
        for style in ("long", "short", "padded", "reflect"):
            steps, implied = arithmetic.steps(q, rng, style)
            assert implied == q.answer
            assert steps[-1].replace(".", "").endswith(f"={q.answer}")
            assert all(arithmetic.check(q, ";".join(steps))), (q.text, style, steps)
            if style == "padded" and "." in ";".join(steps):
                dotted, = (step for step in steps if "." in step)
                left, _, result = dotted.partition("=")
                assert sum(c in "+-*" for c in left) == 2 and result.startswith(".")
            if style == "long":
                assert len(steps) == k - 1


@pytest.mark.parametrize("domain,k", ALL)
def test_every_corrupted_trajectory_fails_from_its_wrong_step_on(domain, k):
    """Steps before the wrong one pass, none after it does, and it ends at a wrong answer."""
    rng, corrupted = random.Random(k), 0
    for _ in range(150):
        q, at = drawn(rng, domain, k), rng.randrange(k - 1)
        found = arithmetic.corrupt(q, rng, at)
        if found is None:
            continue
        corrupted += 1
        steps, implied = found
        verdicts = arithmetic.check(q, ";".join(steps))
        assert all(verdicts[:at])
        assert not any(verdicts[at:])
        assert implied != q.answer
        assert steps[-1].endswith(f"={implied}")
    assert corrupted > 140


@pytest.mark.parametrize("trajectory,verdicts", [
    ("3+5=8;8*2=16;16-7=9", [True, True, True]), ("3+5=8;8*2=16", [True, False]),
    ("(3+5)*2=16;16-7=9", [True, True]), ("8*2=16;16-7=9", [False, False]),
    ("3+5=9;9*2=18;18-7=11", [False, False, False]), ("3+5=9W3+5=8;8*2=16;16-7=9", [True] * 3),
    ("3+5=8W3+5=8;8*2=16", [False, False]), ("3+4=7W3+5=8;8*2=16", [False, False]),
    ("3+5=08", [False]), ("3+5", [False]), ("((3+5)*2)-7=9....", [False]), ("", [])])
def test_every_step_gets_the_verdict_that_it_deserves(trajectory, verdicts):
    """Unfinished, out of turn, a wrong result and what follows it, slips that are none."""
    assert arithmetic.check(parse("((3+5)*2)-7"), trajectory) == verdicts


def test_answers_are_those_of_pythons_own_arithmetic():
    """The answer against another reading of the question's text: eval, in a test only."""
    rng = random.Random(1)
    for domain, k in ALL:
        for _ in range(50):
            q = drawn(rng, domain, k)
            formula = q.text.removesuffix("%97")
            assert set(formula) <= set("0123456789+-*()")
            value = eval(formula)
            assert int(q.answer) == (value % 97 if domain == "modsum" else value)


def test_expr_values_stay_within_two_digits():
    rng = random.Random(2)
    for _ in range(2000):
        q = arithmetic.draw(rng, "expr", rng.choice((3, 4)))
        for step in arithmetic.steps(q, rng)[0]:
            assert 0 <= int(step.split("=")[1]) <= 99


def test_sum_of_five_has_32_distinct_trajectories():
    rng = random.Random(3)
    for _ in range(30):
        q = arithmetic.draw(rng, "sum", 5)
        texts = [";".join(steps) for steps in arithmetic.distinct(q, rng, 32)]
        assert len(set(texts)) == 32
        for t in texts:
            assert all(arithmetic.check(q, t))
    with pytest.raises(ValueError, match="distinct"):
        arithmetic.distinct(arithmetic.draw(rng, "sum", 2), rng, 2)


@pytest.mark.parametrize("bad,reason", [
    ("", "empty"), ("  ", "empty"), ("3", "operands"), ("3+x", "'x'"), ("3++5", "position 3"),
    ("(3+5", "not closed"), ("3+5)", "not understood"), ("3/5", "'/'"), ("²+3", "'²'"),
    ("٣+1", "'٣'"), ("9999+1", "1 to 3 digits"), ("3-5", "negative"), ("99*99", "digits"),
    ("2**3", "number"), ("3+5%96", "'%'"), ("3*5%97", "modulo"), ("%97", "number"),
    ("1+" * 60 + "1", "99 characters"), ("(" * 5000, "99 characters"), ("(" * 90, "number"),
    ("1+1+1+1+1+1+1+1+1", "8 operands")])
def test_bad_questions_are_refused_with_a_reason(bad, reason):
    with pytest.raises(ValueError) as e:
        parse(bad)
    assert reason in str(e.value)


def test_questions_in_ordinary_notation():
    assert parse("(3+5)*2-7").text == "((3+5)*2)-7"
    assert parse("3+5*2").text == "3+(5*2)"
    assert parse(" 12 + 7+30 ").domain == "sum"
    assert parse("45+88%97").answer == "36"
    assert parse("90-12-5").domain == "diff"


@pytest.mark.parametrize("bad", ["", "08", "-1", "1000", "9**9", "٣", "1 ", "1e2", "0x1", "nine",
                                 "²"])
def test_verifier_takes_plain_digits_only(bad):
    assert arithmetic.number(bad) is None


# ---------------------------------------------------------------------------------------- splits

def test_splits_are_disjoint_up_to_order_and_grouping():
    """100,000 draws from three seeds: no canonical form stands in two splits."""
    seen, rngs = {}, [random.Random(seed) for seed in (0, 1, 2)]
    for i in range(100_000):
        rng = rngs[i % 3]
        domain = rng.choice(list(CELLS))
        k, part = rng.choice(CELLS[domain]), "ood"
        if k in arithmetic.TRAINED.get(domain, ()):
            part = rng.choice(("train", "train", "val", "test"))
        q = arithmetic.draw(rng, domain, k, part)
        form = domain == "diff", arithmetic.canonical(q)
        assert seen.setdefault(form, part) == part
    assert set(seen.values()) == {"train", "val", "test", "ood"}


def flipped(node):
    """A tree with the operands of every + and * the other way round."""
    if isinstance(node, int):
        return node
    op, left, right = node[0], flipped(node[1]), flipped(node[2])
    return (op, left, right) if op == "-" else (op, right, left)

def regrouped(node):
    """(a + b) + c -> a + (b + c), (a + b) - c -> a + (b - c), (a - b) - c -> a - (b + c) and
    (ab)c -> a(bc), everywhere."""
    if isinstance(node, int):
        return node
    op, left, right = node[0], regrouped(node[1]), regrouped(node[2])
    rules = {("+", "+"): ("+", "+"), ("-", "+"): ("+", "-"), ("-", "-"): ("-", "+"),
             ("*", "*"): ("*", "*")}
    rule = None if isinstance(left, int) else rules.get((op, left[0]))
    return (rule[0], left[1], (rule[1], left[2], right)) if rule else (op, left, right)

def test_the_order_of_commuting_operands_does_not_matter_to_a_split():
    splits = set()
    for order in itertools.permutations((3, 14, 15, 9)):
        splits.add(arithmetic.split(arithmetic.question("sum", order)))
    assert len(splits) == 1

@pytest.mark.parametrize("rewritten", [flipped, regrouped])
def test_neither_order_nor_grouping_matters_to_a_split(rewritten):
    rng, changed = random.Random(0), 0
    for _ in range(500):
        q = arithmetic.draw(rng, "expr", 4)
        other = arithmetic.question("expr", rewritten(q.state))
        changed += q.text != other.text
        assert arithmetic.value(other.state) == arithmetic.value(q.state)
        assert arithmetic.canonical(q) == arithmetic.canonical(other)
    assert changed > 150

def test_one_canonical_form_is_one_value():
    """What the split takes for the same question is the same, if only in its answer."""
    rng, values = random.Random(1), {}
    for _ in range(20_000):
        q = arithmetic.draw(rng, "expr", 3)
        assert values.setdefault(arithmetic.canonical(q), q.answer) == q.answer

def test_a_question_less_its_last_operation():
    rng = random.Random(2)
    for domain, k in ALL:
        q = drawn(rng, domain, k)
        less = arithmetic.part(q)
        if less:
            assert less.operands == q.operands - 1
            assert less.text in q.text if domain == "expr" else q.text.startswith(
                less.text.removesuffix("%97"))
            assert arithmetic.check(less, arithmetic.trajectory(less, rng))[-1]
    assert arithmetic.part(parse("(3+5)*2")).text == "3+5"
    assert arithmetic.part(parse("9-(3+5)")).text == "3+5"
    assert arithmetic.part(parse("12+7+30%97")).text == "12+7%97"
    assert arithmetic.part(parse("(3+5)*(2+4)")) is None is arithmetic.part(parse("9-4"))


# ------------------------------------------------------------------------------ encoding, padding

def test_encoding_round_trip_and_unknown_characters():
    rng = random.Random(4)
    for domain, k in ALL:
        t = arithmetic.trajectory(drawn(rng, domain, k), rng, "reflect")
        ids = text.encode(t)
        assert text.decode(ids) == t
        assert len(ids) == len(t)
    with pytest.raises(ValueError, match="'x'"):
        text.encode("3x5")


def test_padding_fills_up_and_targets_are_the_next_tokens_of_the_continuation():
    rows = [[1, 2, 3], [4]]
    assert text.padded(rows, 0).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert text.padded(rows, 0, left=True).tolist() == [[1, 2, 3], [0, 0, 4]]
    ids, targets = text.shifted([[1, 2], [5]], [[3, 4], [6]])
    nothing = text.IGNORE
    assert ids.tolist() == [[1, 2, 3], [5, 6, text.PAD]]
    assert targets.tolist() == [[nothing, 3, 4], [6, nothing, nothing]]


# --------------------------------------------------------------------------------------- batches

def test_batches_teach_exactly_what_their_examples_say():
    rng, mix, kinds = random.Random(5), text.Mix(), set()
    for _ in range(300):
        example = mix.sample(rng)
        t, a = example.think, example.answer
        batch = text.batch([example])
        learned = text.decode([i for i in batch.targets[0].tolist() if i >= 0])
        expected = {"all": f"{t}</think>{a}<eos>", "cut": f"{t}{a}<eos>", "answer": f"{a}<eos>"}
        assert learned == expected[example.learn]
        shown = text.decode(batch.ids[batch.sample > 0].tolist())
        assert shown == f"<bos>{example.question}<think>{t}</think>{a}"
        kinds.add(example.learn)
    assert kinds == {"all", "cut", "answer"}


def samples_of(batch):
    """(ids, targets, positions) of every sample in a batch, sorted."""
    found = []
    for row, numbers in enumerate(batch.sample):
        for n in range(1, int(numbers.max()) + 1):
            own = numbers == n
            parts = (batch.ids, batch.targets, batch.pos)
            found.append([part[row, own].tolist() for part in parts])
    return sorted(found)

def test_a_batch_is_a_function_of_seed_and_step():
    mix = text.Mix()
    batch = text.batch_at(7, 64, mix, 0)
    for a, b in zip(batch, text.batch_at(7, 64, mix, 0)):
        assert torch.equal(a, b)
    assert samples_of(batch) != samples_of(text.batch_at(8, 64, mix, 0))
    assert samples_of(batch) != samples_of(text.batch_at(7, 64, mix, 1))


def test_packing_keeps_every_sample_once():
    mix, rng = text.Mix(), random.Random("0/7")
    batch, alone = text.batch_at(7, 64, mix, 0), []
    for _ in range(64):
        alone += samples_of(text.batch([mix.sample(rng)], room=1))
    assert samples_of(batch) == sorted(alone)
    padding = batch.sample == 0
    assert (~padding).float().mean() > 0.85
    assert (batch.ids[padding] == text.PAD).all()
    assert (batch.targets[padding] == text.IGNORE).all()


def gradients(model, batches):
    total = 0
    for b in batches:
        total = total + model.nll(b.ids, b.targets, pos=b.pos, mask=b.mask()).sum()
    return torch.autograd.grad(total, list(model.parameters()))

def test_packed_samples_do_not_see_each_other(tiny):
    """Gradients of a packed batch are those of its samples, one at a time."""
    rng, mix = random.Random(3), text.Mix()
    examples = [mix.sample(rng) for _ in range(12)]
    packed = text.batch(examples)
    alone = [text.batch([example], room=1) for example in examples]
    assert len(packed.ids) < 12
    for g, h in zip(gradients(tiny, [packed]), gradients(tiny, alone)):
        torch.testing.assert_close(g, h, rtol=0, atol=1e-12)


def test_a_pool_holds_the_same_questions_whatever_its_support():
    mix = text.Mix(domains={"sum": 1}, operands={"sum": (0, 0, 1, 0)})
    one, many = mix.limited(20, 1, 0).pool, mix.limited(20, 8, 0).pool
    assert len(one) == len(many) == 20
    for (q, thinks), (same, more) in zip(one, many):
        assert q == same
        assert len(thinks) == 1
        assert len(more) == len(set(more)) == 8
        assert thinks[0] in more


def test_samples_of_a_pool_are_its_questions_and_trajectories():
    mix = text.Mix(domains={"sum": 1}, operands={"sum": (0, 0, 1, 0)}).limited(20, 1, 0)
    known = {(q.text, thinks[0]) for q, thinks in mix.pool}
    rng, seen = random.Random(0), set()
    for _ in range(300):
        example = mix.sample(rng)
        if example.learn == "all":
            seen.add((example.question, example.think))
    assert len(seen) > 10
    assert seen <= known


# ----------------------------------------------------------------------------------------- tasks

def test_trajectories_without_their_last_results():
    think = "3+5=8;8*2=16"
    assert tasks.without_results(think, 0) == think
    assert tasks.without_results(think, 1) == "3+5=8;8*2="
    assert tasks.without_results(think, 2) == "3+5="
    with pytest.raises(ValueError):
        tasks.without_results("3+5=8", 2)
    with pytest.raises(ValueError, match="empty"):
        tasks.tensors([tasks.Task(parse("3+5"), [""])])


def spelt(row, keep):
    return text.decode(row[keep].tolist())

def test_rows_of_tasks_hold_what_their_targets_say():
    """Every part of Support and Query, read back as text."""
    some = [tasks.Task(parse("(3+5)*2"), ["3+5=8;8*2=16", "3+5=8;8*2=16"]),
            tasks.Task(parse("1+2+3"), ["1+2=3;3+", "1"], whole=False)]
    support, query = tasks.tensors(some)
    rows = [(task, think) for task in some for think in task.thinks]
    for i, (task, t) in enumerate(rows):
        q, a = task.question.text, task.question.answer
        ids, inner, joint, step, section = (part[i] for part in support)
        end = "</think>" if task.whole else ""
        assert spelt(ids, ids != text.PAD).startswith(f"<bos>{q}<think>{t}</think>{a}")
        assert spelt(inner, inner >= 0) == f"{t}</think>"
        assert spelt(joint, joint >= 0) == f"{t}{end}{a}<eos>"
        assert spelt(ids, section == 0) == f"<bos>{q}<think>"
        assert spelt(ids, section == 1) == t
        numbers = [t[:j].count(";") for j in range(len(t) + 1)]
        assert step[inner >= 0].tolist() == numbers
        for targets in (inner, joint):
            at = (targets[:-1] >= 0).nonzero()
            assert torch.equal(targets[at], ids[at + 1])
    for i, task in enumerate(some):
        ids, targets = query.ids[i], query.targets[i]
        q, a = task.question.text, task.question.answer
        assert spelt(ids, ids != text.PAD).startswith(f"<bos>{q}<think></think>{a}")
        assert spelt(targets, targets >= 0) == f"{a}<eos>"


def test_sizes_count_what_sums_over_tasks_are_divided_by():
    some = [tasks.Task(parse("(3+5)*2"), ["3+5=8;8*2=16"]),
            tasks.Task(parse("1+2+3"), ["1+2=3;3+", "2+3="], whole=False)]
    support, query = tasks.tensors(some)
    sizes = tasks.sizes_of(some)
    assert sizes.questions == 2
    assert sizes.answer_tokens == int((query.targets >= 0).sum())
    assert sizes.joint_targets == int((support.joint >= 0).sum())
