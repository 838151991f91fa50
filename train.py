"""The outer loop with the trajectory in context: the three ways of the paper's Table 1 to obtain
the inner loop.

    python train.py                              # SFT: trains the default model into out/sft
    python train.py --resume                     # goes on where it stopped, bit for bit on a CPU
    python train.py --ask="(3+5)*2-7"            # asks the trained model
    python train.py --method=grpo --init=out/sft/ckpt.pt --out=out/grpo     # on-policy RL
    python train.py --method=dpo --init=out/sft/ckpt.pt --out=out/dpo       # preferences

A method's function takes the gradient of one step; the loop in `train`, below them, does the rest.
"""
import copy
import random
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from data import arithmetic, text
from lab.flags import chosen, fail, flag, flags
from lab.run import (Run, ahead, command, device_of, load, lr_at, move, precision_of, prepare,
                     provenance, write)
from lab.score import exact_match, respond, show_table
from model import Config, Model


@dataclass
class Train:
    """Training of a small transformer on arithmetic with one digit, the trajectory in context."""
    method: Literal["sft", "grpo", "dpo"] = flag("sft", "from given trajectories, or its own")
    preset: Literal["tiny", "gpu"] = flag("tiny", "sft: gpu shows what size buys")
    out: str = flag("out/sft", "the folder of the run")
    init: str = flag("", "a checkpoint to start from; grpo and dpo need one")
    resume: bool = flag(False, "go on with the run in --out")
    overwrite: bool = flag(False, "replace the run in --out")
    ask: str = flag("", "do not train: answer this question with the model in --out")
    seed: int = flag(0, "of weights and data")
    steps: int = flag(700, "optimiser steps", 1)
    batch: int = flag(48, "samples per step (grpo, dpo: sampled outputs)", 1)
    layers: int = flag(4, "transformer blocks", 1, 200)
    heads: int = flag(3, "attention heads per block", 1, 200)
    width: int = flag(96, "channels", 1, 2e4)
    lr: float = flag(0.05, "of Muon, for the hidden matrices")
    lr_adam: float = flag(0.01, "of AdamW, for embedding and head")
    warmup: int = flag(20, "steps of linear warm-up")
    domains: str = flag("expr,expr,expr,sum", "of the questions, drawn evenly from this list")
    operands: str = flag("", "of 2 to 10, as 3,4, drawn evenly; empty: mostly 4 to 6")
    ops: str = flag("+-*", "operations of expr")
    style: str = flag("states", f"sft: of the trajectories, one of {arithmetic.STYLES}, or several")
    asides: Literal["yes", "no"] = flag("yes", "sft: ask for the answer after every state")
    direct: int = flag(0, "sft: a quarter of the samples ask so many operands directly; 0: none", 0,
                       8)
    pool: int = flag(0, "so many questions in all; 0: each is drawn anew", 0, 1e6)
    support: int = flag(1, "sft: with a --pool, distinct trajectories per question", 1, 100)
    group: int = flag(16, "grpo, dpo: outputs sampled per question", 2, 1e4)
    update: int = flag(0, "grpo: how many of a group enter the gradient; 0: all")
    questions: int = flag(100, "held-out questions per cell of the evaluation", 1, 1e5)
    save_every: int = flag(100, "steps between checkpoints", 1)
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "cuda where there is one; a Mac: cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: bfloat16 in hardware")
    threads: int = flag(0, "CPU threads; 0: as many as torch chooses", 0, 1000)

    script = "train.py"

# gpu, 25 million parameters: is the curve smoother with a better head, how far does theta' carry?
PRESETS = {"tiny": {}, "gpu": {"layers": 8, "heads": 8, "width": 512, "batch": 1024, "lr": 0.02,
                               "lr_adam": 0.003, "operands": "2,3,4,5,6,7,8,9,10"}}
COUNTS = PRESETS["gpu"]["operands"].split(",")      # operands that there is training for
FOR_RL = {"batch": 256, "steps": 100, "lr": 0.001, "lr_adam": 0.001, "save_every": 25,
          "dtype": "float32"}

CLIP = 0.2                                          # of the probability ratio in GRPO
BETA = 0.1                                          # how far preferences may pull from --init
PIECE = {"cpu": 24, "cuda": 256}                    # rows that are computed at a time


# --------------------------------------------------------------------------- the losses (Table 1)

def sft_loss(nll: torch.Tensor, n: int) -> torch.Tensor:
    """SFT:  L = -E log p_theta(y | x). nll of every token, n: targets of the whole batch."""
    return nll.sum() / n

