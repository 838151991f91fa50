"""What a question, a trajectory and an answer are. Plain Python, plain text, no model.

Every value is a digit: arithmetic modulo 10, only the last digit is kept. A question is a task:
`((3+5)*2)-7`. Its trajectory is a list of states. A state is what is left of the question after one
more operation, so the last state is the answer: `(8*2)-7;6-7;9`. States are joined by `;`. There
are three domains:

  expr    nested brackets, + - *              ((3+5)*2)-7
          a step does any operation that is ready
  sum     a flat sum                          3+5+2+7
          a step adds the first two
  chain   a flat chain, never trained on      3-5+2-7
          a step does the first operation

and seven styles of trajectory: `states` (one operation per state), `orders` (the same, but of a sum
a step adds any two neighbours: six addends have 120 orders), `short` (two operations), `reflect`
(some states wrong at first, then `W` and the right one), `steps` (`3+5=8;8*2=6;6-7=9`: what was
done instead of what is left), `filler` (only dots) and `direct` (nothing).

A hash splits questions of three operands and more into training, validation and test. Two operands
are the 300 facts of the toy, which everybody may learn.

    python -m data.arithmetic        # prints examples of each
"""
import functools
import hashlib
import random
import re
from typing import NamedTuple

STYLES = ("states", "orders", "short", "reflect", "steps", "filler", "direct")

# Operand counts seen in training, and those that are tested.
TRAINED = {"expr": (2, 3, 4, 5, 6), "sum": (2, 3, 4, 5, 6)}
TESTED = {"expr": (3, 4, 5, 6, 7, 8), "sum": (5, 6, 7, 8), "chain": (3, 4, 5)}

MAX_OPERANDS = 12
P_SLIP = 0.3                        # how often a state of `reflect` is wrong at first

# The operations that are ready in a state, by domain. Those of `sum` overlap: 3+5+2.
READY = {"expr": re.compile(r"\((\d[-+*]\d)\)|^(\d[-+*]\d)$"),
         "sum": re.compile(r"(?=(\d\+\d))"),
         "chain": re.compile(r"^(\d[-+*]\d)")}


class Question(NamedTuple):
    """One task: its domain, its text, and its answer, a digit as text."""
    domain: str
    text: str
    answer: str

    @property
    def operands(self) -> int:
        return operands(self.text)


def trained(domain: str, operands: int, counts: tuple = ()) -> bool:
    """Does training see this domain and size, with these operand counts beside the usual ones?"""
    return domain in TRAINED and operands in (*TRAINED[domain], *counts)


# ------------------------------------------------------------------------------- values and text

def apply(op: str, a: int, b: int) -> int:
    """Does one operation modulo 10."""
    if op == "+":
        return (a + b) % 10
    return (a - b) % 10 if op == "-" else a * b % 10

def value(node) -> int:
    """Calculates a tree (op, left, right) of digits."""
    return node if isinstance(node, int) else apply(node[0], value(node[1]), value(node[2]))

def show(node, top: bool = True) -> str:
    """Writes a tree with every bracket but the outermost: a model need not learn precedence."""
    if isinstance(node, int):
        return str(node)
    text = f"{show(node[1], False)}{node[0]}{show(node[2], False)}"
    return text if top else f"({text})"

def operands(text: str) -> int:
    """Counts the digits of a question or state."""
    return sum(map(text.count, "0123456789"))

def tree(text: str):
    """Reads a question or state -> its tree. ValueError says what is wrong."""
    node, end = _chain(text, 0, "+-")
    if end < len(text):
        raise ValueError(f"{text[end]!r} at position {end + 1} of {text!r} is not understood")
    return node

def _chain(text, i, ops):
    """Reads operands between `ops` from position i on, products between + and -, atoms between *
    -> (tree, the position after it). Nothing is evaluated."""
    inner = (lambda j: _chain(text, j, "*")) if ops == "+-" else (lambda j: _atom(text, j))
    node, i = inner(i)
    while i < len(text) and text[i] in ops:
        right, end = inner(i + 1)
        node, i = (text[i], node, right), end
    return node, i

