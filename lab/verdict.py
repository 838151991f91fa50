"""From one number per question, or per seed, to a verdict: intervals, and the one rule of every
criterion."""
from statistics import NormalDist

import numpy as np

FEWEST = 20                         # questions that a criterion wants


def bootstrap(values, statistic=np.mean, draws=2000, level=0.95):
    """Gives a statistic over the first axis and its percentile interval -> (estimate, low, high).
    The statistic must know `axis`."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    n, again = len(values), []
    stack = max(1, 2**20 // values.size)                    # 8 MB of draws at a time
    for i in range(0, draws, stack):
        picks = rng.integers(0, n, (min(stack, draws - i), n))
        again.extend(statistic(values[picks], axis=1))
    low, high = np.quantile(again, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return statistic(values, axis=0), low, high

def wilson(values, level=0.95):
    """Wilson's score interval of a share, from truths -> (share, low, high): 200 right of 200 do
    not make [1, 1]."""
    n, p, z = len(values), np.mean(values), NormalDist().inv_cdf((1 + level) / 2)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return p, max(0, middle - half), min(1, middle + half)

def over_seeds(values, level=0.95):
    """Student's interval of the mean of one number per seed -> (mean, low, high). (seeds,
    questions) values are averaged over questions first; a single seed has no interval."""
    seeds = np.asarray(values, dtype=float)
    seeds = seeds.mean(1) if seeds.ndim == 2 else seeds
    n = len(seeds)
    if n < 2:
        return seeds.mean(), -np.inf, np.inf
    half = t_quantile((1 + level) / 2, n - 1) * seeds.std(ddof=1) / np.sqrt(n)
    return seeds.mean(), seeds.mean() - half, seeds.mean() + half

def unseen(low, high):
    """The difference that the next comparison of this kind sees in at least four of five cases, a
    tenth more than the interval's width: its own interval may well be wider (coverage.py)."""
    return 1.1 * (high - low)

def t_quantile(p: float, df: int) -> float:
    """Inverts Student's t distribution, for p > 1/2: its density integrated over angles, x =
    tan(angle)."""
    angle = np.linspace(0, np.pi / 2, 20_001)[:-1]
    density = (1 + np.tan(angle)**2 / df) ** (-(df + 1) / 2) / np.cos(angle)**2
    mass = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    return np.tan(np.interp((2 * p - 1) * mass[-1], mass, angle))

def estimate(values, statistic=np.mean, level=0.95):
    """The interval that fits the numbers: Wilson's for truths, Student's for (seeds, questions), a
    bootstrap over questions otherwise -> (estimate, low, high). values: or a pair of rows, one per
    question, and a statistic of theirs."""
    if isinstance(values, tuple):
        return bootstrap(*values, level=level)
    values = np.asarray(values)
    if values.ndim == 2:
        return over_seeds(values, level)
    if values.dtype == bool:
        return wilson(values, level)
    return bootstrap(values, statistic, level=level)

def interval(values, statistic=np.mean):
    """[estimate, low, high] rounded for JSON; None for an empty list."""
    if len(values) == 0:
        return None
    return [round(float(x), 4) if np.isfinite(x) else None for x in estimate(values, statistic)]

def decide(margins: dict, statistic=np.mean):
    """Turns margins {name: numbers, above 0 where the claim holds} into (verdict, {name:
    interval}). A number per question, (seeds, questions), or a pair as `estimate` takes it.

    Supported: every 95 % interval lies above 0. Refuted: one lies below, where intervals are
    widened for their number (Bonferroni), since any of them can refute. Else inconclusive. Not
    testable here: there are fewer questions than a criterion wants."""
    if any(len(margin[0]) < FEWEST if isinstance(margin, tuple) else np.shape(margin)[-1] < FEWEST
           for margin in margins.values()):
        return "not testable here", {}
    plain = {name: estimate(margin, statistic) for name, margin in margins.items()}
    wide = {name: estimate(margin, statistic, widened(len(margins)))
            for name, margin in margins.items()}
    if all(low > 0 for _, low, _ in plain.values()):
        verdict = "supported"
    else:
        verdict = "refuted" if any(high < 0 for _, _, high in wide.values()) else "inconclusive"
    return verdict, {name: interval(margin, statistic) for name, margin in margins.items()}

def decide_all(parts: dict):
    """`decide` for every part of a claim -> ({part: verdict}, {part: {name: interval}})."""
    decided = {part: decide(margins) for part, margins in parts.items()}
    verdicts = {part: verdict for part, (verdict, _) in decided.items()}
    return verdicts, {part: gaps for part, (_, gaps) in decided.items()}

def widened(n: int) -> float:
    """The level of intervals of which any of n can refute (Bonferroni)."""
    return 1 - 0.05 / n