def dpo_loss(better, worse, ref_better, ref_worse, beta=BETA):
    """DPO:  L = -log sigmoid(r(y+) - r(y-)),  r(y) = beta log(p_theta(y) / p_ref(y)) (2305.18290).

    Log-probabilities of whole outputs (pairs,) -> (mean loss, share of pairs in order)."""
    margin = beta * ((better - ref_better) - (worse - ref_worse))
    return -F.logsigmoid(margin).mean(), (margin > 0).float().mean()

def policy_loss(logp, old, mask, advantage, length, clip=CLIP):
    """GRPO:  L = -E_t min[rho_t A, clip(rho_t, 1 - eps, 1 + eps) A],  rho_t = p_theta / p_old.

    logp, old, mask (N, T), advantage (N,). The sum over tokens is divided by one `length` for all:
    an output's own would favour long wrong ones (2503.20783). Here every batch is used once,
    so that rho is 1 and the clip is never reached; the formula is the paper's."""
    A, rho = advantage[:, None], (logp - old).exp()
    gain = torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)
    return -((gain * mask).sum(1) / length).mean()

def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Says how much better than its group an output is, (questions, G) -> the same shape. The
    division by the group's standard deviation is left out: it weighs questions by their difficulty
    and biases the gradient (2503.20783)."""
    return rewards - rewards.mean(1, keepdim=True)


# ------------------------------------------------------------------- SFT: off-policy trajectories

def pieces(c, mix, size, step) -> list:
    """Draws the samples of a step -> Batches of `size` rows of about one length: little padding."""
    rows = text.batch_at(step, c.batch, mix, c.seed, c.asides == "yes")
    return [text.batch(rows[i:i + size]) for i in range(0, len(rows), size)]

def sft(c, model, drawn, step, ref=None) -> dict:
    """Cross-entropy on trajectories and answers that somebody wrote, drawn by `pieces`: leaves the
    gradient of a step in the parameters -> numbers to log."""
    n = sum(int((batch.targets >= 0).sum()) for batch in drawn)
    total = 0.0
    for batch in drawn:
        batch = batch.to(model.device)
        nll = model.score(model(**batch.inputs()), batch.targets)           # (R, T)
        loss = sft_loss(nll, n)
        loss.backward()
        total = total + loss.detach()
    return {"loss": float(total), "tokens": sum(int((b.ids != text.PAD).sum()) for b in drawn)}


# -------------------------------------------------------------- GRPO, DPO: the model's own outputs

def rollouts(model, c, mix, step):
    """Samples c.group outputs per question, a pure function of (weights, seed, step) -> (questions
    repeated, lists of ids after `<think>`, `<eos>` included, rewards (questions, G), clean (N,)).

    Clean is what writes no held-out question as a state; nothing else may enter a gradient."""
    rng = random.Random(f"{c.method}/{c.seed}/{step}")
    asked = [q for _ in range(c.batch // c.group) for q in [mix.lesson(rng)[0]] * c.group]
    generator = torch.Generator(model.device).manual_seed(c.seed * 1_000_003 + step)
    prompts = [text.prompt(q.text) for q in asked]
    room = max(arithmetic.room(q.operands) for q in asked)
    rows = model.generate(prompts, text.EOS, room, 1.0, generator)
    rows = [row + [text.EOS] * (len(row) < room) for row in rows]
    outputs = [text.decode(row) for row in rows]
    rewards = torch.tensor([arithmetic.reward(q, o) for q, o in zip(asked, outputs)])
    clean = torch.tensor([not arithmetic.leaks(*o.split("</think>")) for o in outputs])
    return asked, rows, rewards.view(-1, c.group), clean

def log_prob(model, asked, rows):
    """log p of every token of `rows` after its question -> (N, T), and the mask of what are tokens
    of an output."""
    prompts = [text.prompt(q.text) for q in asked]
    ids, targets = text.shifted(prompts, rows, model.device)
    return -model.nll(ids, targets), targets >= 0

def grpo(c, model, mix, step, ref=None) -> dict:
    """On-policy reinforcement learning: sample, let the verifier judge, move towards what did
    better than its group."""
    asked, rows, rewards, clean = rollouts(model, c, mix, step)
    A = advantages(rewards).flatten() * clean
    # The gradient sees `update` outputs of a group (Fig. 9), the advantages all of them.
    rng, kept = random.Random(f"update/{c.seed}/{step}"), []
    for first in range(0, len(asked), c.group):
        drawn = rng.sample(range(c.group), c.update or c.group)
        kept += [first + j for j in sorted(drawn) if A[first + j]]
    signal = (A.view(-1, c.group) != 0).any(1).float().mean()
    if kept:
        logp, mask = log_prob(model, [asked[j] for j in kept], [rows[j] for j in kept])
        n = len(rewards) * (c.update or c.group)
        length = max(map(len, rows))
        loss = policy_loss(logp, logp.detach(), mask, A[kept].to(logp), length)
        (loss * len(kept) / n).backward()           # the mean over what has no advantage, too
    tokens = sum(map(len, rows))
    return {"reward": float(rewards.mean()), "right": float((rewards == 1).float().mean()),
            "form": float((rewards >= 0).float().mean()), "signal": float(signal),
            "length": tokens / len(rows), "tokens": tokens}

def dpo(c, model, mix, step, ref) -> dict:
    """Preference optimisation, off-policy: outputs sampled from --init, a right one preferred to a
    wrong one of the same question."""
    asked, rows, rewards, clean = rollouts(ref, c, mix, step)
    pairs = pairs_of(rewards, clean.view_as(rewards))
    numbers = {"loss": 0.0, "preferred": 0.5, "signal": len(pairs), "tokens": sum(map(len, rows))}
    if not pairs:
        return numbers
    order = [j for j, _ in pairs] + [j for _, j in pairs]
    part = [asked[j] for j in order], [rows[j] for j in order]
    with torch.no_grad():
        before = log_prob(ref, *part)[0].sum(1).split(len(pairs))
    now = log_prob(model, *part)[0].sum(1).split(len(pairs))
    loss, in_order = dpo_loss(*now, *before)
    loss.backward()
    return numbers | {"loss": float(loss.detach()), "preferred": float(in_order)}

def pairs_of(rewards, clean) -> list:
    """Pairs a right output with a wrong one of its question -> [(index, index)]."""
    pairs, G = [], rewards.size(1)
    for g, (judged, allowed) in enumerate(zip(rewards, clean)):
        right = [g * G + j for j in range(G) if judged[j] == 1 and allowed[j]]
        wrong = [g * G + j for j in range(G) if judged[j] != 1 and allowed[j]]
        pairs += zip(right, wrong)
    return pairs


# -------------------------------------------------------------------------------------- the loop

METHODS = {"sft": sft, "grpo": grpo, "dpo": dpo}

def train(c: Train, given: dict = {}) -> dict:
    """Trains by c.method, evaluates, writes c.out -> summary. given: see `flags`."""
    given = chosen(c) | given
    c = prepare(configure(c, given), given)
    device, mix = device_of(c), mix_of(c)
    torch.manual_seed(c.seed)
    model = new_model(c, device, given)
    # Kept in the checkpoint: what lies at --init may be another model when the run is resumed.
    ref = copy.deepcopy(model).requires_grad_(False) if c.method == "dpo" else None
    opts, gradient = optimisers(model, c), METHODS[c.method]
    with Run(c, model, opts, ref) as run:
        model.dtype = precision_of(c, device)
        steps, drawn = range(run.start, c.steps), repeat(mix)
        if c.method == "sft":
            drawn = ahead(partial(pieces, c, mix, PIECE[device.type]), steps, device)
        for step, given_step in zip(steps, drawn):
            numbers = gradient(c, model, given_step, step, ref)
            if numbers.get("signal", 1):            # Muon ignores the size of a gradient, even 0
                move(opts, lr_at(c, step))
            run.log(step, numbers)
            run.save(step)
        summary = provenance(c, model, run)
        model.dtype = None
    cells = arithmetic.TESTED | {"expr": range(3, max(8, 2 + max(mix.operands, default=6)) + 1)}
    table, mistakes = exact_match(model, cells, c.questions)
    summary |= {"exact_match": table, "mistakes": mistakes[:20]}
    write(Path(c.out) / "summary.json", summary)
    print(show_table(table, mix.operands))
    print("\n".join(["a few mistakes:", *mistakes[:5]]) if mistakes else "no mistakes")
    return summary

def optimisers(model, c) -> list:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embedding and head."""
    inside = list(model.blocks.parameters())
    rest = [model.embed.weight, model.embed_before.weight, model.head.weight]
    return [torch.optim.Muon(inside, c.lr, momentum=0.85, weight_decay=0.0),
            torch.optim.AdamW(rest, c.lr_adam, betas=(0.9, 0.95), weight_decay=0.0)]

