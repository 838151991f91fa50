"""Questions, trajectories, splits, rows; and no held-out question in any row that a loss sees."""
import itertools
import random
import time

import pytest
import torch

import meta
import train
from data import arithmetic, tasks, text
from data.arithmetic import TESTED, canonical, check, parse, split, tree

Q = parse("(3+5)*2-7")
CELLS = [(domain, n) for domain, counts in TESTED.items() for n in counts]
STEPWISE = ("states", "short", "reflect", "steps")

def drawn(rng, domain, n):
    return arithmetic.draw(rng, domain, n, rng.choice(("train", "val", "test")))


def written(rng, n):
    """A random question in ordinary notation, brackets where they are needed and where not."""
    if n == 1:
        return rng.choice("0123456789")
    k = rng.randint(1, n - 1)
    both = f"{written(rng, k)}{rng.choice('+-*')}{written(rng, n - k)}"
    return f"({both})" if rng.random() < 0.4 else both

def test_parsed_answers_are_pythons_modulo_10():
    rng = random.Random(0)
    for _ in range(2000):
        s = written(rng, rng.randint(2, 12))
        q = parse("".join(c + " " * rng.randint(0, 1) for c in s))
        assert q.answer == str(eval(s) % 10) == str(eval(q.text) % 10), s
        assert parse(q.text) == q and q.operands == sum(c.isdigit() for c in s)
    assert Q == ("expr", "((3+5)*2)-7", "9") and parse("3+5*2").text == "3+(5*2)"
    assert [parse(s).domain for s in ("3+7+0", "9-1+2", "3-5")] == ["sum", "chain", "expr"]

@pytest.mark.parametrize("bad,reason", [
    ("", "empty"), (" \n", "empty"), ("3", "operands"), ("3+x", "'x'"), ("3++5", "position 3"),
    ("(3+5", "not closed"), ("3+5)", "not understood"), ("1/0", "'/'"), ("²+3", "'²'"),
    ("٣+1", "'٣'"), ("１+2", "'１'"), ("12+1", "two digits"), ("1 2 + 3", "without an operation"),
    ("2**3", "digit is expected"), ("-3+5", "position 1"), ("1+" * 60 + "1", "99 characters"),
    ("(" * 99, "digit is expected"), ("(" * 49 + "1" + ")" * 49, "operands"), ("🙂", "🙂"),
    ("(" * 5000, "99 characters"), ("1+" * 12 + "1", "12 operands"), ("\udcff", "udcff"),
    ("__import__('os')", "'_'"), ("()", "digit is expected"), ("3+5\n+x", "'x'")])
def test_bad_questions_are_refused_in_one_line_with_a_reason(bad, reason):
    with pytest.raises(ValueError) as e:
        parse(bad)
    assert reason in str(e.value) and "\n" not in str(e.value)


# (a inner b) outer c = a first (b second c).
RULES = {("+", "+"): ("+", "+"), ("-", "+"): ("+", "-"), ("-", "-"): ("-", "+"),
         ("+", "-"): ("-", "-"), ("*", "*"): ("*", "*")}

def rewritten(rng, node):
    """The same question in another order and grouping, by the rules of arithmetic."""
    if isinstance(node, int):
        return node
    op, left, right = node[0], rewritten(rng, node[1]), rewritten(rng, node[2])
    if op in "+*" and rng.random() < 0.5:
        left, right = right, left
    rule = None if isinstance(left, int) else RULES.get((op, left[0]))
    if rule and rng.random() < 0.7:
        return rule[0], left[1], (rule[1], left[2], right)
    return op, left, right

def fingerprint(s):
    """The value of a question with large numbers in place of digits: another question's differs."""
    big = {str(d): str(1_000_003 * (d + 1) ** 5 + 7919 * d) for d in range(10)}
    return eval("".join(big.get(c, c) for c in s))

