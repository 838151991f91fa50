"""Attacks by files: checkpoints, logs and figures that are damaged, foreign or made to harm."""
import contextlib
import io
import os
import random
import shutil
import time
import zipfile
from pathlib import Path

import torch
from forks import GOOD, ROOT, SFT, Ended, module, numbers, refused, run, same, state_of


def loaded(path, load=None, words=""):
    """-> the checkpoint at a path, or None if it was refused, in a line that has the words."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            return (load or module("lab.run").load)(path)
        except SystemExit as e:
            code = e.code
    refused(Ended(code, err.getvalue()), words)

def cut_short(i):
    good, path = (GOOD / "ckpt.pt").read_bytes(), Path("short.pt")
    path.write_bytes(good[:len(good) * i // 16])
    assert loaded(path) is None

def flip(i):
    rng, data, path = random.Random(i), bytearray((GOOD / "ckpt.pt").read_bytes()), Path("flip.pt")
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    state, truth = loaded(path), state_of(GOOD)
    if state is None:
        return "refused"
    assert state["config"] == truth["config"], at
    same(numbers(state), numbers(truth))
    return "in bytes that mean nothing"

class Payload:
    """Executes something where it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("executed",)

def raw_pickle(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", b"cos\nsystem\n(S'touch executed'\ntR.")

# An object for torch to save, what differs from a good checkpoint, bytes, or what makes the path.
FILES = [Payload(), [1], {"format": "raml-arithmetic checkpoint 0"}, {"encoding": "gpt2"},
         b"", b"hello", raw_pickle, os.mkdir, os.path.exists]

def no_checkpoint(i):
    made, path = FILES[i], Path(f"no-checkpoint-{i}")
    if callable(made):
        made(path)
    elif isinstance(made, bytes):
        path.write_bytes(made)
    else:
        torch.save(state_of(GOOD) | made if isinstance(made, dict) else made, path)
    assert loaded(path) is None and not Path("executed").exists(), made

def untouched(i):
    """Half a checkpoint, a run that is there already, a file in the folder's place."""
    out = [Path("half"), GOOD, Path("file")][i]
    if i == 0:
        shutil.copytree(GOOD, out)
        os.truncate(out / "ckpt.pt", (out / "ckpt.pt").stat().st_size // 2)
    if i == 2:
        out.write_text("mine")

    def contents():
        return {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()}
    before = contents()
    refused(run("train", [f"--out={out}", *(SFT if i else ["--resume"])]))
    assert contents() == before and before

def log_damaged(i):
    """A log shorter than its checkpoint; a line that is no JSON; one that is missing."""
    out = Path(f"log-{i}")
    shutil.copytree(GOOD, out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [lines[:9], [*lines[:9], "{\n", *lines[10:]], lines[:9] + lines[10:]][i]
    (out / "metrics.jsonl").write_text("".join(lines))
    before = {path: path.read_bytes() for path in out.iterdir()}
    refused(run("train", [f"--out={out}", "--resume"]), "metrics.jsonl")
    assert before == {path: path.read_bytes() for path in out.iterdir()}

# What of a good checkpoint's model is changed.
SHAPES = [{"layers": 10**6}, {"layers": 10**9}, {"width": 10**6}, {"heads": 0}, {"heads": -4},
          {"ratio": 10**6}, {"vocab": 10**9}, {"layers": "4"}, {"layers": None}, {"more": 1}]

def crafted_shape(i):
    """A shape that would take hours, or gigabytes, to build."""
    state, path = state_of(GOOD), Path(f"shape-{i}")
    state["model"]["shape"] |= SHAPES[i]
    torch.save(state, path)
    began = time.perf_counter()
    assert loaded(path, module("train").load_model) is None
    assert time.perf_counter() - began < 3

def missing_part(i):
    """A checkpoint without one of its parts, or one weight; the line says which."""
    state, path = state_of(GOOD), Path(f"part-{i}")
    part = ["model", "step", "config", "embed.weight", "blocks.1.down.weight"][i]
    del (state["model"]["weights"] if "weight" in part else state)[part]
    torch.save(state, path)
    assert loaded(path, module("train").load_model, part) is None

def compressed(_):
    """Records that unpack to more than they take on disk."""
    with zipfile.ZipFile(GOOD / "ckpt.pt") as old:
        with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    assert loaded(Path("bomb.pt"), words="compressed") is None

# No field may be any of these.
STRANGE = [None, [], {}, "x" * 2000, float("nan"), -1, b"x"]

def crafted_config(i):
    """One field of a stored config of another type, or out of its range; then --resume."""
    state, out = state_of(GOOD), Path("crafted")
    names = sorted(set(state["config"]) - {"out", "resume", "overwrite"})
    state["config"][names[i % len(names)]] = STRANGE[i % len(STRANGE)]
    out.mkdir(exist_ok=True)
    torch.save(state, out / "ckpt.pt")
    shutil.copy(GOOD / "metrics.jsonl", out)
    refused(run("train", ["--out=crafted", "--resume"]), names[i % len(names)])

def figure_damaged(_):
    """The report leaves out a figure whose JSON is damaged, and says so."""
    figures = Path("pictures/figures")
    figures.mkdir(parents=True)
    shutil.copy(ROOT / "assets" / "length.json", figures)
    (figures / "broken.json").write_text("{")
    ended = run("analyze", ["report", "--out=pictures"])
    assert ended.code == 0 and "broken.json is left out" in ended.err, ended
    refused(run("analyze", ["broken", "--redraw", "--out=pictures"]), "broken.json")
