"""The outer loop with the trajectory in context: the three ways of the paper's Table 1 to obtain the inner loop.

    python train.py                              # SFT: supervised fine-tuning, trains the default model into out/sft
    python train.py --resume                     # goes on where it stopped, bit for bit on a CPU
    python train.py --ask="(3+5)*2-7"            # asks the trained model
    python train.py --method=grpo --init=out/weak/ckpt.pt --out=out/grpo       # on-policy reinforcement learning
    python train.py --method=dpo --init=out/weak/ckpt.pt --out=out/dpo         # preference optimisation
    torchrun --standalone --nproc_per_node=2 train.py                          # the same SFT on two devices, or two processes of a CPU

Also here, for every script of the project: flags, run folders, checkpoints, the loop around an optimiser step, evaluation.
"""
import ctypes
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from data import arithmetic
from data.flags import fail, flags


RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))    # of this process; torchrun sets them


# ----------------------------------------------------------------------------------------------------------------------- flags

@dataclass
class Train:
    """Training of a small transformer on synthetic arithmetic, the trajectory in context."""
    method: str = "sft"             # sft: cross-entropy on trajectories and answers; grpo, dpo: learn from the model's own
    preset: str = "auto"            # tiny, gpu, or auto: gpu where there is CUDA
    out: str = "out/sft"            # the folder of the run
    init: str = ""                  # a checkpoint to start from; grpo and dpo need one
    resume: bool = False            # go on with the run in --out
    overwrite: bool = False         # replace the run in --out
    ask: str = ""                   # do not train: answer this question with the model in --out
    seed: int = 0                   # of weights and data
    steps: int = 1600               # optimiser steps
    batch: int = 64                 # samples a step (grpo, dpo: trajectories)
    chunks: int = 1                 # pieces that a batch is cut into, gradients summed: less memory
    layers: int = 4                 # transformer blocks
    heads: int = 4                  # attention heads a block
    width: int = 96                 # channels
    recipe: str = "ours"            # sft: ours; adamw, in Muon's place; nanogpt, GPT-2's block and nanoGPT's optimiser, for comparison
    lr: float = 0.02                # of Muon, for the hidden matrices
    lr_adam: float = 0.02           # of AdamW, for embedding and head
    warmup: int = 20                # steps of linear warm-up
    decay: float = 0.6              # last share of the steps in which the rate falls linearly to 0
    domains: str = "expr,sum,modsum"  # of the questions; their shares are those of data/text.py
    operands: str = ""              # operand counts such as 3,4, drawn evenly; empty: those of data/text.py
    pool: int = 0                   # this many questions in all, 0: every one is drawn anew
    support: int = 1                # sft with a --pool: distinct trajectories of a question
    style: str = "long"             # of the trajectories: long, short, padded, reflect, filler; several, such as long,short, evenly
    direct: float = 0.10            # share of samples answered without a trajectory
    cut: float = 0.10               # share of samples whose trajectory stops anywhere
    group: int = 16                 # grpo, dpo: trajectories sampled a question
    update: int = 0                 # grpo: how many of a group enter the gradient, 0: all; the advantages use all
    adv: str = "dr_grpo"            # grpo: / std of the group and 1 / length; dr_grpo: neither (2503.20783)
    epochs: int = 1                 # grpo: optimiser steps on the same trajectories, the ratio clipped; 1: on-policy
    eps: float = 0.2                # grpo: where the ratio is clipped
    kl: float = 0.0                 # grpo: weight of the divergence from --init
    beta: float = 0.1               # dpo: how far the preferences may pull from --init
    max_new: int = 64               # grpo, dpo: tokens of a sampled trajectory with its answer
    until: float = 0.0              # sft: stop once this share of validation questions is right (4 operands of the first domain), 0: never
    questions: int = 200            # held-out questions a cell of the evaluation
    save_every: int = 100           # steps between checkpoints
    device: str = "auto"            # cpu, cuda, or auto
    dtype: str = "auto"             # float32, bfloat16, or auto: bfloat16 on CUDA
    compile: str = "auto"           # yes, no, or auto: on CUDA
    threads: int = 0                # CPU threads, 0: as many as torch chooses