def test_order_and_grouping_do_not_matter_to_a_split_and_values_do():
    """One canonical form for every rewriting; one value, even of other numbers, for a form."""
    rng, forms, changed = random.Random(0), {}, 0
    for _ in range(3000):
        q = drawn(rng, "expr", rng.choice((3, 3, 3, 4, 6)))
        other = arithmetic.show(rewritten(rng, tree(q.text)))
        changed += other != q.text
        assert canonical(other) == canonical(q.text) and split(other) == split(q.text)
        assert forms.setdefault(canonical(q.text), fingerprint(q.text)) == fingerprint(other)
    assert changed > 1500 and len(forms) > 1000
    assert canonical("3+(5-2)") == canonical("(5+3)-2") == "+3+5-2"

def test_splits_are_disjoint_over_seeds_domains_and_sizes():
    """And have the shares that they should; two operands are for everybody."""
    seen, rngs = {}, [random.Random(seed) for seed in (0, 1, 2)]
    for i in range(4000):
        (domain, n), part = rngs[i % 3].choice(CELLS), ("train", "val", "test")[i % 3]
        q = arithmetic.draw(rngs[i % 3], domain, n, part)
        assert seen.setdefault(canonical(q.text), part) == part
    texts = [arithmetic.show(arithmetic._tree(rngs[0], 5, "+-*")) for _ in range(5000)]
    shares = [sum(split(s) == part for s in texts) / 5000 for part in ("val", "test")]
    assert shares == [pytest.approx(0.05, abs=0.012), pytest.approx(0.10, abs=0.015)]
    facts = [f"{a}{op}{b}" for a in range(10) for b in range(10) for op in "+-*"]
    assert {split(fact) for fact in facts} == {"train"}

