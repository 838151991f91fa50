"""Files, devices, and what surrounds a training loop and has nothing to do with learning: the run's
folder, its log, its checkpoints, resuming, signals. The loop itself stands in the scripts.

A run in c.out is `config.json`, `metrics.jsonl` (one line per step), `ckpt.pt` (whole or not at
all) and, at its end, `summary.json`.
"""
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import text
from lab.flags import fail, from_file

FORMAT = "raml-digit checkpoint 1"
ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------- files

def write(path, data):
    """Writes a dict or list as JSON, a string as it is: whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    content = data if isinstance(data, str) else json.dumps(data, indent=1) + "\n"
    part.write_text(content, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)

def save(path, **state):
    """Writes a checkpoint, whole or not at all. OSError if it cannot be; the one before it
    stands."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        torch.save({"format": FORMAT, "encoding": text.ENCODING.name, **state}, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:            # torch says RuntimeError for a full disk
        part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        raise OSError(f"{path} could not be written, and what stood there before still does: "
                      f"{reason}") from None

def load(path, device="cpu") -> dict:
    """Reads a checkpoint written by `save`. Nothing in the file is executed. Exits 2 with a line
    that says what is wrong with it."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"there is no checkpoint at {path}")
    except Exception as e:                          # a broken file raises a dozen kinds
        fail(f"{path} cannot be read as a checkpoint ({type(e).__name__})")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fail(f"{path} is not a checkpoint of this version of this project")
    kinds = {"model": dict, "step": int, "config": dict, "optimisers": list}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            fail(f"{path} has no {name}, which a checkpoint of this project has")
    return state

def checksum(model) -> str:
    """Names the weights of a model by 16 hex digits, wherever they were loaded from."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()

def revision() -> str:
    """Names the git revision of the code, with a '+' where a .py differs or is new; 'unknown'
    without git. A repository around this folder, or in GIT_DIR, is another project's."""
    def git(*args):
        command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", *args]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        return done.stdout.strip()
    try:
        changed = git("status", "--porcelain", "-uall", "--", "*.py")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed) or "unknown"
    except OSError:
        return "unknown"

def read_log(folder, steps: int = None) -> list:
    """Reads a run's log, or its first steps -> a dict per step. Exits 2 with a line where it is
    damaged."""
    path, rows = Path(folder) / "metrics.jsonl", []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for i, line in enumerate(lines[:steps]):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or row.get("step") != i:
            fail(f"line {i + 1} of {path} is damaged")
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------- devices

def device_of(c) -> torch.device:
    """Resolves --device and sets --threads. Exits 2 with a line where a device is missing."""
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.device == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda, but torch finds no CUDA device")
    cuda = c.device != "cpu" and torch.cuda.is_available()
    if cuda:
        # It would build a plan for every new shape, up to a second each on Hopper and later.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda" if cuda else "cpu")