PRESETS = {"tiny": {}, "gpu": {"layers": 6, "width": 256, "batch": 2048, "steps": 2000}}
OWN = {"batch": 256, "steps": 100, "lr": 0.001, "lr_adam": 0.001, "decay": 0.3, "save_every": 25}      # defaults of grpo and dpo
RECIPES = {"ours": {}, "adamw": {"lr": 0.003}, "nanogpt": {"lr": 0.001, "warmup": 100}}                   # and of recipes
ONLY = {"grpo": ("update", "adv", "epochs", "eps", "kl"), "dpo": ("beta",)}


def check(c, given):
    """Refuses, with a line, flags that contradict each other. -> (c, given), so that it can stand behind `flags`."""
    if not c.resume:
        for method, names in ONLY.items():
            for name in names:
                if name in given and c.method != method:
                    fail(f"--{name} is for --method={method}")
        if c.method == "sft" and {"group", "max_new"} & {*given} or c.method != "sft" and {"style", "direct", "cut", "support", "chunks", "recipe", "until"} & {*given}:
            fail(f"--method={c.method} has no use for --{min({'group', 'max_new', 'style', 'direct', 'cut', 'support', 'chunks', 'recipe', 'until'} & {*given})}")
        if c.method != "sft" and WORLD > 1:
            fail(f"--method={c.method} runs in one process, without torchrun")
        if c.recipe != "ours" and c.init:
            fail("--recipe is the shape of a new model: leave --init out")
        if c.method != "sft" and not c.init:
            fail(f"--method={c.method} learns from the trajectories of a trained model: give one with --init=RUN/ckpt.pt")
        batch = given.get("batch", OWN["batch"])
        if c.method != "sft" and (c.update > c.group or batch % c.group or c.group < 2):
            fail(f"--update={c.update} must be at most --group={c.group}, which must be at least 2 and divide --batch={batch}")
        if c.support > 1 and not c.pool:
            fail("--support counts trajectories of the questions in a --pool: give its size")
        if not c.init and (c.width % c.heads or c.width // c.heads % 2):
            fail(f"--width={c.width} must be an even multiple of --heads={c.heads}")
        if c.direct + c.cut > 1:
            fail("--direct and --cut are shares of the samples and make more than 1 together")
        for style in c.style.split(","):
            if style not in arithmetic.STYLES or style == "direct":
                fail(f"--style={c.style}: there is no style {style!r}, choose from {', '.join(s for s in arithmetic.STYLES if s != 'direct')}")
        for d in c.domains.split(","):
            if d not in arithmetic.TRAINED:
                fail(f"--domains={c.domains}: there is no domain {d!r}, choose from {', '.join(arithmetic.TRAINED)}")
            if c.operands and not set(c.operands.split(",")) <= set(map(str, arithmetic.TRAINED[d])):
                fail(f"--operands={c.operands}: {d} is trained on {', '.join(map(str, arithmetic.TRAINED[d]))}")
        if "ask" in given:
            try:
                arithmetic.parse(c.ask)
            except ValueError as e:
                fail(e)
            if {*given} - {"ask", "out", "device", "threads"}:
                fail(f"--ask trains nothing: leave --{min({*given} - {'ask', 'out', 'device', 'threads'})} out")
    return c, given

if __name__ == "__main__":
    COMMAND = check(*flags(Train))                                          # before the seconds that torch takes to import

import numpy as np                                                          # noqa: E402
import torch                                                                # noqa: E402
import torch.distributed as dist                                            # noqa: E402
from torch.utils.data import DataLoader                                     # noqa: E402
from tqdm import tqdm                                                       # noqa: E402

from data import text                                                       # noqa: E402
from model import Config, Model                                             # noqa: E402

FORMAT = "raml-arithmetic checkpoint 1"


# ----------------------------------------------------------------------------------------------------------------- run folders

def device_of(c):
    """Resolves --device, sets threads. Exits 2 where CUDA is asked for and missing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:                                                             # glibc: keep freed memory instead of paging it in anew
        mallopt(-1, 2**30), mallopt(-3, 2**25)                              # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.device == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda, but torch finds no CUDA device")
    device = torch.device("cuda" if c.device != "cpu" and torch.cuda.is_available() else "cpu")
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))            # what "cuda" means from here on
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                          # TF32 for what autocast leaves in float32
    return device

def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"

def revision():
    """The git revision of the code, '+' behind it where files differ from it; 'unknown' outside a repository."""
    git = lambda *a: subprocess.run(["git", "-C", str(Path(__file__).parent), *a], capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno")) or "unknown"
    except OSError:
        return "unknown"

def write(path, data):
    """Whole or not at all: a dict or list as JSON, a string as it is, by way of a temporary file beside the target."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    if isinstance(data, str):
        temporary.write_text(data)
    else:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)

