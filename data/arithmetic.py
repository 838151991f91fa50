"""What a question, a trajectory and an answer are. Plain Python, plain text, no model.

A question is a task: `((3+5)*2)-7`. Its trajectory is a list of steps that each reduce one ready
part of it, joined by `;`: `3+5=8;8*2=16;16-7=9`. The answer is what is left: `9`. Four domains
share that form:

  expr    nested integers, + - *, every value 0..99   ((3+5)*2)-7
          a step reduces any ready node
  sum     distinct addends 1..30                      12+7+30+5
          a step merges any two: five addends have 180 orders
  modsum  distinct addends 0..96, modulo 97           45+88+13%97
          the same, but a partial result says nothing of the answer
  diff    a chain of subtractions, never trained on   90-12-5-30
          a step reduces the first two

and six styles of trajectory: `long` (one operation a step), `short` (up to two a step), `padded`
(`short`, as long as a `long` one by dots before the result of two operations), `reflect` (some
steps wrong at first, then `W` and the right one), `filler` (only dots) and `direct` (none).

    python -m data.arithmetic        # prints examples of each
"""
import hashlib
import random
import signal
from typing import NamedTuple

STYLES = ("long", "short", "padded", "reflect", "filler", "direct")

# Operand counts seen in training; longer questions, and the domain that training never sees.
TRAINED = {"expr": (2, 3, 4), "sum": (2, 3, 4, 5), "modsum": (2, 3, 4)}
OOD = {"expr": (5, 6), "sum": (6, 7), "modsum": (5, 6), "diff": (3, 4)}

MODULUS = 97
MAX_OPERANDS, MAX_DIGITS = 8, 3
DIGITS = "0123456789"


class Question(NamedTuple):
    """One task. `state` is what steps reduce: a tree (op, left, right) of ints for `expr`, a tuple
    of ints for the other domains."""
    domain: str
    state: tuple
    text: str
    answer: str

    @property
    def operands(self):
        return count(self.state) if self.domain == "expr" else len(self.state)

    @property
    def trained(self):
        """Is this a domain and a size that training sees?"""
        return self.operands in TRAINED.get(self.domain, ())


# ------------------------------------------------------------------------------- values and text

def apply(op, a, b):
    if op == "+":
        return a + b
    return a - b if op == "-" else a * b

def value(node):
    return node if isinstance(node, int) else apply(node[0], value(node[1]), value(node[2]))

def count(node):
    """Leaves of a tree."""
    return 1 if isinstance(node, int) else count(node[1]) + count(node[2])

def show(node, top=True):
    """Tree -> text with every bracket but the outermost: a model need not learn precedence."""
    if isinstance(node, int):
        return str(node)
    text = f"{show(node[1], False)}{node[0]}{show(node[2], False)}"
    return text if top else f"({text})"

def fold(domain, numbers):
    """The result of merging `numbers` in a flat domain."""
    if domain == "diff":
        return numbers[0] - sum(numbers[1:])
    return sum(numbers) % MODULUS if domain == "modsum" else sum(numbers)

def chained(domain, numbers):
    """Numbers of a flat domain -> text."""
    return ("-" if domain == "diff" else "+").join(map(str, numbers))

def question(domain, state):
    """Builds a Question from a tree (`expr`) or a tuple of ints (the flat domains)."""
    if domain == "expr":
        return Question(domain, state, show(state), str(value(state)))
    text = chained(domain, state)
    if domain == "modsum":
        text += f"%{MODULUS}"
    return Question(domain, state, text, str(fold(domain, state)))

def part(q):
    """The question less its last operation: `((3+5)*2)-7` -> `(3+5)*2`, `12+7+30` -> `12+7`. None
    where that leaves no question, or as in `(3+5)*(2+4)` two of them."""
    if q.operands == 2:
        return None
    if q.domain != "expr":
        return question(q.domain, q.state[:-1])
    _, left, right = q.state
    if not isinstance(left, int) and not isinstance(right, int):
        return None
    return question(q.domain, right if isinstance(left, int) else left)

def onward(q, v):
    """What the question's last operation makes of v, in place of the value of `part(q)`: text, None
    where that is out of bounds or the answer all the same."""
    if q.domain == "expr":
        op, left, right = q.state
        answer = apply(op, left, v) if isinstance(left, int) else apply(op, v, right)
    else:
        answer = fold(q.domain, (v, q.state[-1]))
    bounded = q.domain != "expr" or 0 <= answer < 100
    return str(answer) if bounded and str(answer) != q.answer else None

