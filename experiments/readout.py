"""What do the weights of theta' hold? Partial results, read out of its hidden units (Eq. 4)

theta' is moved along `3+5=8;8*2=16` and asked ((3+5)*2)-4. While it reads that question, without
any trajectory, a linear probe reads the results 8 and 16 from what enters every block, at the
bracket that closes their part of the question. It is fitted by ridge regression on questions of
the training split, a class a digit, and counts as right where both digits are.

For each of the two: supported if, at the best layer (chosen on validation questions), the probe
finds it more often in theta' than in theta, and than in theta' after another question's trajectory:
differences over held-out questions with 95 % bootstrap intervals above 0; refuted if one lies
below 0; else inconclusive. (Every condition has a probe of its own.)
"""
import random
from typing import NamedTuple

import numpy as np
import torch

from data import arithmetic, text
from data.tasks import Task
from lab.figure import COLOURS, panels, whiskers
from lab.flags import fail
from lab.verdict import decide, interval, spoken
from meta import adapted, another

CLAIM = "Eq. 4: the weights of theta' hold the partial results of the trajectory"
FITTED = 2000                               # questions that a probe is fitted on
RIDGE = 1.0
CONDITIONS = {                              # {whose hidden units: (label, colour)}
    "theta": (r"$\theta$", COLOURS["theta"]), "theta_prime": (r"$\theta'$", COLOURS["weights"]),
    "other": (r"$\theta'$, another's trajectory", COLOURS["other"])}
RESULTS = ("first", "last")


# --------------------------------------------------------------------------------------- measure

class Sample(NamedTuple):
    """Questions of four operands that are chains: the part of their part has two."""
    questions: list
    thinks: list                            # trajectories of the part
    solved: list                            # the part
    others: list                            # another one's trajectory and part


def measure(c, run):
    """-> {condition: {result: {layer: right? a held-out question}}}, and the layers chosen"""
    model, inner, config = run
    if config["domain"] != "expr" or "4" not in config["operands"].split(","):
        fail(f"{c.meta} was not trained on expr with 4 operands, whose partial results are read")
    rng = random.Random(f"{c.seed}/readout")
    samples = {part: sample(c, n, part, rng)
               for part, n in (("train", FITTED), ("val", c.questions), ("test", c.questions))}
    right, best = {}, {}
    for condition in CONDITIONS:
        units = {part: hidden(model, inner, s, condition, config["inner"])
                 for part, s in samples.items()}
        right[condition], best[condition] = {}, {}
        for j, result in enumerate(RESULTS):
            labels = {part: digits_of(s, j) for part, s in samples.items()}
            found = {layer: probe(units, labels, layer, j) for layer in units["test"]}
            best[condition][result] = max(found, key=lambda layer: found[layer]["val"].mean())
            right[condition][result] = {layer: row["test"] for layer, row in found.items()}
    return right, best

def sample(c, n, part, rng):
    """n questions of a split."""
    questions = {}
    while len(questions) < n:
        q = arithmetic.draw(rng, "expr", 4, part)
        less = arithmetic.part(q)
        if less and arithmetic.part(less):
            questions[q.text] = q
    qs = list(questions.values())
    solved = [arithmetic.part(q) for q in qs]
    thinks = [arithmetic.trajectory(q, rng) for q in solved]
    others = [another(q, solved[:200], rng) for q in solved]
    return Sample(qs, thinks, solved, [(arithmetic.trajectory(o, rng), o) for o in others])

@torch.no_grad()
def hidden(model, inner, s, condition, mode, size=256):
    """{block: what enters it at the brackets behind the first and the last result (N, 2, width)}"""
    units = {}
    for i in range(0, len(s.questions), size):
        qs = s.questions[i:i + size]
        pairs = list(zip(s.thinks, s.solved)) if condition == "theta_prime" else s.others
        tasks = [Task(q, [t], solved=part) for q, (t, part) in zip(qs, pairs[i:i + size])]
        fast = None if condition == "theta" else adapted(model, inner, tasks, mode)[0]
        ids = text.padded([text.prompt(q.text, "") for q in qs], device=model.head.weight.device)
        places = torch.tensor([brackets(q) for q in qs], device=ids.device)         # (N, 2)

        def keep(name, x, y):
            if name.endswith("qkv"):
                at = places[..., None].expand(-1, -1, x.size(-1))
                units.setdefault(int(name.split(".")[0]), []).append(x.gather(1, at))
            return y if fast is None else fast(name, x, y)
        h = model(ids, hook=keep)
        at = places[..., None].expand(-1, -1, h.size(-1))
        units.setdefault(model.config.layers, []).append(h.gather(1, at))
    return {layer: torch.cat(parts) for layer, parts in units.items()}

def brackets(q):
    """Places of the tokens that close the first and the last part of a question, `<bos>` being
    0."""
    last = arithmetic.part(q)
    first = arithmetic.part(last)
    return [1 + q.text.index(f"({part.text})") + len(part.text) + 1 for part in (first, last)]

def digits_of(s, j):
    """Tens and units of the first or the last partial result -> (N, 2)"""
    results = [int((arithmetic.part(q) if j == 0 else q).answer) for q in s.solved]
    return torch.tensor([[v // 10, v % 10] for v in results])

def probe(units, labels, layer, j):
    """A linear map from hidden units to two digits, fitted on `train` -> {'val', 'test': right?}"""
    def inputs(part):
        x = units[part][layer][:, j].double().cpu()
        return torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), 1)
    x = inputs("train")
    gram = x.T @ x + RIDGE * torch.eye(x.size(1), dtype=x.dtype)
    right = {part: np.ones(len(labels[part]), dtype=bool) for part in ("val", "test")}
    for digit in (0, 1):
        classes = torch.nn.functional.one_hot(labels["train"][:, digit], 10).to(x)
        weights = torch.linalg.solve(gram, x.T @ classes)
        for part in right:
            said = (inputs(part) @ weights).argmax(1)
            right[part] &= (said == labels[part][:, digit]).numpy()
    return right


# ----------------------------------------------------------------------------------------- judge

def judge(raw):
    right, best = raw
    chosen = {condition: {result: rows[result][best[condition][result]].astype(float)
                          for result in RESULTS} for condition, rows in right.items()}
    verdicts, gaps = {}, {}
    for result in RESULTS:
        found = chosen["theta_prime"][result]
        verdicts[f"{result} result"], gaps[f"{result} result"] = decide({
            "theta' - theta": found - chosen["theta"][result],
            "theta' - after another's": found - chosen["other"][result]})
    return spoken(verdicts), {
        "gaps": gaps, "layers": best, "questions": len(found),
        "right": {condition: {result: by_layer(row) for result, row in rows.items()}
                  for condition, rows in right.items()}}

def by_layer(row):
    return {str(layer): interval(v) for layer, v in row.items()}


# ------------------------------------------------------------------------------------------ draw

def draw(numbers):
    fig, (axes,) = panels(1, len(RESULTS), width=4.2, heights=[3.3])
    for ax, result in zip(axes, RESULTS):
        for condition, (label, colour) in CONDITIONS.items():
            rows = numbers["right"][condition][result]
            whiskers(ax, [int(layer) for layer in rows], list(rows.values()), colour, label=label)
        ax.set(title=f"{result} partial result, read at its bracket", xlabel="blocks passed",
               ylim=(-0.03, 1.05), xticks=[int(layer) for layer in rows])
    axes[0].set(ylabel="share read out right, both digits")
    axes[0].legend(fontsize=8)
    return fig