def save(path, **state):
    """A checkpoint, whole or not at all. OSError if it cannot be written; the one before it stands."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        torch.save({"format": FORMAT, "encoding": text.ENCODING.name, **state}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                                    # torch says RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, and what stood there before still does: {str(e).splitlines()[0]}") from None

def load(path, device="cpu"):
    """A checkpoint written by `save` -> dict. Exits 2 with a line that says what is wrong. Nothing in the file is executed, and
    every record of it is held against its checksum first, which torch itself does not do."""
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()
        if broken:
            fail(f"{path} is damaged ({broken} does not match its checksum)")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"there is no checkpoint at {path}")
    except Exception as e:                                                  # zipfile and torch raise a dozen kinds for a broken file
        fail(f"{path} cannot be read as a checkpoint ({type(e).__name__})")
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("encoding") != text.ENCODING.name:
        fail(f"{path} is not a checkpoint of this version of this project")
    return state

def checksum(path):
    """Of a file, 16 hex digits (blake2b): what a figure's data name the weights by that it was made from."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()

def load_model(path, device="cpu"):
    """-> (Model on device, the whole checkpoint)."""
    state = load(path, device)
    try:
        return Model.load(state["model"]).to(device), state
    except (ValueError, KeyError) as e:
        fail(f"{path}: {e}")


# ------------------------------------------------------------------------------------------------------------------- optimisers

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then the nearest (semi-)orthogonal matrix by five Newton-Schulz steps.

    torch.optim.Muon does the same one matrix at a time in bfloat16, which a CPU without bfloat16 units emulates: there a step of this
    one, all matrices of a shape at once and in float32, takes an eighteenth of the time."""
    def __init__(self, params, lr=0.02, momentum=0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    g = p.grad.lerp(m, group["momentum"])                   # Nesterov
                    shapes.setdefault(p.shape, []).append((p, g))
            for (rows, cols), pairs in shapes.items():
                x = torch.stack([g for _, g in pairs])
                x = self.orthogonal(x.mT).mT if rows > cols else self.orthogonal(x)
                scale = group["lr"] * max(1, rows / cols) ** 0.5
                for (p, _), u in zip(pairs, x):
                    p.sub_(u, alpha=scale)

    @staticmethod
    def orthogonal(x):
        """(N, R, C), R <= C -> about U V^T of every x = U S V^T."""
        x = x.bfloat16() if x.is_cuda else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.float()

def optimisers(model, lr, lr_adam, recipe="ours"):
    """ours: Muon for the matrices of the blocks, AdamW for embedding and head. adamw: AdamW for both. nanogpt: one AdamW as in nanoGPT."""
    inside = {p: n.startswith("blocks.") and p.ndim == 2 for n, p in model.named_parameters()}
    (hidden, rest), fused = ([p for p, h in inside.items() if h == want] for want in (True, False)), model.head.weight.is_cuda
    if recipe == "nanogpt":
        groups = [{"params": [p for p in inside if (p.ndim == 2) == big], "weight_decay": 0.1 * big} for big in (True, False)]
        return [torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), fused=fused)]
    adamw = lambda params, lr: torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    return [Muon(hidden, lr) if recipe == "ours" else adamw(hidden, lr), adamw(rest, lr_adam)]

def together(params, numbers):
    """Sums gradients, and numbers to log, over the processes of a torchrun in one all-reduce. -> numbers"""
    if WORLD == 1:
        return numbers
    params = [p for p in params if p.requires_grad]
    for p in params:                                                        # a process whose share was empty
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in params] + [torch.stack([torch.as_tensor(v, device=params[0].device, dtype=params[0].dtype) for v in numbers.values()])])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([*(p.numel() for p in params), len(numbers)])):
        p.grad.copy_(g.view_as(p))
    return dict(zip(numbers, flat[-len(numbers):].tolist()))


# ------------------------------------------------------------------------------------------------------------- the loop around it

def linear(c, i):
    """The rate of step i: warm-up, then level, then linearly to 0."""
    return min(1, (i + 1) / max(1, c.warmup), (c.steps - i) / max(1, c.decay * c.steps))

def cosine(c, i):
    """nanoGPT's: warm-up, then a cosine to a tenth."""
    return min((i + 1) / max(1, c.warmup), 0.55 + 0.45 * math.cos(math.pi * i / c.steps))

