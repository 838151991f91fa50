"""The outer loop with the trajectory in context: the three ways of the paper's Table 1 to obtain
the inner loop.

    python train.py                              # SFT: trains the default model into out/sft
    python train.py --resume                     # goes on where it stopped, bit for bit on a CPU
    python train.py --ask="(3+5)*2-7"            # asks the trained model
    python train.py --method=grpo --init=out/sft/ckpt.pt --out=out/grpo     # on-policy RL
    python train.py --method=dpo --init=out/sft/ckpt.pt --out=out/dpo       # preferences
    torchrun --standalone --nproc_per_node=2 train.py                       # SFT on two devices

Every method is a generator: a step leaves a gradient in the parameters and yields numbers to log;
`train`, at the end, lets the optimisers step.
"""
from lab import flags                               # first: Ctrl-C from here on is quiet

import random
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import arithmetic, text
from lab import machine, optim
from lab.flags import fail
from lab.machine import RANK, WORLD, together
from lab.run import Run, command, load, locked, prepare, provenance, read_log, write
from lab.score import CELLS, exact_match, respond, show_table
from model import Config, Model


@dataclass
class Train:
    """Training of a small transformer on synthetic arithmetic, the trajectory in context."""
    method: str = "sft"             # {sft, grpo, dpo} from given trajectories, or the model's own
    preset: str = "tiny"            # {tiny, gpu} sft: gpu is a larger model and batch
    out: str = "out/sft"            # the folder of the run
    init: str = ""                  # a checkpoint to start from; grpo and dpo need one
    resume: bool = False            # go on with the run in --out
    overwrite: bool = False         # replace the run in --out
    ask: str = ""                   # do not train: answer this question with the model in --out
    seed: int = 0                   # [0, 1e9] of weights and data
    steps: int = 1500               # [1, 1e9] optimiser steps
    batch: int = 64                 # [1, 1e6] samples a step (grpo, dpo: trajectories)
    chunks: int = 1                 # [1, 1e4] sft: pieces of a batch, gradients summed: less memory
    layers: int = 4                 # [1, 200] transformer blocks
    heads: int = 3                  # [1, 200] attention heads a block
    width: int = 96                 # [1, 2e4] channels
    lr: float = 0.035               # (0, 1e9] of Muon, for the hidden matrices
    lr_adam: float = 0.005          # (0, 1e9] of AdamW, for embedding and head
    warmup: int = 20                # [0, 1e9] steps of linear warm-up
    decay: float = 1.0              # [0, 1] last share of the steps, the rate falling to 0
    domains: str = "expr,sum,modsum"    # of the questions; their shares are those of data/text.py
    operands: str = ""              # counts such as 3,4, drawn evenly; empty: those of data/text.py
    pool: int = 0                   # [0, 1e6] this many questions in all, 0: each is drawn anew
    support: int = 1                # [1, 100] sft: with a --pool, distinct trajectories a question
    style: str = "long"             # sft: long, short, padded, reflect, filler, or several
    harder: int = 2                 # [1, 1e3] sft: questions drawn a sample, the hardest is taken
    direct: float = 0.05            # [0, 1] sft: share of samples answered without a trajectory
    cut: float = 0.05               # [0, 1] sft: share of samples whose trajectory stops anywhere
    group: int = 16                 # [1, 1e4] grpo, dpo: trajectories sampled a question
    update: int = 0                 # [0, 1e9] grpo: how many of a group enter the gradient, 0: all
    adv: str = "dr_grpo"            # {grpo, dr_grpo} grpo: see `advantages`
    epochs: int = 1                 # [1, 100] grpo: optimiser steps on the same trajectories
    eps: float = 0.2                # [0, 1e9] grpo: where the ratio is clipped
    kl: float = 0.0                 # [0, 1e9] grpo: weight of the divergence from --init
    beta: float = 0.1               # (0, 1e9] dpo: how far preferences may pull from --init
    max_new: int = 64               # [1, 1e4] grpo, dpo: tokens of a sampled output
    questions: int = 100            # [1, 1e5] held-out questions a cell of the evaluation
    save_every: int = 100           # [1, 1e9] steps between checkpoints
    device: str = "auto"            # {auto, cpu, cuda} auto: cuda where there is one
    dtype: str = "auto"             # {auto, float32, bfloat16} auto: bfloat16 on CPUs that have it
    compile: str = "no"             # {no, yes} compile the blocks
    threads: int = 0                # [0, 1000] CPU threads, 0: as many as torch chooses

    script = "train.py"

