"""How long until 95 % are right: this recipe, with one choice of it taken back, and nanoGPT's?

nanoGPT's is AdamW at 1e-3, betas 0.9 and 0.99, weight decay 0.1, clipping, a cosine; learned
positions, LayerNorm's gains, GELU, tied embeddings. It runs on our batches in our precision, at its
own rate and at the best of those looked at, and with all of ours taken back: float32, questions as
they are drawn, more direct and cut samples. Each recipe has a budget of steps of its own, over
which its rate falls. The goal, 95 % of 200 validation questions (`expr`, 4 operands), is looked at
every 20 steps, or 40 times a run.

Supported if each of nanoGPT's three takes at least twice as long, median over seeds; refuted if one
does not; inconclusive if a run of ours does not get there. Another run that does not counts with
the time it took, which is too little.

    python -m experiments.race --recipe=nanogpt --steps=3000 --out=out/nanogpt     # one run of it
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from data import text
from experiments.arms import cost, train_arms
from lab import flags, machine, optim
from lab.figure import COLOURS, INK, panels
from lab.run import Run, checksum, command, locked, prepare, provenance, read_log, write
from lab.score import held_out, right
from model import Config, Model

CLAIM = "this recipe needs half of the time of nanoGPT's, or less, at its best rate too"
GOAL = "experiments/race.py --domains=expr --until=0.95"
ARMS = {
    "ours": f"{GOAL} --steps=500",
    "in float32": f"{GOAL} --steps=500 --dtype=float32",
    "questions as they are drawn": f"{GOAL} --steps=700 --harder=1",
    "lower rates, kept up longer": f"{GOAL} --steps=700 --lr=0.02 --lr_adam=0.02 --decay=0.6",
    "more direct and cut samples": f"{GOAL} --steps=600 --direct=0.1 --cut=0.1",
    "AdamW in Muon's place": f"{GOAL} --recipe=adamw --steps=1600",
    "nanoGPT's recipe": f"{GOAL} --recipe=nanogpt --steps=3000",
    "nanoGPT's at a better rate": f"{GOAL} --recipe=nanogpt --steps=2000 --lr=0.002",
    "nanoGPT's with nothing of ours": f"{GOAL} --recipe=nanogpt --steps=3000 --dtype=float32 "
                                      "--harder=1 --direct=0.1 --cut=0.1"}


# -------------------------------------------------------------------------------------- recipes

@dataclass
class Race(train.Train):
    """SFT by one of three recipes, until enough validation questions are right."""
    recipe: str = "ours"            # {ours, adamw, nanogpt} what stands for Muon and for the block
    until: float = 0.95             # [0, 1] share of validation questions that ends the run
    out: str = "out/race"           # the folder of the run
    goal: int = 200                 # [1, 1e5] of them, 4 operands, of the first domain

    script = "-m experiments.race"

DEFAULTS = {"ours": {}, "adamw": {"lr": 0.003}, "nanogpt": {"lr": 0.001, "warmup": 100}}


class GPT2(Model):
    """The same shape with GPT-2's block: learned positions, LayerNorm with gains, GELU, tied
    embeddings, and its initialisation."""

    def __init__(self, config, context=256):
        super().__init__(config)
        self.place = nn.Embedding(context, config.width)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(config.width, bias=False)
        for block in self.blocks:
            block.act = F.gelu
            block.norm1 = nn.LayerNorm(config.width, bias=False)
            block.norm2 = nn.LayerNorm(config.width, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.layers))

    def enter(self, ids, pos):
        return (self.embed(ids) + self.place(pos)).to(self.dtype), None


def model_of(c):
    shape = Config(text.VOCAB, c.layers, c.heads, c.width)
    return GPT2(shape) if c.recipe == "nanogpt" else Model(shape)

def optimisers_of(c, model, dtype):
    fused = model.head.weight.is_cuda
    if c.recipe == "ours":
        return optim.optimisers(model, c.lr, c.lr_adam, dtype)
    if c.recipe == "adamw":
        hidden, rest = optim.matrices_inside(model)
        return [optim.adamw(hidden, c.lr, fused), optim.adamw(rest, c.lr_adam, fused)]
    groups = []
    for matrices in (True, False):
        params = [p for p in model.parameters() if (p.ndim == 2) == matrices]
        groups.append({"params": params, "weight_decay": 0.1 * matrices})
    return [torch.optim.AdamW(groups, c.lr, betas=(0.9, 0.99), fused=fused)]

def cosine_rate(c, i):
    """nanoGPT's schedule: warm-up, then a cosine to a tenth."""
    return min((i + 1) / max(1, c.warmup), 0.55 + 0.45 * math.cos(math.pi * i / c.steps))