def _atom(text, i):
    """Reads a digit or a bracket."""
    c = text[i:i + 1]
    if c == "(":
        node, i = _chain(text, i + 1, "+-")
        if text[i:i + 1] != ")":
            raise ValueError(f"a bracket is not closed in {text!r}")
        return node, i + 1
    if not c or c not in "0123456789":
        raise ValueError(f"a digit is expected at position {i + 1} of {text!r}")
    following = text[i + 1:i + 2]
    if following and following in "0123456789":
        raise ValueError(f"{text!r} has a number of two digits: this toy knows 0 to 9 only")
    return int(c), i + 1

def question(domain: str, text: str) -> Question:
    """Builds a Question and calculates its answer."""
    return Question(domain, text, str(value(tree(text))))

def parse(text: str) -> Question:
    """Reads a question in ordinary notation (spaces allowed, `*` binds tighter) -> Question.
    ValueError says what is wrong."""
    if re.search(r"\d\s+\d", text):
        raise ValueError(f"{text!r} has two numbers without an operation between them")
    s = "".join(text.split())
    if not s:
        raise ValueError("the question is empty")
    for c in s:
        if c not in "0123456789+-*()":
            raise ValueError(f"the question has a character that the model does not know: {c!r}")
    if len(s) > 99:
        raise ValueError("the question is longer than 99 characters")
    node, n = tree(s), operands(s)
    if not 2 <= n <= MAX_OPERANDS:
        raise ValueError(f"a question has 2 to {MAX_OPERANDS} operands, this one has {n}")
    if n == 2 or set(s) & set("()*"):
        return question("expr", show(node))
    return question("chain" if "-" in s else "sum", s)


# ----------------------------------------------------------------------------------------- splits

@functools.lru_cache(1 << 16)
def canonical(text: str) -> str:
    """Writes one text for all questions that differ only in how sums and differences, or products,
    are ordered and grouped: `3+(5-2)` and `(5+3)-2` are both `+3+5-2`."""
    return "".join(sorted(_terms(tree(text), "+")))

def _terms(node, sign):
    if isinstance(node, int) or node[0] == "*":
        return [sign + "*".join(sorted(_factors(node)))]
    other = "-" if sign == "+" else "+"
    return _terms(node[1], sign) + _terms(node[2], sign if node[0] == "+" else other)

def _factors(node):
    if isinstance(node, int):
        return [str(node)]
    if node[0] == "*":
        return _factors(node[1]) + _factors(node[2])
    return [f"({''.join(sorted(_terms(node, '+')))})"]

def split(text: str) -> str:
    """Tells whether a question or state is for 'train', 'val' or 'test'. A hash of the canonical
    form decides, so the splits are disjoint for every seed, domain and size."""
    if operands(text) <= 2:
        return "train"
    digest = hashlib.blake2b(canonical(text).encode(), digest_size=4).digest()
    share = int.from_bytes(digest, "big") / 2**32
    if share < 0.10:
        return "test"
    return "val" if share < 0.15 else "train"

def leaks(*texts: str) -> bool:
    """Tells whether a held-out question stands in one of these texts, as a question, as a state or
    between any other characters: `3+5+2=0`. What cannot be read, as a model may write it, is
    none."""
    for text in texts:
        for run in re.findall(r"[-+*()\d]+", text, re.ASCII):
            try:
                if split(run) != "train":
                    return True
            except ValueError:
                continue
    return False


# ------------------------------------------------------------------------------------- questions

def _tree(rng, n, ops):
    """Draws a tree of n digits."""
    if n == 1:
        return int(10 * rng.random())
    k = 1 + int((n - 1) * rng.random())
    return rng.choice(ops), _tree(rng, k, ops), _tree(rng, n - k, ops)

def draw(rng: random.Random, domain: str, n: int, part: str = "train", ops: str = "+-*"):
    """Draws a Question of a domain with n operands from one split ('train', 'val' or 'test'); ops:
    the operations of `expr`. ValueError if there is none."""
    if domain not in TESTED or not 2 <= n <= MAX_OPERANDS or n == 2 and part != "train":
        raise ValueError(f"there is no {domain!r} with {n} operands in the split {part!r}")
    while True:
        if domain == "expr":
            text = show(_tree(rng, n, ops))
        else:
            text = str(rng.randrange(10))
            for _ in range(n - 1):
                text += ("+" if domain == "sum" else rng.choice("+-")) + str(rng.randrange(10))
        if split(text) == part:
            return question(domain, text)

