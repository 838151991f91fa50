"""From one number a question to a verdict: intervals, and the one rule of every criterion."""
import numpy as np

# Where curves of any length are compared: fractions of a trajectory.
FRACTION = np.linspace(0, 1, 41)


def bootstrap(values, statistic=np.mean, draws=2000):
    """A statistic over the first axis and its 95 % percentile interval -> (estimate, low, high)."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    n = len(values)
    again = [statistic(values[rng.integers(0, n, n)], axis=0) for _ in range(draws)]
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    return statistic(values, axis=0), low, high

def interval(values, statistic=np.mean):
    """[estimate, low, high] of a list of numbers, rounded for JSON; None for an empty list."""
    if len(values) == 0:
        return None
    return [round(float(x), 4) for x in bootstrap(values, statistic)]

def crossed(values):
    """[mean, low, high] of (seeds, questions) values: the bootstrap resamples both."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    seeds, questions = values.shape
    again = []
    for _ in range(1000):
        rows = rng.integers(0, seeds, seeds)
        columns = rng.integers(0, questions, questions)
        again.append(values[np.ix_(rows, columns)].mean())
    low, high = np.quantile(again, (0.025, 0.975))
    return [round(float(x), 4) for x in (values.mean(), low, high)]

def decide(margins, statistic=np.mean):
    """Margins {name: numbers, above 0 where the claim holds} -> (verdict, {name: interval}).

    A number a question, or (seeds, questions). Supported: every 95 % interval lies above 0.
    Refuted: one lies below. Else inconclusive. ValueError where there is nothing to decide on."""
    if any(len(margin) == 0 for margin in margins.values()):
        raise ValueError("a margin without numbers decides nothing")
    intervals = {}
    for name, margin in margins.items():
        over_seeds = np.ndim(margin) == 2
        intervals[name] = crossed(margin) if over_seeds else interval(margin, statistic)
    if all(low > 0 for _, low, _ in intervals.values()):
        return "supported", intervals
    if any(high < 0 for _, _, high in intervals.values()):
        return "refuted", intervals
    return "inconclusive", intervals

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
    """Share of a curve's fall that its largest 5 % of steps make: 0.05 is a slope, 1 a cliff, more
    where it also rises.

    None where the curve does not fall by `least`."""
    whole = y[0] - y[-1]
    if whole <= least:
        return None
    falls = np.sort(-np.diff(y))[::-1]
    largest = max(1, round(0.05 * len(falls)))
    return float(falls[:largest].sum() / whole)
