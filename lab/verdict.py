"""From one number a question to a verdict: intervals, and the one rule of every criterion."""
from statistics import NormalDist

import numpy as np

# Where curves of any length are compared: fractions of a trajectory.
FRACTION = np.linspace(0, 1, 41)


def bootstrap(values, statistic=np.mean, draws=2000, level=0.95):
    """A statistic over the first axis and its percentile interval -> (estimate, low, high). It must
    know `axis`: a stack of draws is given with the second."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    n, again = len(values), []
    stack = max(1, 2**20 // values.size)                    # 8 MB of them
    for i in range(0, draws, stack):
        picks = rng.integers(0, n, (min(stack, draws - i), n))
        again.extend(statistic(values[picks], axis=1))
    low, high = np.quantile(again, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return statistic(values, axis=0), low, high

def interval(values, statistic=np.mean, level=0.95):
    """[estimate, low, high] of a list of numbers, rounded for JSON; None for an empty list. Truths
    (bool) are a share, with Wilson's interval: 200 right of 200 do not make [1, 1]."""
    if len(values) == 0:
        return None
    share = np.asarray(values).dtype == bool
    found = wilson(values, level) if share else bootstrap(values, statistic, level=level)
    return [round(float(x), 4) for x in found]

def wilson(values, level=0.95):
    """Wilson's score interval of a share, from zeros and ones -> (share, low, high)."""
    n, p, z = len(values), np.mean(values), NormalDist().inv_cdf((1 + level) / 2)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return p, max(0, middle - half), min(1, middle + half)

def crossed(values, level=0.95, share=False):
    """[mean, low, high] of (seeds, questions) values, both of them random: a t interval over the
    two-way variance with Satterthwaite's degrees of freedom; for a share within [0, 1]."""
    values = np.asarray(values, dtype=float)
    S, Q = values.shape
    mean, seeds, questions = values.mean(), values.mean(1), values.mean(0)
    rest = values - seeds[:, None] - questions + mean
    freedom = np.maximum(1, [S - 1, Q - 1, (S - 1) * (Q - 1)])
    squares = np.array([Q * S * seeds.var(), S * Q * questions.var(), S * Q * rest.var()])
    parts = squares / freedom                               # mean squares
    variance = parts[0] + parts[1] - parts[2]
    df = variance**2 / max(1e-300, (parts**2 / freedom).sum())
    largest = parts[:2].argmax()
    if variance < parts[largest]:                           # the other effect seems below zero
        variance, df = parts[largest], freedom[largest]
    if variance == 0:
        low, high = wilson(questions, level)[1:] if share else (mean, mean)
    else:
        half = t_quantile((1 + level) / 2, df) * np.sqrt(variance / (S * Q))
        low, high = mean - half, mean + half
    if share:
        low, high = max(0, low), min(1, high)
    return [round(float(x), 4) for x in (mean, low, high)]

def t_quantile(p, df):
    """Of Student's t, for p > 1/2: its density integrated over angles, x = tan(angle)."""
    angle = np.linspace(0, np.pi / 2, 20_001)[:-1]
    density = (1 + np.tan(angle)**2 / df) ** (-(df + 1) / 2) / np.cos(angle)**2
    mass = np.concatenate(([0], np.cumsum(density[1:] + density[:-1])))
    return np.tan(np.interp((2 * p - 1) * mass[-1], mass, angle))

def decide(margins, statistic=np.mean):
    """Margins {name: numbers, above 0 where the claim holds} -> (verdict, {name: interval}).

    A number a question, or (seeds, questions). Supported: every 95 % interval lies above 0.
    Refuted: one lies below, where intervals are widened for their number (Bonferroni), since any
    of them can refute. Else inconclusive. ValueError where there is nothing to decide on."""
    if not margins or any(np.size(margin) == 0 for margin in margins.values()):
        raise ValueError("a margin without numbers decides nothing")

    def intervals(level):
        return {name: crossed(margin, level) if np.ndim(margin) == 2
                else interval(margin, statistic, level) for name, margin in margins.items()}
    plain, wide = intervals(0.95), intervals(1 - 0.05 / len(margins))
    if all(low > 0 for _, low, _ in plain.values()):
        return "supported", plain
    if any(high < 0 for _, _, high in wide.values()):
        return "refuted", plain
    return "inconclusive", plain

def worst(verdicts):
    """A claim on several domains holds where it holds in all of them."""
    ranking = ("refuted", "inconclusive", "supported")
    return min(verdicts, key=ranking.index)

def spoken(verdicts):
    """{part of a claim: verdict} -> one line."""
    return "; ".join(f"{part}: {verdict}" for part, verdict in verdicts.items())


# ---------------------------------------------------------------------------------------- curves

def on_fractions(curves):
    """Curves of any lengths -> (N, 41), linear between their points."""
    return np.stack([np.interp(FRACTION, np.linspace(0, 1, len(y)), y) for y in curves])

def banded(curves):
    """Curves of any lengths -> their mean and its 95 % band on FRACTION, for JSON."""
    summary = bootstrap(on_fractions(curves), draws=500)
    return dict(zip(("mean", "low", "high"), (np.round(y, 4).tolist() for y in summary)))

def spearman(y):
    """Rank correlation of a sequence with its own index, ties averaged; 0 where it is constant."""
    def rank(v):
        return np.array([(np.sum(v < x) + np.sum(v <= x) - 1) / 2 for x in v])
    a, b = rank(np.arange(len(y))), rank(np.round(y, 6))
    return float(np.corrcoef(a, b)[0, 1]) if b.std() else 0.0

def cliff(y, least=0.1):
    """Share of a sequence's fall that its largest single step makes: 1 / steps is an even slope, 1
    a cliff, more where it also rises.

    1 too where it does not fall by `least`: no slope either."""
    whole = y[0] - y[-1]
    if whole <= least:
        return 1.0
    return float(np.max(-np.diff(y)) / whole)
