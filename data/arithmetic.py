"""What a question, a trajectory and an answer are. Plain Python, plain text, no model.

A question is a task: `((3+5)*2)-7`. Its trajectory is a list of steps that each reduce one ready part of it, joined by `;`:
`3+5=8;8*2=16;16-7=9`. The answer is what is left: `9`. Four domains share that form:

  expr    nested integers, + - *, every value 0..99   ((3+5)*2)-7      a step reduces any ready node
  sum     distinct addends 1..30                       12+7+30+5        a step merges any two: k=5 has 180 orders
  modsum  distinct addends 0..96, modulo 97            45+88+13%97      the same, but a partial result says nothing of the answer
  diff    a chain of subtractions, never trained on    90-12-5-30       a step reduces the first two

and six styles of trajectory: `long` (one operation a step), `short` (up to two a step), `padded` (`short`, then dots up to the length of a
`long` one), `reflect` (some steps wrong at first, then `W` and the right one), `filler` (only dots) and `direct` (none).

    python -m data.arithmetic        # prints examples of each
"""
import hashlib
import random
from typing import NamedTuple

STYLES = ("long", "short", "padded", "reflect", "filler", "direct")
TRAINED = {"expr": (2, 3, 4), "sum": (2, 3, 4, 5), "modsum": (2, 3, 4)}    # operand counts seen in training
OOD = {"expr": (5, 6), "sum": (6, 7), "modsum": (5, 6), "diff": (3, 4)}    # longer questions, and the domain never seen
MODULUS = 97
MAX_OPERANDS, MAX_DIGITS = 8, 3


class Question(NamedTuple):
    """One task. `state` is what steps reduce: a tree (op, left, right) of ints for `expr`, a tuple of ints for the others."""
    domain: str
    state: tuple
    text: str
    answer: str

    @property
    def operands(self):
        return count(self.state) if self.domain == "expr" else len(self.state)


# ---------------------------------------------------------------------------------------------------------------- values, text

def apply(op, a, b):
    return a + b if op == "+" else a - b if op == "-" else a * b

def value(node):
    return node if isinstance(node, int) else apply(node[0], value(node[1]), value(node[2]))

def count(node):
    return 1 if isinstance(node, int) else count(node[1]) + count(node[2])

def show(node, top=True):
    """Tree -> text with every bracket but the outermost, so that a model need not learn precedence."""
    if isinstance(node, int):
        return str(node)
    text = f"{show(node[1], False)}{node[0]}{show(node[2], False)}"
    return text if top else f"({text})"

def fold(domain, numbers):
    """The result of merging `numbers` in a flat domain."""
    if domain == "diff":
        return numbers[0] - sum(numbers[1:])
    return sum(numbers) % MODULUS if domain == "modsum" else sum(numbers)

def question(domain, state):
    """Builds a Question from a tree (`expr`) or a tuple of ints (the flat domains)."""
    if domain == "expr":
        return Question(domain, state, show(state), str(value(state)))
    text = ("-" if domain == "diff" else "+").join(map(str, state)) + (f"%{MODULUS}" if domain == "modsum" else "")
    return Question(domain, state, text, str(fold(domain, state)))

def canonical(q):
    """One text for all questions that differ only in the order of commuting operands."""
    def sort(node):
        if isinstance(node, int):
            return str(node)
        left, right = sort(node[1]), sort(node[2])
        if node[0] != "-" and right < left:
            left, right = right, left
        return f"({left}{node[0]}{right})"
    if q.domain == "expr":
        return sort(q.state)[1:-1]
    if q.domain == "diff":
        return q.text
    return question(q.domain, tuple(sorted(q.state, key=str))).text

def split(q):
    """'train', 'val', 'test' or 'ood': a hash of the canonical form decides, so the splits are disjoint for every seed."""
    if q.operands not in TRAINED.get(q.domain, ()):
        return "ood"
    h = int.from_bytes(hashlib.blake2b(canonical(q).encode(), digest_size=4).digest(), "big") / 2**32
    return "test" if h < 0.10 else "val" if h < 0.15 else "train"


# ------------------------------------------------------------------------------------------------------------------- questions

def _tree(rng, n):
    """A random tree of n leaves 1..9 with every value in 0..99 -> (node, value)."""
    if n == 1:
        leaf = rng.randint(1, 9)
        return leaf, leaf
    k = rng.randint(1, n - 1)
    (left, a), (right, b) = _tree(rng, k), _tree(rng, n - k)
    if a + b > 99:                                                          # then a*b > 99 too, or one of them is 1
        op = "-"
    else:
        op = rng.choice("+-*" if a * b < 100 else "+-")
    if op == "-" and a < b:
        left, right, a, b = right, left, b, a
    return (op, left, right), apply(op, a, b)

def _bounded(node):
    return 0 <= value(node) < 10**MAX_DIGITS and (isinstance(node, int) or _bounded(node[1]) and _bounded(node[2]))