def new_model(c, device, given=()) -> Model:
    """Builds theta at the start: from --init, or fresh."""
    if not c.init:
        return Model(Config(text.VOCAB, c.layers, c.heads, c.width)).to(device)
    model, _ = load_model(c.init, device)
    for k in ("layers", "heads", "width"):
        if k in given and getattr(model.config, k) != getattr(c, k):
            fail(f"--{k}={getattr(c, k)}, but the model in {c.init} has "
                 f"{getattr(model.config, k)}")
    return model

def load_model(path, device="cpu"):
    """Loads a checkpoint -> (Model on device, the whole checkpoint). Exits 2 with a line if there
    is none."""
    state = load(path, device)
    try:
        return Model.load(state["model"]).to(device), state
    except (ValueError, KeyError) as e:
        fail(f"{path}: {e}")

def mix_of(c) -> text.Mix:
    """The questions and trajectories that the flags ask for."""
    mix = text.Mix(tuple(c.domains.split(",")), numbers(c.operands), tuple(c.style.split(",")),
                   c.ops, c.direct)
    if not c.pool:
        return mix
    mix = mix.limited(c.pool, c.support, c.seed)
    each = sum(len(trajectories) for _, trajectories in mix.pool) / c.pool
    if each < 0.9 * c.support:
        fail(f"--support={c.support}: such questions have {each:.1f} trajectories each")
    return mix