PRESETS = {"tiny": {}, "gpu": {"layers": 6, "heads": 8, "width": 256, "batch": 2048, "steps": 2000}}
FOR_RL = {"batch": 256, "steps": 100, "lr": 0.001, "lr_adam": 0.001, "decay": 0.3,
          "save_every": 25, "dtype": "float32"}


# --------------------------------------------------------------------------- the losses (Table 1)

def sft_loss(nll, n):
    """SFT:  L = -E log p_theta(y | x). nll of every token, n: tokens of the whole batch."""
    return nll.sum() / n

def dpo_loss(better, worse, ref_better, ref_worse, beta):
    """DPO:  L = -log sigmoid(r(y+) - r(y-)),  r(y) = beta log(p_theta(y) / p_ref(y)) (2305.18290).

    Log-probabilities of whole outputs (pairs,) -> (mean loss, share of pairs in order)."""
    margin = beta * ((better - ref_better) - (worse - ref_worse))
    return -F.logsigmoid(margin).mean(), (margin > 0).float().mean()

def policy_loss(logp, old, mask, advantage, c, ref=None):
    """GRPO:  L = -E_t min[rho_t A, clip(rho_t, 1 - eps, 1 + eps) A],  rho_t = p_theta / p_old.

    logp, old, ref, mask (N, T), advantage (N,). grpo averages over each output's own length, which
    favours long wrong ones; dr_grpo divides by a constant. ref: adds the divergence from it."""
    A, rho = advantage[:, None], (logp - old).exp()
    gain = torch.minimum(rho * A, rho.clamp(1 - c.eps, 1 + c.eps) * A)
    if ref is not None:                             # Schulman's k3: unbiased, never negative
        gain = gain - c.kl * ((ref - logp).exp() - (ref - logp) - 1)
    length = mask.sum(1) if c.adv == "grpo" else c.max_new
    return -((gain * mask).sum(1) / length).mean()

def advantages(rewards, adv):
    """(questions, G) -> the same shape: how much better than its group (GRPO, 2402.03300).

    dr_grpo leaves out the division by the group's standard deviation, which weighs questions by
    their difficulty and biases the gradient (2503.20783)."""
    a = rewards - rewards.mean(1, keepdim=True)
    return a if adv == "dr_grpo" else a / (rewards.std(1, keepdim=True) + 1e-6)


# ------------------------------------------------------------------- SFT: off-policy trajectories

def sft(c, model, mix, run):
    """Cross-entropy on trajectories and answers that somebody wrote. `run` says which steps."""
    device = model.head.weight.device
    steps = range(run.start, c.steps)
    batches = machine.made_ahead(text.Batches(c.batch, mix, c.seed), steps, device)
    for _, batch in zip(run, batches):
        n, loss, tokens = (batch.targets >= 0).sum(), 0.0, 0
        for part in own_rows(batch, c.chunks):
            nll = model.nll(part.ids, part.targets, pos=part.pos, mask=part.mask())     # (R, T)
            share = sft_loss(nll, n)
            share.backward()
            loss, tokens = loss + share.detach(), tokens + (part.sample > 0).sum()
        numbers = together(model.parameters(), {"loss": loss, "tokens": tokens})
        yield {"loss": float(numbers["loss"]), "tokens": int(numbers["tokens"])}

def own_rows(batch, chunks):
    """This process's share of a batch's rows in `chunks` pieces -> Batches, none without rows."""
    rows = [t[RANK::WORLD] for t in batch]           # ids, targets, pos, sample: (R / WORLD, T)
    pieces = zip(*(t.chunk(chunks) for t in rows)) if len(rows[0]) else ()
    return [text.Batch(*piece) for piece in pieces]