def race(c, given):
    """One run -> summary"""
    c = prepare(configure(c, given), given)
    device = machine.device_of(c)
    torch.manual_seed(c.seed)
    model = model_of(c).to(device)
    goal = held_out(c.domains.split(",")[0], 4, c.goal, "val")
    rate = cosine_rate if c.recipe == "nanogpt" else optim.linear
    dtype, reached = machine.precision_of(c, device), False
    with locked(c.out):
        opts = optimisers_of(c, model, dtype)
        with Run(c, model, opts, rate=rate) as run, machine.computing_in(model, dtype):
            for numbers in train.sft(c, model, train.mix_of(c), run):
                if c.recipe == "nanogpt":
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                run.update(numbers)
                if run.done % max(20, c.steps // 40) == 0 or run.done == c.steps:
                    with machine.computing_in(model, None):
                        reached = np.mean(right(model, goal)) >= c.until
                if reached:
                    run.finish()
        summary = {"reached": bool(reached)} | provenance(c, model, run)
        write(Path(c.out) / "summary.json", summary)
    return summary

def configure(c, given):
    return train.configure(c, {**DEFAULTS[c.recipe], **given})


# ------------------------------------------------------------------------- measure, judge, draw

def measure(c):
    """-> {arm: {flags, seconds, steps, reached, checksums: one a seed}}"""
    runs = {}
    for name, folders in train_arms(c, ARMS).items():
        logs = [read_log(folder) for folder in folders]
        runs[name] = {
            "flags": ARMS[name], "seconds": [round(cost(log), 1) for log in logs],
            "steps": [len(log) for log in logs],
            "reached": [reached_in(folder) for folder in folders],
            "checksums": [checksum(folder / "ckpt.pt") for folder in folders]}
    return runs

def reached_in(folder):
    return json.loads((folder / "summary.json").read_text())["reached"]

def judge(runs):
    ours = runs["ours"]
    times = {f"{name} / ours": [round(a / b, 2) for a, b in zip(run["seconds"], ours["seconds"])]
             for name, run in runs.items() if name != "ours"}
    median = {name: round(float(np.median(v)), 2) for name, v in times.items()}
    slower = min(v for name, v in median.items() if "nanoGPT" in name)
    if not all(ours["reached"]):
        verdict = "inconclusive"
    else:
        verdict = "supported" if slower >= 2 else "refuted"
    return verdict, {"times": times, "median": median, "runs": runs}

def draw(numbers):
    runs = numbers["runs"]
    fig, ((ax,),) = panels(1, 1, width=8, heights=[2.4])
    for i, run in enumerate(runs.values()):
        middle, steps = np.median(run["seconds"]), np.median(run["steps"])
        ax.barh(i, middle, 0.7, color=COLOURS["light"])
        ax.plot(run["seconds"], [i] * len(run["seconds"]), ".", color=INK)
        late = run["reached"].count(False)
        note = f", {late} did not get there" if late else ""
        ax.text(max(run["seconds"]), i, f"  {middle:.0f} s, {steps:,.0f} steps{note}", va="center")
    ax.set_yticks(range(len(runs)), list(runs))
    longest = max(max(run["seconds"]) for run in runs.values())
    ax.set(xlabel=f"seconds to 95 % (median of {len(runs['ours']['seconds'])} seeds)",
           ylim=(len(runs) - 0.4, -0.6), xlim=(0, 1.75 * longest))
    return fig


def main():
    race(*flags.flags(Race))

if __name__ == "__main__":
    command(main)