def digits(q):
    """How many digits a question's numbers have, and in `expr` its partial results. 0 in `modsum`,
    where large numbers are no rarer than others."""
    def inside(node):
        below = 0 if isinstance(node, int) else inside(node[1]) + inside(node[2])
        return len(str(value(node))) + below
    if q.domain == "expr":
        return inside(q.state)
    return 0 if q.domain == "modsum" else sum(len(str(n)) for n in q.state)

def canonical(q):
    """One text for all questions that differ only in how sums and differences, or products, are
    ordered and grouped: `3+(5-2)` and `(5+3)-2` are both `+3+5-2`."""
    def terms(node, sign="+"):
        if isinstance(node, int) or node[0] == "*":
            return [sign + "*".join(sorted(factors(node)))]
        other = "-" if sign == "+" else "+"
        return terms(node[1], sign) + terms(node[2], sign if node[0] == "+" else other)

    def factors(node):
        if isinstance(node, int):
            return [str(node)]
        if node[0] == "*":
            return factors(node[1]) + factors(node[2])
        return [f"({''.join(sorted(terms(node)))})"]

    if q.domain == "expr":
        return "".join(sorted(terms(q.state)))
    if q.domain == "diff":
        return q.text
    return question(q.domain, tuple(sorted(q.state, key=str))).text

def split(q):
    """'train', 'val', 'test' or 'ood'. A hash of the canonical form decides, so the splits are
    disjoint for every seed."""
    if not q.trained:
        return "ood"
    digest = hashlib.blake2b(canonical(q).encode(), digest_size=4).digest()
    share = int.from_bytes(digest, "big") / 2**32
    if share < 0.10:
        return "test"
    return "val" if share < 0.15 else "train"


# ------------------------------------------------------------------------------------- questions

def _tree(rng, n):
    """A random tree of n leaves 1..9 with every value in 0..99 -> (node, value)."""
    if n == 1:
        leaf = rng.randint(1, 9)
        return leaf, leaf
    k = rng.randint(1, n - 1)
    left, a = _tree(rng, k)
    right, b = _tree(rng, n - k)

    # Where a + b > 99, a * b is too, or one of them is 1.
    if a + b > 99:
        op = "-"
    else:
        op = rng.choice("+-*" if a * b < 100 else "+-")
    if op == "-" and a < b:
        left, right, a, b = right, left, b, a
    return (op, left, right), apply(op, a, b)

def _bounded(node):
    """Has every value of a tree 1 to MAX_DIGITS digits and no sign?"""
    if not 0 <= value(node) < 10**MAX_DIGITS:
        return False
    return isinstance(node, int) or _bounded(node[1]) and _bounded(node[2])

def _state(rng, domain, operands):
    """A random tree, or a tuple of addends or subtrahends; None where a draw is out of bounds."""
    if domain == "expr":
        return _tree(rng, operands)[0]
    if domain == "diff":
        rest = [rng.randint(1, 30) for _ in range(operands - 1)]
        first = rng.randint(min(99, sum(rest)), 99)
        return (first, *rest) if sum(rest) <= 99 else None
    addends = range(1, 31) if domain == "sum" else range(MODULUS)
    return tuple(rng.sample(addends, operands))

def draw(rng, domain, operands, part="train"):
    """A random question of a domain and an operand count from one split. ValueError if that split
    cannot hold it."""
    if domain not in OOD:
        raise ValueError(f"unknown domain {domain!r}: choose from {', '.join(OOD)}")
    if not 2 <= operands <= MAX_OPERANDS:
        raise ValueError(f"operands must be 2..{MAX_OPERANDS}, not {operands}")
    if (part == "ood") == (operands in TRAINED.get(domain, ())):
        raise ValueError(f"{domain} with {operands} operands is not in the split {part!r}")
    while True:
        state = _state(rng, domain, operands)
        if state is None:
            continue
        q = question(domain, state)
        if split(q) == part:
            return q


class _Reader:
    """A recursive-descent parser of sums and products, with bounds. Nothing is evaluated."""

    def __init__(self, text):
        self.text, self.i = text, 0

    def next(self):
        return self.text[self.i:self.i + 1]

    def atom(self):
        """A number, or a bracket."""
        if self.next() == "(":
            self.i += 1
            node = self.chain("+-")
            if self.next() != ")":
                raise ValueError(f"a bracket is not closed in {self.text!r}")
            self.i += 1
            return node
        begin = self.i
        while self.next().isdigit():
            self.i += 1
        if not 1 <= self.i - begin <= MAX_DIGITS:
            raise ValueError(f"a number of 1 to {MAX_DIGITS} digits is expected at position "
                             f"{begin + 1} of {self.text!r}")
        return int(self.text[begin:self.i])

    def part(self, ops):
        """What stands between operators: products between + and -, atoms between *."""
        return self.chain("*") if ops == "+-" else self.atom()

    def chain(self, ops):
        node = self.part(ops)
        while self.next() and self.next() in ops:
            op = self.next()
            self.i += 1
            node = (op, node, self.part(ops))
        return node