# -------------------------------------------------------------- GRPO, DPO: the model's own outputs

def own_questions(c, mix, i):
    """The questions of step i: a pure function of (seed, step)."""
    rng = random.Random(f"{c.method}/{c.seed}/{i}")
    n = c.batch // c.group
    return [rng.choice(mix.pool)[0] if mix.pool else mix.question(rng) for _ in range(n)]

def rollouts(model, questions, c, seed):
    """c.group outputs a question, sampled at temperature 1 -> (questions repeated, lists of ids
    after `<think>`, `<eos>` included)."""
    asked = [q for q in questions for _ in range(c.group)]
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    prompts = [text.prompt(q.text) for q in asked]
    rows = model.generate(prompts, text.EOS, c.max_new, 1.0, generator=generator, pad=text.PAD)
    return asked, [row + [text.EOS] * (len(row) < c.max_new) for row in rows]

def rewards_of(asked, rows):
    """Eq. 21 -> (N,)."""
    return torch.tensor([arithmetic.reward(q, text.decode(r)) for q, r in zip(asked, rows)])

def log_prob(model, asked, rows):
    """log p of every token of `rows` after its question -> (N, T), and the mask of what are tokens
    of an output."""
    prompts = [text.prompt(q.text) for q in asked]
    ids, targets = text.shifted(prompts, rows, model.head.weight.device)
    return -model.nll(ids, targets), targets >= 0

def grpo(c, model, mix, run):
    """On-policy reinforcement learning: sample, let the verifier judge, move towards what did
    better than its group."""
    ref = frozen(c, model) if c.kl else None
    silent = 0
    for i in run:
        seed = c.seed * 1_000_003 + i
        asked, rows = rollouts(model, own_questions(c, mix, i), c, seed)
        rewards = rewards_of(asked, rows).view(-1, c.group)
        A = advantages(rewards, c.adv)
        signal = (A != 0).any(1).float().mean()
        silent = 0 if signal else silent + 1
        if silent == 20:
            tqdm.write(f"note: step {i}: all rewards of a group were equal in 20 steps in a row: "
                       "there is nothing to learn from; going on", file=sys.stderr)

        # The gradient sees `update` outputs of a group (Fig. 9), the advantages all of them.
        rng, keep = random.Random(seed), []
        for g in range(len(A)):
            drawn = rng.sample(range(c.group), c.update or c.group)
            keep += sorted(g * c.group + j for j in drawn)
        part = [asked[j] for j in keep], [rows[j] for j in keep]
        A = A.flatten()[keep].to(model.head.weight.device)
        with torch.no_grad():
            before = log_prob(ref, *part)[0] if c.kl else None
        old = None
        for epoch in range(c.epochs):
            if epoch:
                run.move()                          # the last epoch's step is the caller's
            logp, mask = log_prob(model, *part)
            old = logp.detach() if old is None else old
            loss = policy_loss(logp, old, mask, A, c, before)
            loss.backward()
        tokens = sum(map(len, rows))
        yield {"reward": float(rewards.mean()), "right": float((rewards == 1).float().mean()),
               "form": float((rewards >= 0).float().mean()), "signal": float(signal),
               "length": tokens / len(rows), "entropy": float(-(old * mask).sum() / mask.sum()),
               "tokens": tokens}

def dpo(c, model, mix, run):
    """Preference optimisation, off-policy: outputs sampled from --init, a right one preferred to a
    wrong one of the same question."""
    ref = frozen(c, model)
    for i in run:
        asked, rows = rollouts(ref, own_questions(c, mix, i), c, c.seed * 1_000_003 + i)
        pairs, tokens = pairs_of(rewards_of(asked, rows), c.group), sum(map(len, rows))
        if not pairs:
            yield {"loss": 0.0, "preferred": 0.5, "pairs": 0, "tokens": tokens}
            continue
        order = [j for j, _ in pairs] + [j for _, j in pairs]
        part = [asked[j] for j in order], [rows[j] for j in order]
        with torch.no_grad():
            before = log_prob(ref, *part)[0].sum(1).split(len(pairs))
        now = log_prob(model, *part)[0].sum(1).split(len(pairs))
        loss, in_order = dpo_loss(*now, *before, c.beta)
        loss.backward()
        yield {"loss": float(loss.detach()), "preferred": float(in_order), "pairs": len(pairs),
               "tokens": tokens}