@pytest.mark.parametrize("domain,n", CELLS)
def test_every_trajectory_passes_its_checker_and_a_corrupted_one_from_its_wrong_step_on_does_not(
        domain, n):
    rng, operators, corrupted = random.Random(n), {"expr": "+-*", "sum": "+", "chain": "+-"}, 0
    for style, part in itertools.product(STEPWISE, ("train", "val", "test") * 12):
        q = arithmetic.draw(rng, domain, n, part)
        assert q.operands == n and set(q.text) <= set(f"0123456789(){operators[domain]}")
        steps, implied = arithmetic.steps(q, rng, style)
        assert implied == q.answer == steps[-1][-1] == str(eval(q.text) % 10)
        assert all(check(q, ";".join(steps))), (q.text, style, steps)
        assert len(steps) == (n // 2 if style == "short" else n - 1)
        if style in ("states", "short"):
            assert all(eval(state) % 10 == int(q.answer) for state in steps)
        at = rng.randrange(len(steps))
        found = arithmetic.corrupt(q, rng, style, at)
        if found:
            corrupted, (steps, implied) = corrupted + 1, found
            verdicts = check(q, ";".join(steps))
            assert all(verdicts[:at]) and not any(verdicts[at:]), (q.text, steps)
            assert implied == steps[-1][-1] != q.answer
    assert corrupted > 110
    assert arithmetic.corrupt(parse("0*(3+4)"), rng, wrong_at=0) is None

@pytest.mark.parametrize("think,verdicts", [
    ("(8*2)-7;6-7;9", "+++"), ("(8*2)-7;6-7", "+-"), ("6-7;9", "++"), ("9", "-"), ("", ""),
    ("(9*2)-7;8-7;1", "---"), ("(9*2)-7W(8*2)-7;6-7;9", "+++"), ("(8*2)-7W(8*2)-7;6-7;9", "---"),
    ("3+5=8;8*2=6;6-7=9", "+++"), ("3+5=8;8*2=16", "+-"), ("8*2=6;6-7=9", "--"), ("....", "-"),
    ("(8*2)-7;5-7;9", "+--"), ("(08*2)-7", "-"), ("(8*2)-7;;9", "+--")])
def test_every_step_gets_the_verdict_that_it_deserves(think, verdicts):
    """Unfinished, two operations, three, slips that are none, out of turn, skipped."""
    assert check(Q, think) == [verdict == "+" for verdict in verdicts]
    assert check(parse("3-5+2"), "8+2;0") == [True, True]       # a chain goes from the left
    assert check(parse("3-5+2"), "3-7;6") == [False, False]

def test_relatives_are_answered_by_the_last_two_results_of_a_trajectory():
    rng, kinds = random.Random(4), {k: q.text for k, q in arithmetic.relatives(Q).items()}
    assert kinds == {"sibling": "((3+5)*2)*7", "sibling2": "((3+5)*2)+7",
                     "swapped": "7-((3+5)*2)", "left": "(3+5)*2"}
    for _ in range(200):
        q = drawn(rng, "expr", rng.randint(3, 6))
        (a, op, b), found = arithmetic.steps(q, rng)[0][-2], arithmetic.relatives(q)
        others = [arithmetic.root(found[kind])[0] for kind in ("sibling", "sibling2")]
        answers = [str(eval(f"{a}{other}{b}") % 10) for other in others]
        assert sorted([op, *others]) == sorted("+-*")
        assert [found["sibling"].answer, found["sibling2"].answer] == answers
        assert found["swapped"].answer == str((int(b) - int(a)) % 10)
        assert found.get("left", q._replace(answer=a)).answer == a
        assert found.get("right", q._replace(answer=b)).answer == b
        longer = arithmetic.beyond(q, rng)
        assert f"({q.text})" in longer.text and longer.operands == q.operands + 1
        assert longer.answer == str(eval(longer.text) % 10)

@pytest.mark.parametrize("slips", (0.3, 1.0))
def test_room_is_enough_for_every_style(monkeypatch, slips):
    """Of questions of every size; 1.0: with a slip in every state of `reflect`."""
    monkeypatch.setattr(arithmetic, "P_SLIP", slips)
    rng = random.Random(6)
    for n, style, _ in itertools.product(range(2, 13), arithmetic.STYLES, range(30)):
        q = arithmetic.draw(rng, rng.choice(list(TESTED)), n)
        t = arithmetic.trajectory(q, rng, style)
        assert len(t) + len("Ea$") <= arithmetic.room(n), (q.text, style)
    assert arithmetic.steps(q, rng, "direct") == ([], q.answer)

@pytest.mark.parametrize("reward,outputs", [
    (1, ["(8*2)-7;6-7;9</think>9<eos>", "</think>9<eos>"]), (0, ["...</think>8<eos>"]),
    (-0.5, ["(8*2)-7;6-7;9<eos>", "</think>9", "</think>09<eos>", "9</think></think>9<eos>",
            "</think>9<eos>9", "</think>9<eos>\n"]),
    (-1, ["", "6-7", "</think>9<eos>1", "</think><eos>", "</think>９<eos>"])])
def test_reward_is_that_of_the_paper(reward, outputs):
    assert [arithmetic.reward(Q, output) for output in outputs] == [reward] * len(outputs)

PIECES = ("9**9**9", "(" * 10_000 + "1" + ")" * 10_000, "٩", "²", "", "9" * 10_000, " 9", "1/0",
          "0x9", "\x00", "\n", "=", ";", "W", "</think>", "<eos>", "(8*2)-7", "nan", "<think>",
          "__import__('os').abort()", "9", "</think>9<eos>", "</think>8<eos>")

def test_hostile_outputs_get_a_verdict_quickly_and_run_nothing(monkeypatch):
    rng, began, rewards = random.Random(0), time.perf_counter(), set()
    with monkeypatch.context() as patch:
        for name in ("eval", "exec", "compile"):
            patch.setattr(f"builtins.{name}", lambda *_: pytest.fail("evaluated"))
        for _ in range(1000):
            s = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 4)))
            rewards.add(arithmetic.reward(Q, s))
            assert arithmetic.verify(Q, s) == (s == "9") and isinstance(check(Q, s), list)
    assert rewards == {1.0, 0.0, -0.5, -1.0} and time.perf_counter() - began < 8

LETTERS = {text.BOS: "B", text.THINK: "T", text.END_THINK: "E", text.EOS: "$", text.PAD: "_",
           text.IGNORE: "_"}

def spelt(ids):
    """A letter per id: B <bos>, T <think>, E </think>, $ <eos>, _ nothing."""
    return "".join(LETTERS.get(int(i)) or text.CHARS[i] for i in ids)

