"""What surrounds a training loop and has nothing to do with learning: the run's folder, its log and
checkpoints, resuming, signals. The loop itself stays with the reader:

    with Run(c, model, opts) as run:
        for i in run:                       # from where the run stopped, up to c.steps
            numbers = ...                   # forward, backward: leaves gradients
            run.update(numbers)             # optimisers, a line of the log

A signal is acted on between two steps: a checkpoint, a line on how to go on, exit code 130 or 143.
A second one ends the process at once.
"""
import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                 # not on Windows: no locks there
    fcntl = None

from data import text
from lab import machine
from lab.flags import fail, from_file
from lab.machine import RANK, WORLD
from lab.optim import linear

FORMAT = "raml-arithmetic checkpoint 2"
ROOT = Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------- files

def write(path, data):
    """Whole or not at all: a dict or list as JSON, a string as it is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    content = data if isinstance(data, str) else json.dumps(data, indent=1) + "\n"
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)

def save(path, **state):
    """A checkpoint, whole or not at all. OSError if it cannot be; the one before it stands."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        torch.save({"format": FORMAT, "encoding": text.ENCODING.name, **state}, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:            # torch says RuntimeError for a full disk
        part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        raise OSError(f"{path} could not be written, and what stood there before still does: "
                      f"{reason}") from None

def load(path, device="cpu"):
    """A checkpoint written by `save` -> dict. Exits 2 with a line that says what is wrong.

    Nothing in the file is executed, and every record of it is held against its checksum first,
    which torch itself does not do. Records are stored plainly: one that unpacks to more than it
    takes on disk is not ours."""
    try:
        with zipfile.ZipFile(path) as z:
            if any(record.compress_type != zipfile.ZIP_STORED for record in z.infolist()):
                fail(f"{path} has compressed records: it was not written by this project")
            broken = z.testzip()
        if broken:
            fail(f"{path} is damaged ({broken} does not match its checksum)")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"there is no checkpoint at {path}")
    except Exception as e:                          # a broken file raises a dozen kinds
        fail(f"{path} cannot be read as a checkpoint ({type(e).__name__})")
    expected = {"format": FORMAT, "encoding": text.ENCODING.name}
    if not isinstance(state, dict) or any(state.get(k) != v for k, v in expected.items()):
        fail(f"{path} is not a checkpoint of this version of this project")
    for name, kind in {"model": dict, "step": int, "config": dict}.items():
        if not isinstance(state.get(name), kind):
            fail(f"{path} has no {name}, which a checkpoint of this project has")
    return state

def checksum(path):
    """Of a file, 16 hex digits: what a figure's JSON names the weights by."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()

def revision():
    """The git revision of the code, '+' behind it where files differ; 'unknown' without git."""
    def git(*args):
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "-uno")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed) or "unknown"
    except OSError:
        return "unknown"

def read_log(folder):
    """A run's log -> a dict a step. Exits 2 with a line where it is damaged."""
    path, rows = Path(folder) / "metrics.jsonl", []
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or row.get("step") != i:
            fail(f"line {i + 1} of {path} is damaged")
        rows.append(row)
    return rows

def provenance(c, model, run):
    """What every summary says of how it came about."""
    device = model.head.weight.device
    return {
        "seconds": round(run.seconds, 1), "steps": run.done,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": machine.device_name(device), "torch": torch.__version__,
        "revision": revision(), "config": asdict(c)}


# ----------------------------------------------------------------------------- before and after

def prepare(c, given):
    """Looks at c.out before a run and changes nothing: refuses to replace a run unasked; with
    --resume takes the config that the run was started with, and refuses to change it. -> c"""
    out = Path(c.out)
    if c.resume and c.overwrite:
        fail("--resume goes on with a run, --overwrite replaces it: choose one")
    if not c.resume:
        if (out / "config.json").exists() and not c.overwrite:
            fail(f"{out} already holds a run: add --resume to go on with it, --overwrite to "
                 "replace it, or choose another --out")
        if c.init and Path(c.init).resolve().parent == out.resolve():
            fail(f"--init={c.init} lies in --out={c.out}, and would be overwritten")
        return c
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

@contextlib.contextmanager
def locked(folder):
    """Holds a run's folder for this process, which may die at any time. Exits 2 with a line where
    another one holds it."""
    if RANK or fcntl is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        fail(f"another process is at work in {folder}: wait for it, or choose another --out")
    machine.HELD.append(handle)
    try:
        yield
    finally:
        machine.HELD.remove(handle)
        os.close(handle)