def pairs_of(rewards, group):
    """[(index of a right output, index of a wrong one)] within every group of outputs."""
    pairs = []
    for g in range(0, len(rewards), group):
        right = [j for j in range(g, g + group) if rewards[j] == 1]
        wrong = [j for j in range(g, g + group) if rewards[j] != 1]
        pairs += zip(right, wrong)
    return pairs

def frozen(c, model):
    """The model of --init, without gradients."""
    return load_model(c.init, model.head.weight.device)[0].requires_grad_(False)


# -------------------------------------------------------------------------------------- the loop

METHODS = {"sft": sft, "grpo": grpo, "dpo": dpo}

def train(c, given):
    """Trains by c.method, evaluates, writes c.out. -> summary"""
    c = shaped_as_init(prepare(configure(c, given), given), given)
    device, mix = machine.device_of(c), mix_of(c)
    torch.manual_seed(c.seed)
    model = new_model(c, device)
    dtype = machine.precision_of(c, device)
    opts = optim.optimisers(model, c.lr, c.lr_adam, dtype)
    with locked(c.out):
        with Run(c, model, opts) as run, machine.computing_in(model, dtype):
            for numbers in METHODS[c.method](c, model, mix, run):
                run.update(numbers)
        if RANK:
            return {}
        summary = evaluate(c, model) | provenance(c, model, run)
        write(Path(c.out) / "summary.json", summary)
    return summary

def new_model(c, device):
    """theta at the start: from --init, or fresh."""
    if c.init:
        model, _ = load_model(c.init, device)
    else:
        model = Model(Config(text.VOCAB, c.layers, c.heads, c.width)).to(device)
    if c.compile == "yes":
        machine.compile_blocks(model)
    return model

def load_model(path, device="cpu"):
    """-> (Model on device, the whole checkpoint). Exits 2 with a line if there is none."""
    state = load(path, device)
    try:
        return Model.load(state["model"]).to(device), state
    except (ValueError, KeyError) as e:
        fail(f"{path}: {e}")

def mix_of(c):
    """The questions and trajectories that the flags ask for."""
    names = c.domains.split(",")
    harder = c.harder if c.method == "sft" else 1
    mix = text.Mix(style=c.style, harder=harder, direct=c.direct, cut=c.cut)
    mix = mix._replace(filler=min(mix.filler, max(0.0, 1 - c.direct - c.cut)),
                       domains={d: mix.domains[d] for d in names})
    if c.operands:
        asked = c.operands.split(",")
        counts = arithmetic.TRAINED
        mix = mix._replace(
            operands={d: [float(str(k) in asked) for k in counts[d]] for d in names})
    if not c.pool:
        return mix
    mix = mix.limited(c.pool, c.support, c.seed)
    different = {q.text: thinks for q, thinks in mix.pool}
    each = sum(map(len, different.values())) / len(different)
    if len(different) < 0.9 * c.pool or each < 0.9 * c.support:
        fail(f"--pool={c.pool} --support={c.support}: there are only {len(different)} such "
             f"questions, with {each:.1f} trajectories each")
    return mix

def evaluate(c, model):
    """Prints and returns what held-out questions say of the model."""
    table, mistakes = exact_match(model, CELLS, c.questions)
    print(show_table(table))
    print("\n".join(["a few mistakes:", *mistakes[:5]]) if mistakes else "no mistakes")
    tokens = sum(line["tokens"] for line in read_log(c.out))
    return {"exact_match": table, "mistakes": mistakes[:20], "tokens": tokens}


# ---------------------------------------------------------------------------------- command line