@pytest.mark.parametrize("options,expected,asides", [
    ({}, ["B(3+5)*2T8*2;6E6", "_B(3+5)*2T8*2;6E", "________8*2;6E6$", "________8*2;6E__",
          "0000000000001111"], ["ET6_ 0 9", "E26_ 0 12"]),
    ({"whole": False}, ["B(3+5)*2T8*2;6E6", "_B(3+5)*2T8*2;6E", "________8*2;6_6$",
                        "________8*2;6E__", "0000000000001111"], ["ET6_ 0 9", "E26_ 0 12"]),
    ({"asides": False}, ["B(3+5)*2T8*2;6E6", "_B(3+5)*2T8*2;6E", "________8*2;6E6$",
                         "________8*2;6E__", "0000000000001111"], []),
    ({"steps": []}, ["B(3+5)*2TE6", "_B(3+5)*2TE", "_________6$", "________E__", "0" * 11], []),
    ({"steps": [], "brackets": True}, ["B(3+5)*2TE6", "_B(3+5)*2TE", "_________6$", "________E__",
                                       "0" * 11], ["E)8_ 0 6"])])
def test_a_row_is_the_one_worked_out_by_hand(options, expected, asides):
    """ids, the token before, targets, targets of the inner loop, states; of asides the place, too:
    how much they see."""
    row = text.row(**{"question": "(3+5)*2", "steps": ["8*2", "6"], "answer": "6", **options})
    *columns, steps, places = zip(*row.trunk)
    assert [*map(spelt, columns), "".join(map(str, steps))] == expected
    assert places == tuple(range(len(row.trunk)))
    assert [f"{spelt(t[:4])} {t.step} {t.place}" for t in row.asides] == asides

def test_batches_are_padded_rows_and_a_function_of_seed_and_step():
    rows = text.batch_at(7, 40, text.Mix(), 0)
    assert rows == text.batch_at(7, 40, text.Mix(), 0) != text.batch_at(8, 40, text.Mix(), 0)
    assert rows != text.batch_at(7, 40, text.Mix(), 1)
    batch = text.batch(rows)
    assert batch.ids.size(1) % 8 == 0               # few shapes: a CPU keeps code for each
    for i, row in enumerate(rows):
        tokens = [text.Token(*map(int, column)) for column in zip(*(x[i] for x in batch[:6]))]
        for part, found in zip(row, (tokens[:batch.trunk], tokens[batch.trunk:]), strict=True):
            assert found == part + [text.Token()] * (len(found) - len(part))

def test_a_pool_holds_the_same_questions_whatever_its_support():
    mix = text.Mix(domains=("sum",), operands=(6,), styles=("orders",))
    one, many = mix.limited(20, 1, 0).pool, mix.limited(20, 8, 0).pool
    for (q, steps), (again, more) in zip(one, many, strict=True):
        assert q == again and len(steps) == 1 and set(steps) < set(more)
        assert len(set(more)) == len(more) and all(all(check(q, ";".join(t))) for t in more)
    assert sum(len(more) for _, more in many) >= 0.9 * 8 * 20

def held_out(s):
    """The held-out questions in a text, however they are framed: any run of question characters
    that can be read is one."""
    found, runs = [], "".join(c if c in "0123456789+-*()" else " " for c in s).split()
    for run in runs:
        try:
            found += [run] if split(run) != "train" else []
        except ValueError:
            continue
    return found

def shown(ids):
    return text.decode(i for i in ids if i not in (text.PAD, text.END_THINK))

def bracket_at_end(s):
    first = max(i for i in range(len(s)) if s[i] == "(" and s[i:].count("(") == s[i:].count(")"))
    return s[first + 1:-1]

def asked(row):
    """[(the question that an aside or the end asks, its target)] of a Row."""
    found, trunk = [], spelt(token.id for token in row.trunk)
    for token in (*row.asides, *row.trunk):
        if token.id == text.END_THINK and 0 <= token.target < 10:
            question, thinks, _ = trunk[1:token.place].partition("T")
            found.append((question if thinks else bracket_at_end(question), token.target))
    return found

def nothing_held_out(row):
    """Neither shown nor asked; and the digits asked for are right."""
    read = [token.id for token in row.trunk]
    assert not held_out(shown(read)), shown(read)
    for question, digit in asked(row):
        assert not held_out(question) and eval(question) % 10 == digit, (spelt(read), question)