def command(main):
    """Runs a script's main. Ctrl-C outside of a Run, where there is nothing to save, files in the
    way, a full disk or memory are a line, not a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):         # a folder's name may be beyond the terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:                         # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:
        known = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if known or "allocate memory" in str(e):
            fail("out of memory: a smaller --batch needs less, and so do more --chunks")
        if "DataLoader worker" in str(e):
            fail("a process that makes batches was killed; the last checkpoint stands: go on with "
                 "--resume")
        raise
    except KeyboardInterrupt:
        print("\nstopped; what was trained is on disk", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        machine.leave()


# -------------------------------------------------------------------------------------- the loop

class Run:
    """One run in c.out: config.json, metrics.jsonl (a line a step), ckpt.pt.

    extra: a further module for the checkpoint. rate(c, i): the learning rates' schedule.
    Afterwards `done` steps have been taken in `seconds`, over all sittings. A `look`, (step,
    function), is taken behind the checkpoint of that step: a first figure of a long run."""

    look = None

    def __init__(self, c, model, opts, extra=None, rate=linear):
        self.c, self.model, self.opts, self.extra, self.rate = c, model, opts, extra, rate
        self.out = Path(c.out)
        self.checkpoint, self.log_path = self.out / "ckpt.pt", self.out / "metrics.jsonl"
        self.device = next(model.parameters()).device
        self.start, self.done, self.seconds, self.finished = 0, 0, 0.0, False
        self.caught, self.handlers = [], {}
        self.init = checksum(c.init) if c.init and Path(c.init).exists() else None
        self.precision = machine.training_precision(self.device)

    def __enter__(self):
        rates = [group["lr"] for group in self.groups()]
        lines = self.resume() if self.c.resume else self.begin()
        for group, rate in zip(self.groups(), rates):
            group["base"] = rate
        if RANK == 0:
            write(self.log_path, "".join(line + "\n" for line in lines))
        self.log = open(os.devnull if RANK else self.log_path, "a")
        self.bar = tqdm(total=self.c.steps, initial=self.start, unit="step",
                        disable=RANK > 0 or None, dynamic_ncols=True)
        for s in (signal.SIGINT, signal.SIGTERM):
            self.handlers[s] = signal.signal(s, self.catch)
        self.precision.__enter__()
        return self

    def begin(self):
        """A new run: what an older one left goes. -> no lines of the log"""
        if RANK == 0:
            for name in ("ckpt.pt", "summary.json"):
                (self.out / name).unlink(missing_ok=True)
            write(self.out / "config.json", asdict(self.c))
        return []

    def resume(self):
        """Weights, optimisers and counts of the checkpoint. -> the log's lines up to there"""
        state = load(self.checkpoint, self.device)
        if self.init and self.init != state.get("init"):
            fail(f"{self.c.init} is another checkpoint than the run in {self.out} started from")
        try:
            self.model.load_state_dict(state["model"]["weights"])
            for opt, kept in zip(self.opts, state["optimisers"], strict=True):
                opt.load_state_dict(kept)
            if self.extra is not None:
                self.extra.load_state_dict(state["extra"])
            self.seconds = float(state["seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            fail(f"{self.checkpoint} does not fit this run: {str(e).splitlines()[-1].strip()}")
        self.start = self.done = state["step"]
        lines = [json.dumps(row) for row in read_log(self.out)[:self.start]]
        if len(lines) < self.start:
            fail(f"{self.log_path} ends after {len(lines)} steps, {self.checkpoint} after "
                 f"{self.start}: start a new run with --init={self.checkpoint}")
        return lines

    def __exit__(self, kind, error, trace):
        self.precision.__exit__(None, None, None)
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.log.close()
        self.bar.close()
        if isinstance(error, RuntimeError) and machine.lost_a_process(error):
            print("error: another process of this run has ended; the last checkpoint stands: "
                  "go on with --resume", file=sys.stderr)
            raise SystemExit(1) from None
        if error is None and WORLD > 1:
            dist.barrier()                          # the checkpoint is written

    def __iter__(self):
        for i in range(self.start, self.c.steps):
            self.began = time.perf_counter()
            for group in self.groups():
                group["lr"] = group["base"] * self.rate(self.c, i)
            yield i
            self.agree_on_signals()
            last = self.done == self.c.steps or self.finished or self.caught
            if last or self.done % self.c.save_every == 0:
                self.write_checkpoint()
            if self.caught:
                self.go_away()
            if self.look and self.look[0] == self.done and RANK == 0:
                self.look[1]()
            if self.finished:
                return

    def update(self, numbers):
        """The optimisers' step on the gradients that are there, and its line of the log."""
        if not all(math.isfinite(v) for v in numbers.values()):
            self.refuse(numbers)
        self.move()
        self.seconds += time.perf_counter() - self.began
        line = {"step": self.done, **numbers, "seconds": round(self.seconds, 3)}
        self.log.write(json.dumps(line) + "\n")
        shown = {k: f"{v:.3f}" for k, v in numbers.items() if k != "tokens"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self.done += 1

    def move(self):
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)

    def finish(self):
        """Ends the loop after this step, as if c.steps had been taken."""
        self.finished = True

    # --------------------------------------------------------------------------------- details

    def groups(self):
        return [group for opt in self.opts for group in opt.param_groups]

    def catch(self, number, _):
        self.caught.append(number)
        signal.signal(number, signal.SIG_DFL)       # a second one ends at once

    def write_checkpoint(self):
        if not all(p.isfinite().all() for p in self.model.parameters()):
            self.refuse("a weight")
        if RANK == 0:
            self.log.flush()
            save(self.checkpoint, model=self.model.state(), step=self.done, init=self.init,
                 optimisers=[opt.state_dict() for opt in self.opts],
                 seconds=self.seconds, config=asdict(self.c),
                 extra=None if self.extra is None else self.extra.state_dict())

    def agree_on_signals(self):
        """All processes of a torchrun stop after the same step."""
        if WORLD > 1:
            number = torch.tensor(max(self.caught, default=0), device=self.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.caught = [int(number)] * bool(number)

    def go_away(self):
        if RANK == 0:
            print(f"\nstopped; go on with: python {self.c.script} --out={self.c.out} --resume",
                  file=sys.stderr)
        raise SystemExit(128 + self.caught[0])

    def refuse(self, what):
        line = f"error: step {self.done}: {what} is not finite; try a smaller --lr"
        if self.checkpoint.exists():
            line += f", with --resume: the last checkpoint, {self.checkpoint}, is good"
        print(line, file=sys.stderr)
        raise SystemExit(1)
