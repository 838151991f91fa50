"""Does one training do better than another? Arms of the reader's own, held against the first.

    python analyze.py compare --arm="--steps=300" --arm="short: --steps=300 --style=short"

An arm is flags of train.py, or of meta.py, named first; `|` stands between stages, and a name may
stand before a colon. Intervals are of 95 %, over seeds (Student's).
"""
import os
import re

from experiments.arms import words_of
from experiments.trainings import Comparison, draw_arms
from lab.flags import fail
from lab.verdict import over_seeds, t_quantile

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
    metrics = ["sibling", "beyond"] if last == {"meta.py"} else ["exact", "direct"]
    parts = {f"{name}, {metric}": [(name, [*arms][0], metric, cells)]
             for metric in metrics for name in [*arms][1:]}
    one = Comparison("", CLAIM, {cells: arms}, parts)
    return one, one.measure(c, runs), shared

def judge(raw):
    one, found, shared = raw
    verdicts, (arms, _) = {}, *found.values()
    for part, [(a, b, metric, _)] in one.parts.items():
        verdicts[part] = sentence(arms[a].scores[metric] - arms[b].scores[metric], b)
    return verdicts, one.judge(found)[1] | {"shared": shared}

def sentence(gap, first: str) -> str:
    """Says what differences (seeds, questions) to the first arm allow to be said."""
    n, (mean, low, high) = len(gap), (100 * float(x) for x in over_seeds(gap))
    if not gap.any():
        return f"right just where {first} is: ask something harder, or easier (--cells)"
    if n < 2:
        return f"{mean:+.1f} points against {first} in one seed, which says nothing (--seeds=5)"
    if low <= 0 <= high:
        unseen = (high - mean) * (1 + t_quantile(0.8, n - 1) / t_quantile(0.975, n - 1))
        return (f"no difference to {first} can be told: with {n} seeds and {gap.shape[1]} "
                f"questions one below {unseen:.0f} points would go unseen")
    word, ends = "better" if mean > 0 else "worse", sorted((abs(low), abs(high)))
    return (f"{abs(mean):.1f} points {word} than {first} [{ends[0]:.1f}, {ends[1]:.1f}], in "
            f"{sum(gap.mean(1) * mean > 0)} of {n} seeds")

def show(numbers) -> list:
    (_, metric), (asked,) = numbers["shown"][0], numbers["asked"].values()
    lines = [f"all arms begin with: {numbers['shared'] or 'nothing'}"]
    for name, arm in asked["arms"].items():
        mean, low, high = (100 * x for x in arm["scores"][metric]["mean"])
        lines.append(f"{name:40} {mean:5.1f} % right [{low:.1f}, {high:.1f}]; a seed took "
                     f"{arm['seconds']} s and {arm['tokens']} tokens")
    return lines