@pytest.mark.parametrize("mix", [
    text.Mix(), text.Mix(styles=arithmetic.STYLES), text.Mix(direct=3), text.Mix(direct=6, ops="+"),
    text.Mix(styles=("short", "reflect"), operands=(3, 4)), text.Mix().limited(300, 5, 0),
    text.Mix(("sum",), (6,), ("reflect",)).limited(300, 5, 1)])
def test_sft_sees_no_held_out_question(mix):
    for step, asides in itertools.product(range(2), (True, False)):
        for row in text.batch_at(step, 300, mix, 0, asides):
            nothing_held_out(row)
            assert asked(row)

@pytest.mark.parametrize("flags", [{}, {"operands": "3"}, {"style": "steps"}, {"queries": 7}])
def test_meta_training_sees_no_held_out_question(monkeypatch, flags):
    rows, real = [], text.batch
    monkeypatch.setattr(text, "batch", lambda part, device: rows.extend(part) or real(part, device))
    some = tasks.tasks_at(0, meta.Meta(batch=400, **flags))
    tasks.support(some), tasks.query(some), tasks.query(some, shown=True)
    for row in rows:
        nothing_held_out(row)
    queries = [q for task in some for q in task.queries]
    for q, row in zip(2 * queries, rows[len(some):], strict=True):
        assert asked(row)[-1] == (q.text, int(q.answer))

class Writer:
    """In a model's place: writes trajectories, every other one corrupted, held-out states and all;
    remembers the rows that it is asked to learn from."""
    device = torch.device("cpu")

    def __init__(self):
        self.rng, self.outputs, self.learned = random.Random(0), [], []
        self.weight = torch.zeros((), requires_grad=True)

    def generate(self, prompts, stop, room, *_):
        for ids in prompts:
            q = parse(text.decode(ids)[len("<bos>"):-len("<think>")])
            style, wrong_at = self.rng.choice(("states", "reflect")), self.rng.choice((None, 0))
            steps, answer = arithmetic.steps(q, self.rng, style, wrong_at)
            think = self.rng.choice(";=.W").join([*steps, q.text])      # also `3+5+2=0`
            self.outputs.append([*text.encode(think), text.END_THINK, int(answer)])
        return self.outputs[-len(prompts):]

    def nll(self, ids, targets):
        self.learned += ids.tolist() if torch.is_grad_enabled() else []
        return self.weight * (targets >= 0)

@pytest.mark.parametrize("method", ("grpo", "dpo"))
def test_reinforcement_learns_from_no_held_out_question(method):
    model, c = Writer(), train.Train(method=method, batch=320, group=8)
    for step in range(3):
        train.METHODS[method](c, model, train.mix_of(c), step, model)
    assert sum(bool(held_out(shown(output))) for output in model.outputs) > 80
    assert len(model.learned) > 150 and not any(held_out(shown(ids)) for ids in model.learned)


def test_tasks_are_a_function_of_seed_and_step_and_hold_what_they_promise():
    c, kinds = meta.Meta(batch=300, queries=3), {"itself": 0, "relative": 0, "beyond": 0}
    some = tasks.tasks_at(3, c)
    assert some[:20] == tasks.tasks_at(3, c)[:20] != tasks.tasks_at(4, c)[:20]
    for q, steps, (first, *others), whole in some:
        verdicts = check(q, ";".join(steps))
        relative = first in arithmetic.relatives(q).values()
        kinds["itself" if first == q else "relative" if relative else "beyond"] += 1
        assert len(others) == 2 and all(verdicts[:-1]) and verdicts[-1] == whole
        assert first == q or whole != relative and (relative or f"({q.text})" in first.text)
    assert min(kinds.values()) > 30, kinds

def test_no_task_asks_its_own_question_where_that_is_left_out():
    some = tasks.tasks_at(0, meta.Meta(batch=300, itself="no"))
    assert not any(task.solved in task.queries for task in some)
    assert 0.3 < sum(task.whole for task in some) / len(some) < 0.37        # 0.3 of 0.9