def fit(c, model, opts, step, extra=None, rate=linear, reached=None):
    """c.steps times: `step(i)` leaves gradients and returns numbers to log; then the optimisers. Checkpoints, log, resume, signals.

    Writes metrics.jsonl (one line a step) and ckpt.pt to c.out; `extra` is a further module for the checkpoint. Ends early where
    `reached(steps done)`, whose time does not count, says so. Of the processes of a torchrun the first one writes. Stops with
    exit code 1 at a loss that is not finite (the last good checkpoint stays), 130 / 143 after SIGINT / SIGTERM (saved first).
    -> (seconds of training, over all sittings, and steps done)."""
    out, start, seconds = Path(c.out), 0, 0.0
    ckpt, log_path = out / "ckpt.pt", out / "metrics.jsonl"
    lines = []
    if c.resume:
        state = load(ckpt, next(model.parameters()).device)
        model.load_state_dict(state["model"]["weights"])
        for o, s in zip(opts, state["optimisers"]):
            o.load_state_dict(s)
        if extra is not None:
            extra.load_state_dict(state["extra"])
        start, seconds = state["step"], state["seconds"]
        lines = log_path.read_text().splitlines()[:start]
    else:
        for name in ("ckpt.pt", "summary.json") if RANK == 0 else ():       # --overwrite was given, or there are none
            (out / name).unlink(missing_ok=True)
    if RANK == 0:
        if not c.resume:
            write(out / "config.json", asdict(c))
        write(log_path, "".join(line + "\n" for line in lines))

    def checkpoint(done):
        if RANK:
            return
        log.flush()
        save(ckpt, model=model.state(), optimisers=[o.state_dict() for o in opts], step=done, seconds=seconds, config=asdict(c),
             extra=None if extra is None else extra.state_dict())

    caught = []
    old = {s: signal.signal(s, lambda n, _: caught.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    for o in opts:
        for g in o.param_groups:
            g.setdefault("base", g["lr"])
    try:
        with open(os.devnull if RANK else log_path, "a") as log, \
             tqdm(total=c.steps, initial=start, unit="step", disable=RANK > 0 or None, dynamic_ncols=True) as bar:
            for i in range(start, c.steps):
                began = time.perf_counter()
                for o in opts:
                    for g in o.param_groups:
                        g["lr"] = g["base"] * rate(c, i)
                numbers = step(i)
                if not all(math.isfinite(v) for v in numbers.values()):
                    print(f"error: step {i}: {numbers} is not finite; try a smaller --lr" + f" (the last checkpoint, {ckpt}, is good)" * ckpt.exists(),
                          file=sys.stderr)
                    raise SystemExit(1)
                for o in opts:
                    o.step()
                    o.zero_grad(set_to_none=True)
                seconds += time.perf_counter() - began
                log.write(json.dumps({"step": i, **numbers, "seconds": round(seconds, 3)}) + "\n")
                bar.set_postfix({k: f"{v:.3f}" for k, v in numbers.items() if k != "tokens"}, refresh=False)
                bar.update()
                if WORLD > 1:                                               # all stop after the same step
                    signals = torch.tensor(max(caught, default=0), device=next(model.parameters()).device)
                    dist.all_reduce(signals, dist.ReduceOp.MAX)
                    caught = [int(signals)] * bool(signals)
                enough = reached is not None and not caught and reached(i + 1)
                if (i + 1) % c.save_every == 0 or i + 1 == c.steps or caught or enough:
                    checkpoint(i + 1)
                if enough:
                    return seconds, i + 1
                if caught:
                    RANK or print(f"\nstopped; go on with: python {Path(sys.argv[0]).name} --out={c.out} --resume", file=sys.stderr)
                    raise SystemExit(128 + caught[0])
    except RuntimeError as e:                                               # here, where torchrun's SIGTERM is still caught
        if WORLD > 1 and ("peer" in str(e) or isinstance(e, dist.DistError)):
            print("error: another process of this run has ended; the last checkpoint stands: go on with --resume", file=sys.stderr)
            raise SystemExit(1) from None
        raise
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
    return seconds, c.steps

def prepare(c, given):
    """Looks at c.out before a run and changes nothing: refuses to replace a run unasked; with --resume takes the config that it
    was started with and refuses to change it. -> c."""
    out = Path(c.out)
    if not c.resume:
        if (out / "config.json").exists() and not c.overwrite:
            fail(f"{out} already holds a run: add --resume to go on with it, --overwrite to replace it, or choose another --out")
        return c
    before = load(out / "ckpt.pt")["config"]
    if set(before) != {f.name for f in fields(c)}:
        fail(f"{out} is not a run of this script in this version")
    given = {*given}
    free = {"device", "threads"} & given                                    # else as before: another thread count rounds differently
    for k in given - free - {"resume", "overwrite", "out"}:
        if before[k] != getattr(c, k):
            fail(f"--{k}={getattr(c, k)} differs from the {before[k]} that the run in {out} was started with")
    return type(c)(**{**before, **{k: getattr(c, k) for k in free}, "resume": True, "overwrite": False, "out": c.out})


# ------------------------------------------------------------------------------------------------------------------ evaluation

def held_out(domain, operands, n, part=None, seed=0):
    """n questions of a cell, distinct where it has so many: the same for every model. part: default test, or ood where that applies."""
    part = part or ("test" if operands in arithmetic.TRAINED.get(domain, ()) else "ood")
    rng, found = random.Random(f"{seed}/{domain}/{operands}/{part}"), {}
    for _ in range(20 * n):
        q = arithmetic.draw(rng, domain, operands, part)
        found.setdefault(arithmetic.canonical(q), q)
        if len(found) == n:
            break
    return list(found.values())

def respond(model, questions, mode="trajectory", max_new=96, **sampling):
    """Model output for Questions -> list of (trajectory text or None, answer text). mode: 'trajectory' thinks first, 'direct' does not."""
    think = None if mode == "trajectory" else ""
    rows = model.generate([text.prompt(q.text, think) for q in questions], text.EOS, max_new if think is None else 6, pad=text.PAD, **sampling)
    out = []
    for row in rows:
        t, a = (row[:row.index(text.END_THINK)], row[row.index(text.END_THINK) + 1:]) if think is None and text.END_THINK in row else \
               (row, []) if think is None else ([], row)
        out.append((text.decode(t), text.decode(a)))
    return out

def pass_at_k(n, c, k):
    """Unbiased estimate, from c right among n samples, that one of k is right (the paper's Eq. 22; 2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def mg_pass_at_k(n, c, k):
    """mG-Pass@k (Eq. 23; 2412.13147): (2/k) sum over i > k/2 of the chance that at least i of k are right: right, and reliably so."""
    at_least = lambda i: sum(math.comb(c, j) * math.comb(n - c, k - j) for j in range(i, min(c, k) + 1)) / math.comb(n, k)
    return 2 / k * sum(at_least(i) for i in range(math.ceil(k / 2) + 1, k + 1))

def sampled(model, questions, n, mode="trajectory", seed=0, size=1024):
    """n outputs a question, sampled at temperature 1 -> [(how many are right, how many give a plain number as answer)]."""
    generator, asked = torch.Generator(model.head.weight.device).manual_seed(seed), [q for q in questions for _ in range(n)]
    out = []
    for i in range(0, len(asked), size):
        part = asked[i:i + size]
        out += [(arithmetic.verify(q, a), arithmetic.number(a) is not None)
                for q, (_, a) in zip(part, respond(model, part, mode, temperature=1.0, generator=generator))]
    return [tuple(map(sum, zip(*out[i:i + n]))) for i in range(0, len(out), n)]

def exact_match(model, cells, n, seed=0, size=1024):
    """{domain: {operands: {mode: share right}}} over n held-out questions a cell, and a few mistakes as text."""
    questions = [(d, k, q) for d, ks in cells.items() for k in ks for q in held_out(d, k, n, seed=seed)]
    right, mistakes = {}, []
    for mode in ("trajectory", "direct"):
        for i in range(0, len(questions), size):
            part = questions[i:i + size]
            for (d, k, q), (t, a) in zip(part, respond(model, [q for *_, q in part], mode)):
                ok = arithmetic.verify(q, a)
                right.setdefault(d, {}).setdefault(str(k), {}).setdefault(mode, []).append(ok)
                if not ok and mode == "trajectory" and k in arithmetic.TRAINED.get(d, ()):
                    mistakes.append(f"{q.text} -> {t} -> {a or '(no answer)'}, but it is {q.answer}")
    table = {d: {k: {m: sum(v) / len(v) for m, v in ms.items()} for k, ms in ks.items()} for d, ks in right.items()}
    return table, mistakes

CELLS = {d: (*arithmetic.TRAINED.get(d, ()), *arithmetic.OOD[d]) for d in arithmetic.OOD}

def show_table(table):
    """Exact match as text, a line a cell."""
    lines = [f"{'domain':8} {'operands':>8} {'trajectory':>11} {'direct':>8}"]
    for d, ks in table.items():
        for k, m in ks.items():
            note = "" if int(k) in arithmetic.TRAINED.get(d, ()) else "   never trained on"
            lines.append(f"{d:8} {k:>8} {m['trajectory']:>11.1%} {m['direct']:>8.1%}{note}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- SFT, GRPO, DPO (Table 1)

def mix_of(c):
    """The questions and trajectories that the flags ask for."""
    names = c.domains.split(",")
    mix = text.Mix(style=c.style, direct=c.direct, cut=c.cut, filler=min(text.Mix().filler, max(0.0, 1 - c.direct - c.cut)))
    mix = mix._replace(domains={d: mix.domains[d] for d in names})
    if c.operands:
        mix = mix._replace(operands={d: [float(str(k) in c.operands.split(",")) for k in arithmetic.TRAINED[d]] for d in names})
    return mix.limited(c.pool, c.support, c.seed) if c.pool else mix

def apart(worker):
    """A signal to the process group (Ctrl-C) is for the process that can save, not for one that makes batches."""
    if hasattr(os, "setsid"):
        os.setsid()

def sft_step(c, model, mix, low):
    """Cross-entropy on trajectories and answers that somebody wrote: off-policy, one number a token."""
    device = model.head.weight.device
    cuda, batches = device.type == "cuda", []

    def step(i):
        if not batches:                                                     # made by other processes while this one learns
            batches.append(iter(DataLoader(text.Batches(c.batch, mix, c.seed), batch_size=None, sampler=range(i, c.steps), pin_memory=cuda,
                                           num_workers=min(15, os.cpu_count() - 1) if cuda else 1, worker_init_fn=apart)))
        batch = text.Batch(*(t.to(device, non_blocking=True) for t in next(batches[0])))
        n, numbers = (batch.targets >= 0).sum(), {"loss": 0.0, "tokens": 0.0}
        own = [t[RANK::WORLD] for t in batch]                               # this process's share
        for part in map(text.Batch._make, zip(*(t.chunk(c.chunks) for t in own)) if len(own[0]) else ()):
            with low:
                loss = model.nll(part.ids, part.targets, pos=part.pos, mask=part.mask()).sum() / n
            loss.backward()
            numbers = {"loss": numbers["loss"] + loss.detach(), "tokens": numbers["tokens"] + (part.sample > 0).sum()}
        numbers = together(model.parameters(), numbers)
        if c.recipe == "nanogpt":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return {"loss": float(numbers["loss"]), "tokens": int(numbers["tokens"])}
    return step

def rollouts(model, questions, c, seed):
    """c.group outputs a question, sampled at temperature 1 -> (questions repeated, lists of ids after `<think>`, `<eos>` included)."""
    asked = [q for q in questions for _ in range(c.group)]
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    rows = model.generate([text.prompt(q.text) for q in asked], text.EOS, c.max_new, 1.0, generator=generator, pad=text.PAD)
    return asked, [r + [text.EOS] * (len(r) < c.max_new) for r in rows]

def log_prob(model, asked, rows):
    """log p of every token of `rows` after its question -> (N, T), and the mask of what are tokens of an output."""
    full = [(text.prompt(q.text), r) for q, r in zip(asked, rows)]
    T, device = max(len(h) + len(r) for h, r in full), model.head.weight.device
    ids = torch.tensor([h + r + [text.PAD] * (T - len(h) - len(r)) for h, r in full], device=device)
    targets = torch.tensor([[text.IGNORE] * len(h) + r + [text.IGNORE] * (T - len(h) - len(r)) for h, r in full], device=device)[:, 1:]
    return -model.nll(ids[:, :-1], targets), targets >= 0

def advantages(rewards, adv):
    """(questions, G) -> the same shape: how much better than its group (GRPO, 2402.03300). dr_grpo leaves out the division by the group's
    standard deviation, which weighs questions by their difficulty and biases the gradient (2503.20783)."""
    a = rewards - rewards.mean(1, keepdim=True)
    return a if adv == "dr_grpo" else a / (rewards.std(1, keepdim=True) + 1e-6)

def policy_loss(logp, old, mask, advantage, c, ref=None):
    """The clipped objective of Table 1, negated. logp, old, ref, mask (N, T), advantage (N,).

    grpo averages over each output's own length, which favours long wrong ones; dr_grpo divides by a constant."""
    A, rho = advantage[:, None], (logp - old).exp()
    gain = torch.minimum(rho * A, rho.clamp(1 - c.eps, 1 + c.eps) * A)
    if ref is not None:
        gain = gain - c.kl * ((ref - logp).exp() - (ref - logp) - 1)        # unbiased, never negative (Schulman's k3)
    return -((gain * mask).sum(1) / (mask.sum(1) if c.adv == "grpo" else c.max_new)).mean()

def dpo_loss(better, worse, ref_better, ref_worse, beta):
    """-log sigmoid(r+ - r-) with r = beta log(p / p_ref) of a whole output (2305.18290) -> (mean loss, share of pairs in order)."""
    margin = beta * ((better - ref_better) - (worse - ref_worse))
    return -torch.nn.functional.logsigmoid(margin).mean(), (margin > 0).float().mean()

def own_questions(c, mix, i):
    """The questions of a step of grpo or dpo: a pure function of (seed, step)."""
    rng = random.Random(f"{c.method}/{c.seed}/{i}")
    return [rng.choice(mix.pool)[0] if mix.pool else mix.question(rng) for _ in range(c.batch // c.group)]

def judge(asked, rows):
    return torch.tensor([arithmetic.reward(q, text.decode(r)) for q, r in zip(asked, rows)])

def grpo_step(c, model, mix, low, opts, ref):
    """On-policy reinforcement learning: sample, judge by the verifier, move towards what did better than its group."""
    silent = [0]

    def step(i):
        seed = c.seed * 1_000_003 + i
        asked, rows = rollouts(model, own_questions(c, mix, i), c, seed)
        rewards = judge(asked, rows).view(-1, c.group)
        A = advantages(rewards, c.adv)
        signal = (A != 0).any(1).float().mean()
        silent[0] = 0 if signal else silent[0] + 1
        if silent[0] == 20:
            tqdm.write(f"note: step {i}: all rewards of a group were equal in 20 steps in a row: there is nothing to learn from; going on", file=sys.stderr)
        rng, keep = random.Random(seed), []
        for g in range(len(A)):                                             # C10: the gradient sees `update` of a group, the advantages all
            keep += sorted(g * c.group + j for j in rng.sample(range(c.group), c.update or c.group))
        part = [asked[j] for j in keep], [rows[j] for j in keep]
        with torch.no_grad(), low:
            before = log_prob(ref, *part)[0] if c.kl else None
        old = None
        for epoch in range(c.epochs):
            if epoch:                                                       # the last epoch's step is the caller's
                for o in opts:
                    o.step()
                    o.zero_grad(set_to_none=True)
            with low:
                logp, mask = log_prob(model, *part)
                old = logp.detach() if old is None else old
                loss = policy_loss(logp, old, mask, A.flatten()[keep].to(logp.device), c, before)
            loss.backward()
        return {"reward": float(rewards.mean()), "right": float((rewards == 1).float().mean()), "form": float((rewards >= 0).float().mean()),
                "signal": float(signal), "length": sum(map(len, rows)) / len(rows), "entropy": float(-(old * mask).sum() / mask.sum()),
                "tokens": sum(map(len, rows))}
    return step

def dpo_step(c, model, mix, low, opts, ref):
    """Preference optimisation: outputs sampled from --init, a right one preferred to a wrong one of the same question. Off-policy."""
    def step(i):
        asked, rows = rollouts(ref, own_questions(c, mix, i), c, c.seed * 1_000_003 + i)
        rewards, pairs = judge(asked, rows), []
        for g in range(0, len(rows), c.group):
            right, wrong = ([j for j in range(g, g + c.group) if (rewards[j] == 1) == r] for r in (True, False))
            pairs += zip(right, wrong)
        if not pairs:
            return {"loss": 0.0, "preferred": 0.5, "pairs": 0, "tokens": sum(map(len, rows))}
        order = [j for j, _ in pairs] + [j for _, j in pairs]
        part = [asked[j] for j in order], [rows[j] for j in order]
        with torch.no_grad(), low:
            before = log_prob(ref, *part)[0].sum(1).split(len(pairs))
        with low:
            loss, order = dpo_loss(*log_prob(model, *part)[0].sum(1).split(len(pairs)), *before, c.beta)
        loss.backward()
        return {"loss": float(loss.detach()), "preferred": float(order), "pairs": len(pairs), "tokens": sum(map(len, rows))}
    return step

def train(c, given):
    """Trains by c.method, evaluates, writes c.out. -> summary."""
    check(c, given)
    if not c.resume:
        name = c.preset if c.preset != "auto" else "gpu" if torch.cuda.is_available() and c.device != "cpu" else "tiny"
        c = Train(**{**PRESETS[name], **(OWN if c.method != "sft" else RECIPES[c.recipe]), **given, "preset": name})
    c = prepare(c, given)
    device = device_of(c)
    torch.manual_seed(c.seed)
    mix = mix_of(c)
    if c.init:
        model, start = load_model(c.init, device)
        shape = {k: start["model"]["shape"][k] for k in ("layers", "heads", "width")}
        for k in {*shape} & {*given}:
            if shape[k] != getattr(c, k):
                fail(f"--{k}={getattr(c, k)}, but the model in {c.init} has {shape[k]}")
        c = replace(c, **shape)
    else:
        model = Model(Config(text.VOCAB, c.layers, c.heads, c.width, gpt2=c.recipe == "nanogpt")).to(device)
    if c.compile == "yes" or c.compile == "auto" and device.type == "cuda":
        model.compile_blocks()
    low = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16" or c.dtype == "auto" and device.type == "cuda")
    opts = optimisers(model, c.lr, c.lr_adam, c.recipe)
    if c.method == "sft":
        step = sft_step(c, model, mix, low)
    else:
        step = {"grpo": grpo_step, "dpo": dpo_step}[c.method](c, model, mix, low, opts, load_model(c.init, device)[0].requires_grad_(False))
    domain = c.domains.split(",")[0]
    goal = held_out(domain, 4, 200, "val") if c.until else []
    reached = lambda done: (done % max(20, c.steps // 40) == 0 or done == c.steps) and np.mean([arithmetic.verify(q, a) for q, (_, a) in zip(goal, respond(model, goal))]) >= c.until
    seconds, done = fit(c, model, opts, step, rate=cosine if c.recipe == "nanogpt" else linear, reached=reached if c.until else None)
    if WORLD > 1:
        dist.barrier()                                                      # the checkpoint is written
    if RANK:
        return {}
    table, mistakes = exact_match(model, CELLS, c.questions)
    print(show_table(table))
    print("\n".join(["a few mistakes:", *mistakes[:5]]) if mistakes else "no mistakes on held-out questions of trained sizes")
    summary = {"exact_match": table, "mistakes": mistakes[:20], "seconds": round(seconds, 1), "steps": done,
               "tokens": sum(json.loads(line)["tokens"] for line in (Path(c.out) / "metrics.jsonl").read_text().splitlines()),
               "parameters": sum(p.numel() for p in model.parameters()), "device": device_name(device), "torch": torch.__version__,
               "revision": revision(), "config": asdict(c)} | ({"reached": bool(reached(done))} if c.until else {})
    write(Path(c.out) / "summary.json", summary)
    return summary

def ask(c):
    """Prints how the model in c.out answers a question of the reader's own, every step checked."""
    q = arithmetic.parse(c.ask)
    model, _ = load_model(Path(c.out) / "ckpt.pt", device_of(c))
    (t, a), = respond(model, [q])
    (_, d), = respond(model, [q], "direct")
    print(f"question    {q.text}" + ("" if q.operands in arithmetic.TRAINED.get(q.domain, ()) else "   (longer than, or unlike, anything it trained on)"))
    for part, ok in zip(t.split(";"), arithmetic.check(q, t)):
        print(f"            {part}   {'ok' if ok else 'wrong'}")
    for name, answer in (("answer", a), ("direct", d)):
        print(f"{name:11} {answer or '(none)'}   {'right' if arithmetic.verify(q, answer) else 'wrong: it is ' + q.answer}")


def command(main):
    """Runs a script's main. Ctrl-C outside of `fit`, where there is nothing to save, files in the way, a full disk or memory are a line,
    not a traceback."""
    try:
        main()
    except OSError as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e):
            fail("out of memory: a smaller --batch needs less, and so do more --chunks")
        raise
    except KeyboardInterrupt:
        print("\nstopped; what was trained is on disk", file=sys.stderr)
        raise SystemExit(130) from None

def main(parsed=None):
    c, given = parsed or check(*flags(Train))
    ask(c) if "ask" in given else train(c, given)

if __name__ == "__main__":
    command(lambda: main(COMMAND))