def parse(text):
    """Reads a question in ordinary notation (spaces allowed, `*` binds tighter, `%97` at the end)
    -> Question. ValueError says what is wrong."""
    s = "".join(text.split())
    if not s:
        raise ValueError("the question is empty")
    for c in s:
        if c not in DIGITS + "+-*()%":
            raise ValueError(f"the question has a character that the model does not know: {c!r}")
    if len(s) > 99:
        raise ValueError("the question is longer than 99 characters")

    domain = "modsum" if s.endswith(f"%{MODULUS}") else None
    s = s[:-3] if domain else s
    reader = _Reader(s)
    node = reader.chain("+-")
    if reader.i < len(s):
        raise ValueError(f"{s[reader.i]!r} at position {reader.i + 1} of {s!r} is not understood")
    n = count(node)
    if not 2 <= n <= MAX_OPERANDS:
        raise ValueError(f"a question has 2 to {MAX_OPERANDS} operands, this one has {n}")
    if not _bounded(node):
        raise ValueError(f"a value in {text!r} is negative or has more than {MAX_DIGITS} digits")

    flat = not set(s) & set("()*")
    if domain and (not flat or "-" in s):
        raise ValueError(f"only sums can be taken modulo {MODULUS}")
    if flat and "-" not in s and (domain or n > 2):
        return question(domain or "sum", tuple(map(int, s.split("+"))))
    if flat and "+" not in s and n > 2:
        return question("diff", tuple(map(int, s.split("-"))))
    return question("expr", node)


# ---------------------------------------------------------------------------------- trajectories

def _ready(domain, state, ops):
    """Handles of the parts of `state` that one step of exactly `ops` (1 or 2) operations can
    reduce: paths in a tree, indices in a tuple."""
    if domain == "diff":
        return [tuple(range(ops + 1))] if len(state) > ops else []
    if domain != "expr":
        k = len(state)
        pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        if ops == 1:
            return pairs
        return [(i, j, m) for i, j in pairs for m in range(j + 1, k)]
    if isinstance(state, int):
        return []
    if count(state) == ops + 1:
        return [()]
    return [(side, *path) for side in (1, 2) for path in _ready(domain, state[side], ops)]

def _read(domain, state, handle):
    """-> (left side of the step as text, its value)."""
    if domain == "expr":
        for side in handle:
            state = state[side]
        return show(state), value(state)
    numbers = [state[i] for i in handle]
    return chained(domain, numbers), fold(domain, numbers)

def _put(domain, state, handle, v):
    """`state` with the part at `handle` replaced by the number v."""
    if domain != "expr":
        kept = [i for i in range(len(state)) if i == handle[0] or i not in handle]
        return tuple(v if i == handle[0] else state[i] for i in kept)
    if not handle:
        return v
    new = list(state)
    new[handle[0]] = _put(domain, state[handle[0]], handle[1:], v)
    return tuple(new)

def _last(domain, state):
    return isinstance(state, int) if domain == "expr" else len(state) == 1

def _near(rng, v):
    """A wrong value near v, within 0..96 wherever v is: the kind of slip that a model makes."""
    while True:
        w = v + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
        if 0 <= w < MODULUS or w >= 0 and v >= MODULUS:
            return w

def steps(q, rng, style="long", wrong_at=None, p_wrong=0.3):
    """A random trajectory of the question -> (list of step texts, the answer it implies).

    wrong_at=k gives step k a wrong result and goes on from it consistently, so that the implied
    answer may differ from q.answer: `corrupt` is the careful front door. p_wrong: how often a
    `reflect` step is wrong at first."""
    if style == "direct":
        return [], q.answer
    if style == "filler":
        return ["." * len(trajectory(q, rng))], q.answer
    if style == "padded":
        ts, answer = steps(q, rng, "short")
        dots = len(trajectory(q, rng)) - len(";".join(ts))
        k = max(range(len(ts)), key=lambda i: sum(c in "+-*" for c in ts[i]))
        ts[k] = ts[k].replace("=", "=" + "." * dots)
        return ts, answer
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose from {', '.join(STYLES)}")

    out, state = [], q.state
    while not _last(q.domain, state):
        handles = _ready(q.domain, state, 2) if style == "short" else []
        handles = handles or _ready(q.domain, state, 1)
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