def device_name(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"

def precision_of(c, device):
    """Resolves --dtype: what training computes in, None being the weights' own float32. auto is
    bfloat16 where the hardware multiplies in it."""
    if device.type == "cuda":
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    half = c.dtype == "bfloat16" or c.dtype == "auto" and has_units
    return torch.bfloat16 if half else None


# ----------------------------------------------------------------------------- before and after

def prepare(c, given: dict):
    """Looks at c.out before a run and changes nothing: refuses to replace a run unasked; with
    --resume takes the config that the run was started with, and refuses to change it -> c, with the
    number type that is used in place of auto."""
    out = Path(c.out)
    if c.resume and c.overwrite:
        fail("--resume goes on with a run, --overwrite replaces it: choose one")
    if not c.resume:
        if (out / "config.json").exists() and not c.overwrite:
            fail(f"{out} already holds a run: add --resume to go on with it, --overwrite to "
                 "replace it, or choose another --out")
        if c.init and Path(c.init).resolve().parent == out.resolve():
            fail(f"--init={c.init} lies in --out={c.out}, and would be overwritten")
        return replace(c, dtype="bfloat16" if precision_of(c, device_of(c)) else "float32")
    if not (out / "ckpt.pt").exists():
        fail(f"there is nothing to resume in {out}")
    before = from_file(type(c), load(out / "ckpt.pt")["config"], out / "ckpt.pt")
    # Another number of threads rounds differently; a smaller rate is what a diverged run needs.
    free = {k for k in ("device", "threads") if k in given}
    free |= {k for k in ("lr", "lr_adam") if k in given and getattr(c, k) < getattr(before, k)}
    for k in set(given) - free - {"resume", "overwrite", "out"}:
        if getattr(before, k) != getattr(c, k):
            fail(f"--{k}={getattr(c, k)} differs from the {getattr(before, k)} that the run in "
                 f"{out} was started with")
    changed = {k: getattr(c, k) for k in free}
    return replace(before, **changed, resume=True, overwrite=False, out=c.out)

def provenance(c, model, run) -> dict:
    """What every summary says of how it came about."""
    return {
        "seconds": round(run.seconds, 1), "steps": c.steps,
        "tokens": sum(line["tokens"] for line in read_log(c.out)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(model.device), "torch": torch.__version__,
        "dtype": str(model.dtype or torch.float32).removeprefix("torch."),
        "revision": revision(), "config": asdict(c)}

def command(main):
    """Runs a script's main. Ctrl-C where there is nothing to save, files in the way, a full disk or
    memory are a line, not a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")        # None: `2>&-` closed it
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):          # a folder's name may be beyond the terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:                         # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:        # torch has a class for a GPU's memory only
        known = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not known and "allocate memory" not in str(e):
            raise
        fail("out of memory: a smaller --batch or --width needs less")
    except KeyboardInterrupt:
        print("\nstopped; what was trained is on disk", file=sys.stderr)
        raise SystemExit(130) from None


# ---------------------------------------------------------------------------- around the loop

def lr_at(c, step: int, decay: float = 1.0) -> float:
    """The learning rates' share at a step: a linear warm-up, then level, then linearly down to 0
    over the last `decay` of all steps."""
    return min((step + 1) / max(1, c.warmup), (c.steps - step) / (decay * c.steps), 1)

def move(opts: list, share: float):
    """Takes a step of every optimiser at this share of its rate, and clears the gradients."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = share * group.setdefault("base", group["lr"])
        opt.step()
        opt.zero_grad(set_to_none=True)


class Draws:
    """draw(step) of any step, in the form that a DataLoader reads."""
    def __init__(self, draw):
        self.draw = draw

    def __getitem__(self, step):
        return self.draw(step)

def ahead(draw, steps: range, device):
    """Yields draw(step), a list, for every step. A GPU would wait for Python, so processes draw
    ahead of it; draw must be a pure function of its step, so that nothing else changes."""
    if device.type != "cuda":
        return map(draw, steps)
    workers = min(8, os.cpu_count() or 1)
    return DataLoader(Draws(draw), None, sampler=steps, num_workers=workers, collate_fn=list)


class Run:
    """One run in c.out, begun or resumed; extra: a further module for its checkpoints.

    `start` is the first step to take. Ctrl-C, SIGTERM and a closed terminal are remembered, unless
    they are ignored (nohup), and acted on by `save` between two steps: a half-taken step could not
    be resumed exactly."""

    def __init__(self, c, model, opts, extra=None):
        self.c, self.model, self.opts, self.extra = c, model, opts, extra
        self.out = Path(c.out)
        self.start, self.seconds, self.caught, lines = 0, 0.0, [], []
        if c.resume:
            lines = self.restore()
        else:
            for name in ("ckpt.pt", "summary.json"):
                (self.out / name).unlink(missing_ok=True)
            write(self.out / "config.json", asdict(c))
        write(self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def restore(self):
        """Takes up the state of the last checkpoint -> the lines of the log up to it."""
        path = self.out / "ckpt.pt"
        state = load(path, self.model.device)
        lines = read_log(self.out, state["step"])   # a crash may have torn what follows
        if len(lines) < state["step"]:
            fail(f"{self.out / 'metrics.jsonl'} ends before step {state['step']} of the checkpoint")
        try:
            self.model.load_state_dict(state["model"]["weights"])
            for opt, old in zip(self.opts, state["optimisers"], strict=True):
                opt.load_state_dict(old)
            if self.extra is not None:
                self.extra.load_state_dict(state["extra"])
            self.start, self.seconds = state["step"], state["seconds"]
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            fail(f"{path} does not fit this run: {str(e).splitlines()[-1].strip()}")
        return lines

    def __enter__(self):
        self.lines = open(self.out / "metrics.jsonl", "a", encoding="utf-8")
        self.bar = tqdm(total=self.c.steps, initial=self.start, unit="step", disable=None,
                        dynamic_ncols=True)
        stops = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
        self.handlers = {s: signal.signal(s, lambda number, _: self.caught.append(number))
                         for s in stops if signal.getsignal(s) != signal.SIG_IGN
                         and threading.current_thread() is threading.main_thread()}
        self.began = time.perf_counter() - self.seconds
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        self.lines.close()

    def log(self, step: int, numbers: dict):
        """Writes a step's line of the log. Ends the run with a line where a number is not
        finite."""
        if not all(math.isfinite(v) for v in numbers.values()):
            self.refuse(step)
        self.seconds = time.perf_counter() - self.began
        line = {"step": step, **numbers, "seconds": round(self.seconds, 3)}
        self.lines.write(json.dumps(line) + "\n")
        shown = {k: f"{v:.3f}" for k, v in numbers.items() if k != "tokens"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def save(self, step: int):
        """Writes a checkpoint after this step if it is time for one; ends the run after a
        signal."""
        done = step + 1
        if done < self.c.steps and done % self.c.save_every and not self.caught:
            return
        if not os.path.samestat(os.fstat(self.lines.fileno()), os.stat(self.lines.name)):
            fail(f"another run has taken {self.out} over: this one ends, and touches nothing")
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.refuse(step)
        self.lines.flush()
        save(self.out / "ckpt.pt", model=self.model.state(), step=done, seconds=self.seconds,
             optimisers=[opt.state_dict() for opt in self.opts], config=asdict(self.c),
             extra=None if self.extra is None else self.extra.state_dict())
        if self.caught and done < self.c.steps:
            print(f"\nstopped; go on with: python {self.c.script} --out={self.c.out} --resume",
                  file=sys.stderr)
            raise SystemExit(128 + self.caught[0])

    def refuse(self, step: int):
        print(f"error: step {step}: a number is not finite; try a smaller --lr (with --resume, if "
              f"there is a checkpoint: the last one is good)", file=sys.stderr)
        raise SystemExit(1)