def lesson(rng, domain, n, style="states", ops="+-*"):
    """Draws what training may show: a Question with a trajectory of which no state is held out ->
    (Question, list of states)."""
    while True:
        q = draw(rng, domain, n, ops=ops)
        states = steps(q, rng, style)[0]
        if not leaks(*states):
            return q, states


# ------------------------------------------------- questions that a trajectory helps to answer

def join(op: str, left: str, right: str) -> Question:
    """Writes `left op right` as a question of `expr`."""
    return question("expr", show((op, tree(left), tree(right))))

def root(q: Question):
    """Takes a question of `expr` apart at its last operation -> (op, left, right), two texts."""
    op, left, right = tree(q.text)
    return op, show(left), show(right)

def brackets(text: str) -> dict:
    """Calculates every bracket of a question that is no held-out question itself -> {position of
    its `)`: its value as text}."""
    opened, values = [], {}
    for i, c in enumerate(text):
        if c == "(":
            opened.append(i)
        if c == ")":
            inside = text[opened.pop() + 1:i]
            if split(inside) == "train":
                values[i] = str(value(tree(inside)))
    return values

def relatives(q: Question) -> dict:
    """Lists what can be answered from the last two results of a trajectory of q = A op B, whose
    last but one state is `a op b` -> {kind: Question}.

    `sibling` is another operation on them, `swapped` the other order, `left` and `right` are A and
    B where they are questions themselves."""
    op, A, B = root(q)
    other = {"+": "-", "-": "*", "*": "+"}
    third = {"+": "*", "-": "+", "*": "-"}
    kinds = {"sibling": join(other[op], A, B), "sibling2": join(third[op], A, B),
             "swapped": join("-", B, A)}
    for kind, side in (("left", A), ("right", B)):
        if len(side) > 1:
            kinds[kind] = question("expr", side)
    return kinds

def beyond(q: Question, rng: random.Random) -> Question:
    """Goes an operation beyond q, on either side: after `8-7` ask `(8-7)*4`, or `4*(8-7)`."""
    digit, op = str(rng.randrange(10)), rng.choice("+-*")
    return join(op, q.text, digit) if rng.random() < 0.5 else join(op, digit, q.text)


# ---------------------------------------------------------------------------------- trajectories

def ready(domain: str, state: str) -> list:
    """Lists the operations that one step can do -> [(operation, (first, end) of what it
    replaces)]."""
    found = []
    for match in READY[domain].finditer(state):
        operation = match[match.lastindex]
        first = match.start()
        end = first + (len(match[0]) or len(operation))     # a look-ahead takes no room
        found.append((operation, (first, end)))
    return found

def put(state: str, place: tuple, digit) -> str:
    """Writes a digit in place of an operation -> the state after it."""
    first, end = place
    return f"{state[:first]}{digit}{state[end:]}"

def result(operation: str) -> int:
    """Does an operation written as text, such as `3+5`."""
    return apply(operation[1], int(operation[0]), int(operation[2]))