def draw(rng, domain, operands, part="train"):
    """A random question of a domain and an operand count from one split. ValueError if that split cannot hold it."""
    if domain not in OOD:
        raise ValueError(f"unknown domain {domain!r}: choose from {', '.join(OOD)}")
    if not 2 <= operands <= MAX_OPERANDS:
        raise ValueError(f"operands must be 2..{MAX_OPERANDS}, not {operands}")
    if (part == "ood") == (operands in TRAINED.get(domain, ())):
        raise ValueError(f"{domain} with {operands} operands is not in the split {part!r}")
    while True:
        if domain == "expr":
            state = _tree(rng, operands)[0]
        elif domain == "diff":
            rest = [rng.randint(1, 30) for _ in range(operands - 1)]
            state = (rng.randint(min(99, sum(rest)), 99), *rest)
            if sum(rest) > 99:
                continue
        else:
            state = tuple(rng.sample(range(1, 31) if domain == "sum" else range(MODULUS), operands))
        q = question(domain, state)
        if split(q) == part:
            return q

def parse(text):
    """Reads a question in ordinary notation (spaces allowed, `*` binds tighter, `%97` at the end). ValueError says what is wrong.

    Nothing is evaluated: a recursive-descent parser with bounds on digits, operands and depth."""
    s = "".join(text.split())
    if not s:
        raise ValueError("the question is empty")
    for c in s:
        if c not in "0123456789+-*()%":
            raise ValueError(f"the question has a character that the model does not know: {c!r}")
    if len(s) > 99:
        raise ValueError("the question is longer than 99 characters")
    domain = "modsum" if s.endswith(f"%{MODULUS}") else None
    s = s[:-3] if domain else s
    i = 0

    def atom():
        nonlocal i
        if s[i:i + 1] == "(":
            i += 1
            node = chain("+-")
            if s[i:i + 1] != ")":
                raise ValueError(f"a bracket is not closed in {text!r}")
            i += 1
            return node
        j = i
        while s[i:i + 1].isdigit():
            i += 1
        if not 1 <= i - j <= MAX_DIGITS:
            raise ValueError(f"a number of 1 to {MAX_DIGITS} digits is expected at position {j + 1} of {s!r}")
        return int(s[j:i])

    def chain(ops):
        nonlocal i
        node = chain("*") if ops == "+-" else atom()
        while s[i:i + 1] and s[i] in ops:
            op, i = s[i], i + 1
            node = (op, node, chain("*") if ops == "+-" else atom())
        return node

    node = chain("+-")
    if i < len(s):
        raise ValueError(f"{s[i]!r} at position {i + 1} of {s!r} is not understood")
    if not 2 <= count(node) <= MAX_OPERANDS:
        raise ValueError(f"a question has 2 to {MAX_OPERANDS} operands, this one has {count(node)}")
    if not _bounded(node):
        raise ValueError(f"a value in {text!r} is negative or has more than {MAX_DIGITS} digits")
    flat = not set(s) & set("()*")
    if domain and (not flat or "-" in s):
        raise ValueError(f"only sums can be taken modulo {MODULUS}")
    if flat and "-" not in s and (domain or count(node) > 2):
        return question(domain or "sum", tuple(map(int, s.split("+"))))
    if flat and "+" not in s and count(node) > 2:
        return question("diff", tuple(map(int, s.split("-"))))
    return question("expr", node)


# ---------------------------------------------------------------------------------------------------------------- trajectories

def _ready(domain, state, ops):
    """Handles of the parts of `state` that one step of exactly `ops` operations can reduce: paths in a tree, indices in a tuple."""
    if domain == "diff":
        return [tuple(range(ops + 1))] if len(state) > ops else []
    if domain != "expr":
        k = len(state)
        if ops == 1:
            return [(i, j) for i in range(k) for j in range(i + 1, k)]
        return [(i, j, m) for i in range(k) for j in range(i + 1, k) for m in range(j + 1, k)]
    if isinstance(state, int):
        return []
    if count(state) == ops + 1:
        return [()]
    return [(side, *path) for side in (1, 2) for path in _ready(domain, state[side], ops)]

def _read(domain, state, handle):
    """(left side of the step as text, its value)."""
    if domain == "expr":
        for side in handle:
            state = state[side]
        return show(state), value(state)
    numbers = [state[i] for i in handle]
    return ("-" if domain == "diff" else "+").join(map(str, numbers)), fold(domain, numbers)

def _put(domain, state, handle, v):
    """`state` with the part at `handle` replaced by the number v."""
    if domain != "expr":
        return tuple(v if i == handle[0] else x for i, x in enumerate(state) if i == handle[0] or i not in handle)
    if not handle:
        return v
    new = list(state)
    new[handle[0]] = _put(domain, state[handle[0]], handle[1:], v)
    return tuple(new)

def _last(domain, state):
    return isinstance(state, int) if domain == "expr" else len(state) == 1