def numbers(s: str) -> tuple:
    return tuple(int(k) for k in s.split(",")) if s else ()


# ---------------------------------------------------------------------------------- command line

def configure(c: Train, given: dict) -> Train:
    """Puts a preset's values below what was given. Exits 2 with a line where flags contradict each
    other; looks at no file."""
    given = chosen(c) | given
    if c.resume:
        return c
    base = PRESETS[c.preset] if c.method == "sft" else FOR_RL
    c = type(c)(**{**base, **given})
    if c.method == "sft":
        others = {"group", "update"} & set(given)
    else:
        others = {"style", "asides", "direct", "support", "preset"} & set(given)
    if others:
        fail(f"--{min(others)} is not for --method={c.method}")
    if c.method != "sft" and not c.init:
        fail(f"--method={c.method} learns from the trajectories of a trained model: give one with "
             "--init=RUN/ckpt.pt")
    if c.method != "sft" and (c.update > c.group or c.batch % c.group):
        fail(f"--update={c.update} must be at most --group={c.group}, which must divide "
             f"--batch={c.batch}")
    if c.support > 1 and not c.pool:
        fail("--support counts trajectories of the questions in a --pool: give its size")
    if not c.init and c.width % c.heads:
        fail(f"--width={c.width} must be a multiple of --heads={c.heads}")
    lists = {"domains": arithmetic.TRAINED, "style": arithmetic.STYLES, "operands": COUNTS}
    for name, allowed in lists.items():
        for word in getattr(c, name).split(","):
            if getattr(c, name) and word not in allowed:
                fail(f"--{name}={getattr(c, name)}: {word!r} is not one of {', '.join(allowed)}")
    if c.direct == 1:
        fail("--direct=1: a question has two operands or more")
    if not c.ops or not set(c.ops) <= set("+-*"):
        fail(f"--ops={c.ops}: some of +-* are expected")
    return c

def ask(c: Train, given: dict):
    """Prints how the model in c.out answers a question of the reader's own, every step checked."""
    others = set(given) - {"ask", "out", "device", "threads"}
    if others:
        fail(f"--ask trains nothing: leave --{min(others)} out")
    try:
        q = arithmetic.parse(c.ask)
    except ValueError as e:
        fail(e)
    model, state = load_model(Path(c.out) / "ckpt.pt", device_of(c))
    counts = numbers(state["config"].get("operands", ""))
    [(think, answer)], [(_, direct)] = respond(model, [q]), respond(model, [q], "direct")
    trained = arithmetic.trained(q.domain, q.operands, counts)
    note = "" if trained else "   (longer than, or unlike, anything it trained on)"
    print(f"question    {q.text}{note}")
    for step, ok in zip(think.split(";"), arithmetic.check(q, think)):
        print(f"            {step}   {'ok' if ok else 'wrong'}")
    for name, says in (("answer", answer), ("direct", direct)):
        verdict = "right" if arithmetic.verify(q, says) else f"wrong: it is {q.answer}"
        print(f"{name:11} {says or '(none)'}   {verdict}")
    print("(arithmetic modulo 10: of every result only the last digit is kept)")

def main():
    c, given = flags(Train)
    ask(c, given) if "ask" in given else train(c, given)

if __name__ == "__main__":
    command(main)