def steps(q: Question, rng: random.Random, style: str = "states", wrong_at: int = None):
    """Draws a trajectory -> (list of its steps as texts, the answer it implies). ValueError for an
    unknown style.

    wrong_at=k makes a mistake in step k and goes on from it, so that the implied answer may be
    wrong: `corrupt` is the careful front door."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose from {', '.join(STYLES)}")
    if style == "direct":
        return [], q.answer
    if style == "filler":
        return ["." * len(trajectory(q, rng))], q.answer

    def chosen(state):
        found = ready(q.domain, state)
        return found[0] if q.domain == "sum" and style != "orders" else rng.choice(found)
    out, state = [], q.text
    while len(state) > 1:
        operation, place = chosen(state)
        right = result(operation)
        wrong = (right + rng.randint(1, 9)) % 10
        slip, digit = put(state, place, wrong), wrong if len(out) == wrong_at else right
        state = put(state, place, digit)
        if style == "short" and len(state) > 1:
            operation, place = chosen(state)
            state = put(state, place, result(operation))
        written = f"{operation}={digit}" if style == "steps" else state
        if style == "reflect" and rng.random() < P_SLIP:
            written = f"{slip}W{written}"
        out.append(written)
    return out, state

def room(n: int) -> int:
    """Counts the tokens of the longest output to a question of n operands: every state with a slip,
    the delimiter, the answer, the end. For two operands the style `steps` is longer."""
    longest = [1] + [4 * k - 5 for k in range(2, n)]        # `expr` has the most brackets
    return max(2 * sum(length + 1 for length in longest), len("3+5=8")) + 3

def trajectory(q: Question, rng: random.Random, style: str = "states") -> str:
    """Draws a correct trajectory as one text."""
    return ";".join(steps(q, rng, style)[0])

def corrupt(q: Question, rng: random.Random, style: str = "states", wrong_at: int = None):
    """Draws a trajectory with one mistake (in a random step, or step `wrong_at`, negative from the
    end), consistent after it -> (steps, implied answer), which is not the right one; None if 50
    draws find none (an early mistake can cancel, as in `0*x`)."""
    n = len(steps(q, rng, style)[0])
    for _ in range(50):
        k = rng.randrange(n) if wrong_at is None else wrong_at % n
        written, implied = steps(q, rng, style, k)
        if implied != q.answer:
            return written, implied
    return None


# ----------------------------------------------------------------------------- verifier, checker

def verify(q: Question, answer: str) -> bool:
    """Tells whether a text is the answer of the question."""
    return answer == q.answer

def reward(q: Question, output: str) -> float:
    """Gives the paper's reward (Eq. 21) for what a model wrote after `<think>`, special tokens
    spelt out: `t</think>a<eos>`.

    1: right and in form; 0: wrong, in form; -0.5: right (its last digit is), out of form; -1: wrong
    and out of form. In form is one `</think>`, one digit, and `<eos>` at the end."""
    form = re.fullmatch(r"[^<]*</think>(\d)<eos>", output, re.ASCII)
    if form:
        return 1.0 if verify(q, form[1]) else 0.0
    digits = re.findall(r"\d", output, re.ASCII)
    return -0.5 if digits and verify(q, digits[-1]) else -1.0

def _after(domain, states, step):
    """The states that a step's text can lead to from any of `states`, by one operation or two."""
    found = set()
    for state in states:
        for operation, place in ready(domain, state):
            one = put(state, place, result(operation))
            if step in (one, f"{operation}={result(operation)}"):
                found.add(one)
            twos = [put(one, later, result(op)) for op, later in ready(domain, one)]
            found.update(two for two in twos if two == step)
    return found

def check(q: Question, think: str) -> list:
    """Judges every step of a trajectory's text: does one allowed operation, or two, lead from the
    step before to it? -> list of bool, empty for an empty trajectory.

    `aWb` counts as right if a is wrong and b is right. Equal operations look alike in the style
    `steps`, so every state that fits the steps so far is kept. After a wrong step the state is
    unknown: everything after it is False. The last step is also False if it leaves the question
    unfinished."""
    if not think:
        return []
    states, verdicts = {q.text}, []
    for part in think.split(";"):
        *slips, step = part.split("W")
        if any(_after(q.domain, states, slip) for slip in slips):
            states = set()                          # what was taken back was right
        states = _after(q.domain, states, step)
        verdicts.append(bool(states))
    verdicts[-1] = any(len(state) == 1 for state in states)
    return verdicts


def print_examples():
    """Prints a question and its trajectories of every kind, for every domain."""
    rng = random.Random(0)
    for domain in TESTED:
        q = draw(rng, domain, 5, "test")
        print(f"{domain}: {q.text} -> {q.answer}")
        for style in STYLES:
            print(f"  {style:8} {trajectory(q, rng, style)}")
        print(f"  {'corrupt':8} {';'.join(corrupt(q, rng)[0])}")

if __name__ == "__main__":
    print_examples()