def steps(q, rng, style="long", wrong_at=None, p_wrong=0.3):
    """A random trajectory of the question -> (list of step texts, the answer it implies).

    wrong_at=k gives step k a wrong result and goes on from it consistently, so the implied answer may differ from q.answer:
    `corrupt` is the careful front door. p_wrong: how often a `reflect` step is wrong at first."""
    if style == "direct":
        return [], q.answer
    if style == "filler":
        return ["." * len(";".join(steps(q, rng)[0]))], q.answer
    if style == "padded":
        ts, answer = steps(q, rng, "short")
        return ts[:-1] + [ts[-1] + "." * (len(";".join(steps(q, rng)[0])) - len(";".join(ts)))], answer
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose from {', '.join(STYLES)}")
    out, state = [], q.state
    while not _last(q.domain, state):
        handles = style == "short" and _ready(q.domain, state, 2) or _ready(q.domain, state, 1)
        handle = handles[int(rng.random() * len(handles))]
        left, v = _read(q.domain, state, handle)
        slip = ""
        if style == "reflect" and rng.random() < p_wrong:
            slip = f"{left}={_near(rng, v)}W"
        if len(out) == wrong_at:
            v = _near(rng, v)
        out.append(f"{slip}{left}={v}")
        state = _put(q.domain, state, handle, v)
    return out, str(state if q.domain == "expr" else state[0])

def _near(rng, v):
    """A wrong value near v, within 0..96 wherever v is: the kind of slip that a model makes."""
    while True:
        w = v + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
        if 0 <= w < MODULUS or w >= 0 and v >= MODULUS:
            return w

def corrupt(q, rng, wrong_at=None):
    """A `long` trajectory with one wrong result (a random step, or step `wrong_at`, negative from the end), consistent after it.

    -> (steps, implied answer), the implied answer differing from the true one and non-negative, or None if 50 draws found none
    (an early slip can cancel, as in `0*x`)."""
    n = q.operands - 1
    for _ in range(50):
        k = rng.randrange(n) if wrong_at is None else wrong_at % n
        ts, implied = steps(q, rng, wrong_at=k)
        values = [number(t.split("=")[1]) for t in ts]
        if implied != q.answer and None not in values and (q.domain != "expr" or max(values) < 100):
            return ts, implied

def distinct(q, rng, n, style="long"):
    """n different correct trajectories of one question. ValueError if 200 n draws do not find them."""
    found = {}
    for _ in range(200 * n):
        ts = steps(q, rng, style)[0]
        found.setdefault(";".join(ts), ts)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"{q.text} has fewer than {n} distinct {style} trajectories ({len(found)} found)")


# ------------------------------------------------------------------------------------------------------------ verifier, checker

def number(text):
    """Plain ASCII digits, at most MAX_DIGITS of them, no leading zero -> int; anything else -> None. Nothing is evaluated."""
    ok = 1 <= len(text) <= MAX_DIGITS and all(c in "0123456789" for c in text) and (text == "0" or text[0] != "0")
    return int(text) if ok else None

def verify(q, answer):
    """Is `answer` (text) the answer of the question?"""
    return number(answer) is not None and answer == q.answer

def reward(q, output):
    """The paper's reward (Eq. 21) of what a model wrote after `<think>`, special tokens spelt out: `t</think>a<eos>`.

    1: right and in form; 0: wrong, in form; -0.5: right (the last number in it), out of form; -1: wrong and out of form. In form is
    one `</think>`, one `<eos>`, at the end, and a plain number between them."""
    body, end, rest = output.partition("<eos>")
    _, mark, answer = body.partition("</think>")
    if end and not rest and mark and number(answer) is not None:
        return 1.0 if verify(q, answer) else 0.0
    last = "".join(c if c in "0123456789" else " " for c in output[-99:]).split()
    return -0.5 if last and verify(q, last[-1]) else -1.0

def check(q, trajectory):
    """One verdict a step of a trajectory's text: may this part be reduced now, and is its result right?

    -> list of bool, empty for an empty trajectory. `a=1Wa=2` counts as right if the slip is wrong, the correction right. Equal
    parts of a tree look the same in text, so every state that fits the steps so far is kept. After a wrong step the state is
    unknown: everything after it is False. The last step is also False if it leaves the question unfinished."""
    if not trajectory:
        return []
    states, verdicts, parts = {q.state}, [], trajectory.rstrip(".").split(";")
    for part in parts:
        *slips, step = part.split("W")
        left, _, result = step.partition("=")
        v, after = number(result), set()
        for state in states if v is not None else ():
            for ops in (1, 2):
                for handle in _ready(q.domain, state, ops):
                    if _read(q.domain, state, handle) == (left, v):
                        after.add(_put(q.domain, state, handle, v))
        for slip in slips:
            slip_left, _, slip_result = slip.partition("=")
            if slip_left != left or number(slip_result) in (None, v):
                after = set()
        states = after
        verdicts.append(bool(states))
    verdicts[-1] = verdicts[-1] and any(_last(q.domain, s) for s in states)
    return verdicts


if __name__ == "__main__":
    rng = random.Random(0)
    for domain in OOD:
        n = TRAINED.get(domain, OOD[domain])[-1]
        q = draw(rng, domain, n, "test" if domain in TRAINED else "ood")
        print(f"{domain}, {n} operands: {q.text} -> {q.answer}")
        for style in STYLES:
            print(f"  {style:8} {';'.join(steps(q, rng, style)[0])}")
        print(f"  {'corrupt':8} {';'.join(corrupt(q, rng)[0])}")
