"""Does one training do better than another? Arms of the reader's own, held against the first.

    python analyze.py compare --arm="--steps=300" --arm="short: --steps=300 --style=short"

An arm is flags of train.py, or of meta.py, named first; `|` stands between stages, and a name may
stand before a colon. Intervals are of 95 %, over seeds (Student's).
"""
import os
import re

from experiments.arms import words_of
from experiments.trainings import Comparison, draw_arms, show_arms
from lab.flags import fail
from lab.verdict import over_seeds, unseen

CLAIM = "a comparison of trainings"
TRAINS, draw = True, draw_arms


def named(arms: tuple):
    """Names arms by a name before a colon or by how they differ -> ({name: flags}, their start)."""
    given = [re.fullmatch(r"(?:([^-=:|][^=:|]*):)?(.*)", arm, re.S).groups() for arm in arms]
    shared, found = os.path.commonprefix([flags.split() for _, flags in given]), {}
    for name, flags in given:
        name = name or " ".join(flags.split()[len(shared):]).replace("|", "then") or "plain"
        found[re.sub(r"[^\w .,:;=+*/()'-]", "_", name.strip())] = flags
    if len(found) < len(arms):
        fail(f"two of these arms have one name: {'; '.join(arms)}")
    return found, " ".join(shared)

def measure(c, runs):
    (arms, shared), cells = named(c.arm), c.cells or "expr:5,6"
    last = {words_of(flags)[-1][0] for flags in arms.values()}
    if "meta.py" in last and re.search("sum|chain", cells):
        fail(f"--cells={cells}: arms of meta.py are asked 'expr' only")
    metrics = {"sibling": "", "beyond": ", an operation beyond"}
    if last != {"meta.py"}:
        metrics = {"exact": "", "direct": ", in the head"}
    parts = {name + way: [(name, [*arms][0], metric, cells)]
             for metric, way in metrics.items() for name in [*arms][1:]}
    one = Comparison("", CLAIM, {cells: arms}, parts)
    return one, one.measure(c, runs), shared

def judge(raw):
    one, found, shared = raw
    verdicts, (arms, _) = {}, *found.values()
    for part, [(a, b, metric, _)] in one.parts.items():
        verdicts[part] = sentence(arms[a].scores[metric], arms[b].scores[metric], b)
    return verdicts, one.judge(found)[1] | {"shared": shared}

def sentence(scores, others, first: str) -> str:
    """Says what an arm's scores (seeds, questions), beside the first arm's, allow to be said."""
    gap = scores - others
    n, (mean, low, high) = len(gap), (100 * float(x) for x in over_seeds(gap))
    if not scores.any() and not others.any():
        return f"it and {first} are both too weak to compare: none is ever right (more --steps)"
    if not gap.any():
        return f"right just where {first} is: ask something harder, or easier (--cells)"
    if n < 2:
        return f"{mean:+.1f} points against {first} in one seed, which says nothing (--seeds=5)"
    loose = "; with two seeds this is loose (--seeds=5)" * (n == 2)
    if low <= 0 <= high:
        return (f"no difference to {first} can be told: with {n} seeds and {gap.shape[1]} "
                f"questions one below {unseen(low, high):.0f} points would go unseen{loose}")
    word, ends = "better" if mean > 0 else "worse", sorted((abs(low), abs(high)))
    return (f"{abs(mean):.1f} points {word} than {first} [{ends[0]:.1f}, {ends[1]:.1f}], in "
            f"{sum(gap.mean(1) * mean > 0)} of {n} seeds{loose}")

def show(numbers) -> list:
    (cells, metric), (asked,) = numbers["shown"][0], numbers["asked"].values()
    times = [arm["seconds"] for arm in asked["arms"].values()]
    note = f"note: training took from {min(times)} to {max(times)} s: time differs, too"
    return [f"all arms begin with: {numbers['shared'] or 'nothing'}",
            *show_arms(numbers | {"shown": [(cells, metric)]}),
            *[note] * (max(times) > 1.2 * min(times))]
