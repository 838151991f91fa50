"""Command lines: a dataclass whose fields are flags, the comment beside a field its help.

Plain Python, so that a script can read its command line, and refuse it, before the seconds that torch takes to import.
"""
import argparse
import inspect
import math
import re
import sys
from dataclasses import fields
from pathlib import Path

from data import arithmetic

POSITIVE = {"steps", "batch", "chunks", "layers", "heads", "width", "questions", "save_every", "lr", "lr_adam", "K", "support", "tau", "clip", "seeds", "group", "epochs", "beta", "max_new", "grid"}
SHARES = {"decay", "direct", "cut", "cut_from", "cut_full", "first_order", "until"}
LARGEST = {"layers": 200, "heads": 200, "width": 20_000, "batch": 1e6, "chunks": 1e4, "group": 1e4, "max_new": 1e4, "threads": 1000, "jobs": 1000, "K": 100, "support": 100, "grid": 1001, "pool": 1e6, "epochs": 100,
           "examples": 20, "seeds": 1000, "questions": 1e5, "alpha": 1e6}
CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"), "compile": ("auto", "yes", "no"),
           "preset": ("auto", "tiny", "gpu"), "method": ("sft", "grpo", "dpo"), "recipe": ("ours", "adamw", "nanogpt"), "adv": ("grpo", "dr_grpo"),
           "algo": ("maml", "fomaml", "reptile", "anil", "none"), "inner": ("whole", "step", "token"), "context_grad": ("full", "detached"),
           "domain": tuple(arithmetic.TRAINED)}


def fail(message):
    """One line on stderr, exit code 2."""
    line = " ".join(str(message).split())
    print("error: " + line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    raise SystemExit(2)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the flags)")

def integer(s):
    if not re.fullmatch(r"-?\d{1,18}", s, re.ASCII):                        # int() would take other scripts' digits, and underscores
        raise ValueError
    return int(s)

def real(s):
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", s, re.ASCII | re.I):
        raise ValueError
    return float(s)

def flags(cls, argv=None):
    """argv -> (an instance of the dataclass cls, {name: value} of what argv gave). Exits 2 with a line for anything else."""
    argv = sys.argv[1:] if argv is None else list(argv)
    notes = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M))
    for a in argv:
        if a.endswith("=--"):                                               # argparse would take it for the end of the flags
            fail(f"{a}: -- is no value")
    parser = Parser(description=cls.__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(cls):
        kind = dict(action="store_true") if f.type is bool else dict(action="append", metavar="FLAGS") if f.type is tuple else \
            dict(type={int: integer, float: real}.get(f.type, str), choices=CHOICES.get(f.name), metavar=f.type.__name__)
        parser.add_argument(f"--{f.name}", help=f"{notes[f.name]} (default: {f.default!r})".replace("%", "%%"), **kind)
    given, names = vars(parser.parse_args(argv)), [a.split("=")[0] for a in argv if a.startswith("--")]
    for f in fields(cls):
        if names.count(f"--{f.name}") > 1 and f.type is not tuple:
            fail(f"--{f.name} is given twice")
    for name, v in given.items():
        if isinstance(v, (int, float)) and not isinstance(v, bool):
            if not math.isfinite(v) or not 0 <= v <= LARGEST.get(name, 1e9) or name in POSITIVE and not v or name in SHARES and v > 1:
                fail(f"--{name}={v} is out of range" + " (a share: 0 to 1)" * (name in SHARES))
        if isinstance(v, str) and name != "ask" and not 0 < len(v) < 1000:
            fail(f"--{name} is {'too long' if v else 'empty'}")
    c = cls(**given)
    if getattr(c, "resume", False) and c.overwrite:
        fail("--resume goes on with a run, --overwrite replaces it: choose one")
    if getattr(c, "resume", False) and not (Path(c.out) / "ckpt.pt").exists():
        fail(f"there is nothing to resume in {c.out}")
    return c, given