def trajectory(q, rng, style="long"):
    """A random correct trajectory as one text."""
    return ";".join(steps(q, rng, style)[0])

def corrupt(q, rng, wrong_at=None):
    """A `long` trajectory with one wrong result (a random step, or step `wrong_at`, negative from
    the end), consistent after it.

    -> (steps, implied answer), the implied answer non-negative and not the true one; or None if 50
    draws found none (an early slip can cancel, as in `0*x`)."""
    n = q.operands - 1
    for _ in range(50):
        k = rng.randrange(n) if wrong_at is None else wrong_at % n
        ts, implied = steps(q, rng, wrong_at=k)
        values = [number(t.split("=")[1]) for t in ts]
        small = None not in values and (q.domain != "expr" or max(values) < 100)
        if implied != q.answer and small:
            return ts, implied
    return None

def distinct(q, rng, n, style="long"):
    """n different correct trajectories of one question, as lists of steps. ValueError if 200 n
    draws do not find them."""
    texts = {}
    for _ in range(200 * n):
        ts = steps(q, rng, style)[0]
        texts.setdefault(";".join(ts), ts)
        if len(texts) == n:
            return list(texts.values())
    raise ValueError(f"{q.text} has fewer than {n} distinct {style} trajectories "
                     f"({len(texts)} found)")


# ----------------------------------------------------------------------------- verifier, checker

def number(text):
    """Plain ASCII digits, at most MAX_DIGITS of them, no leading zero -> int; anything else ->
    None. Nothing is evaluated."""
    plain = 1 <= len(text) <= MAX_DIGITS and all(c in DIGITS for c in text)
    if not plain or text != "0" and text[0] == "0":
        return None
    return int(text)

def verify(q, answer):
    """Is `answer` (text) the answer of the question?"""
    return number(answer) is not None and answer == q.answer

def reward(q, output):
    """The paper's reward (Eq. 21) of what a model wrote after `<think>`, special tokens spelt out:
    `t</think>a<eos>`.

    1: right and in form; 0: wrong, in form; -0.5: right (the last number in it), out of form; -1:
    wrong and out of form. In form is one `</think>`, one `<eos>`, at the end, and a plain number
    between them."""
    body, end, rest = output.partition("<eos>")
    _, mark, answer = body.partition("</think>")
    if end and not rest and mark and number(answer) is not None:
        return 1.0 if verify(q, answer) else 0.0
    numbers = "".join(c if c in DIGITS else " " for c in output[-99:]).split()
    return -0.5 if numbers and verify(q, numbers[-1]) else -1.0

def _after(q, states, step):
    """The states that a step's text `left=result` can lead to from any of `states`."""
    left, _, result = step.partition("=")
    v, after = number(result.lstrip(".")), set()
    if v is None:
        return after
    for state in states:
        for handle in (*_ready(q.domain, state, 1), *_ready(q.domain, state, 2)):
            if _read(q.domain, state, handle) == (left, v):
                after.add(_put(q.domain, state, handle, v))
    return after

def check(q, trajectory):
    """One verdict a step of a trajectory's text: may this part be reduced now, and is its result
    right? -> list of bool, empty for an empty trajectory.

    `a=1Wa=2` counts as right if the slip is wrong, the correction right; dots before a result say
    nothing. Equal parts of a tree look the same in text, so every state that fits the steps so far
    is kept. After a wrong step the state is unknown: everything after it is False. The last step is
    also False if it leaves the question unfinished."""
    if not trajectory:
        return []
    states, verdicts = {q.state}, []
    for part in trajectory.split(";"):
        *slips, step = part.split("W")
        states = _after(q, states, step)
        left, _, result = step.partition("=")
        for slip in slips:
            slip_left, _, slip_result = slip.partition("=")
            if slip_left != left or number(slip_result) in (None, number(result)):
                states = set()
        verdicts.append(bool(states))
    verdicts[-1] = verdicts[-1] and any(_last(q.domain, s) for s in states)
    return verdicts


def print_examples():
    """Prints a question and its trajectories of every kind, for every domain."""
    rng = random.Random(0)
    for domain in OOD:
        n = TRAINED.get(domain, OOD[domain])[-1]
        q = draw(rng, domain, n, "test" if domain in TRAINED else "ood")
        print(f"{domain}, {n} operands: {q.text} -> {q.answer}")
        for style in STYLES:
            print(f"  {style:8} {trajectory(q, rng, style)}")
        print(f"  {'corrupt':8} {';'.join(corrupt(q, rng)[0])}")

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                  # `| head` closes our output
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print_examples()