def configure(c, given):
    """Flags -> the config that holds: a preset's values below what was given. Exits 2 with a line
    where flags contradict each other; looks at no file."""
    if "ask" in given:
        check_ask(c, given)
    if c.resume:
        return c
    base = PRESETS[c.preset] if c.method == "sft" else FOR_RL
    c = type(c)(**{**base, **given})
    for name in given:
        note = flags.notes(type(c))[name][1]
        only = re.match(r"((?:sft|grpo|dpo)(?:, (?:sft|grpo|dpo))*): ", note)
        if only and c.method not in only[1].split(", "):
            fail(f"--{name} is for --method={only[1]}")
    if c.method == "sft":
        check_sft(c)
    else:
        check_rl(c)
    for d in c.domains.split(","):
        if d not in arithmetic.TRAINED:
            fail(f"--domains={c.domains}: there is no domain {d!r}, choose from "
                 f"{', '.join(arithmetic.TRAINED)}")
        counts = list(map(str, arithmetic.TRAINED[d]))
        if c.operands and not set(c.operands.split(",")) <= set(counts):
            fail(f"--operands={c.operands}: {d} is trained on {', '.join(counts)}")
    if not c.init and (c.width % c.heads or c.width // c.heads % 2):
        fail(f"--width={c.width} must be an even multiple of --heads={c.heads}")
    return c

def check_ask(c, given):
    try:
        arithmetic.parse(c.ask)
    except ValueError as e:
        fail(e)
    others = set(given) - {"ask", "out", "device", "threads"}
    if others:
        fail(f"--ask trains nothing: leave --{min(others)} out")

def check_sft(c):
    if c.support > 1 and not c.pool:
        fail("--support counts trajectories of the questions in a --pool: give its size")
    if c.direct + c.cut > 1:
        fail("--direct and --cut are shares of the samples and make more than 1 together")
    styles = [s for s in arithmetic.STYLES if s != "direct"]
    for style in c.style.split(","):
        if style not in styles:
            fail(f"--style={c.style}: there is no style {style!r}, choose from "
                 f"{', '.join(styles)}")

def check_rl(c):
    if WORLD > 1:
        fail(f"--method={c.method} runs in one process, without torchrun")
    if not c.init:
        fail(f"--method={c.method} learns from the trajectories of a trained model: give one with "
             "--init=RUN/ckpt.pt")
    if c.update > c.group or c.batch % c.group or c.group < 2:
        fail(f"--update={c.update} must be at most --group={c.group}, which must be at least 2 and "
             f"divide --batch={c.batch}")

def shaped_as_init(c, given):
    """The config with the shape of --init's model in it."""
    if not c.init:
        return c
    shape = load_model(c.init)[0].config
    for k in ("layers", "heads", "width"):
        if k in given and getattr(shape, k) != getattr(c, k):
            fail(f"--{k}={getattr(c, k)}, but the model in {c.init} has {getattr(shape, k)}")
    return replace(c, layers=shape.layers, heads=shape.heads, width=shape.width)

def ask(c):
    """Prints how the model in c.out answers a question of the reader's own, every step checked."""
    q = arithmetic.parse(c.ask)
    model, _ = load_model(Path(c.out) / "ckpt.pt", machine.device_of(c))
    [(trajectory, answer)], [(_, direct)] = respond(model, [q]), respond(model, [q], "direct")
    note = "" if q.trained else "   (longer than, or unlike, anything it trained on)"
    print(f"question    {q.text}{note}")
    for step, ok in zip(trajectory.split(";"), arithmetic.check(q, trajectory)):
        print(f"            {step}   {'ok' if ok else 'wrong'}")
    for name, says in (("answer", answer), ("direct", direct)):
        verdict = "right" if arithmetic.verify(q, says) else f"wrong: it is {q.answer}"
        print(f"{name:11} {says or '(none)'}   {verdict}")

def main():
    c, given = flags.flags(Train)
    if "ask" in given:
        ask(configure(c, given))
    else:
        train(c, given)

if __name__ == "__main__":
    command(main)
