"""A dataclass becomes a command line; what a flag may be stands in its field's own comment.

    steps: int = 1600               # [1, 1e9] optimiser steps
    method: str = "sft"             # {sft, grpo, dpo} how to learn
    names: tuple = ()               # ... experiments

makes `--steps=N` within that interval (a round bracket leaves its end out), `--method` one of
three, and `names` the words that belong to no flag. The rest of the comment is the help.
"""
import argparse
import functools
import inspect
import math
import os
import re
import sys
from dataclasses import fields, is_dataclass


def fail(message):
    """One line on stderr, exit code 2."""
    line = " ".join(str(message).split())
    print("error: " + line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def integer(s):
    if not re.fullmatch(r"-?\d{1,18}", s, re.ASCII):    # int() takes other scripts' digits, and _
        raise ValueError
    return int(s)

def real(s):
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", s, re.ASCII | re.I):
        raise ValueError
    return float(s)

@functools.cache                                    # reading the source takes a while
def notes(cls):
    """{field: (what it may be, its help)} from the comments behind a dataclass's fields.

    What it may be: (low, high, low excluded) for a number, a list of choices, '...' or None."""
    comments = {}
    source = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
    for name, comment in re.findall(r"^    (\w+): .*?# (.*)$", source, re.M):
        interval = re.match(r"([\[(])([\d.e]+), ([\d.e]+)\] ", comment)
        choices = re.match(r"\{([\w, ]+)\} ", comment)
        if interval:
            bracket, low, high = interval.groups()
            may, comment = (float(low), float(high), bracket == "("), comment[interval.end():]
            comment = f"{comment}, {interval[0].strip()}"
        elif choices:
            may, comment = choices[1].split(", "), comment[choices.end():]
        elif comment.startswith("... "):
            may, comment = "...", comment[4:]
        else:
            may = None
        comments[name] = may, comment
    return comments

def add(parser, field, may, note):
    """One field of the dataclass as an argument of the parser."""
    text = f"{note} (default: {field.default!r})".replace("%", "%%")
    if may == "...":
        parser.add_argument(field.name, nargs="*", help=note.replace("%", "%%"))
    elif field.type is bool:
        parser.add_argument(f"--{field.name}", action="store_true", help=text)
    elif field.type is tuple:
        parser.add_argument(f"--{field.name}", action="append", metavar="FLAGS", help=text)
    else:
        kind = {int: integer, float: real}.get(field.type, str)
        choices = may if isinstance(may, list) else None
        parser.add_argument(f"--{field.name}", type=kind, choices=choices, help=text,
                            metavar="|".join(choices) if choices else field.type.__name__)

def fault(v, may):
    """What is wrong with a value that its field's comment does not allow, or None."""
    if isinstance(v, str) and not 0 < len(v) < 1000:
        return "is too long" if v else "is empty"
    if isinstance(may, tuple):
        low, high, excluded = may
        if not math.isfinite(v) or not low <= v <= high or excluded and v == low:
            bracket = "(" if excluded else "["
            return f"is out of range: {bracket}{low:g}, {high:g}]"
    if isinstance(may, list) and v not in may:
        return f"is none of {', '.join(may)}"
    return None

def from_file(cls, config, path):
    """A config that a file holds -> an instance of cls, checked as a command line is."""
    comments = notes(cls)
    if not isinstance(config, dict) or set(config) != {f.name for f in fields(cls)}:
        fail(f"{path} is not a run of {cls.script} in this version")
    for field in fields(cls):
        v = config[field.name]
        if type(v) is not field.type and not (field.type is float and type(v) is int):
            wrong = f"is no {field.type.__name__}"
        else:
            wrong = v != field.default and fault(v, comments[field.name][0])
        if wrong:
            fail(f"{path} holds a config whose {field.name} {wrong}")
    return cls(**config)

def flags(cls, argv=None, epilog=""):
    """argv -> (an instance of the dataclass cls, {name: value} of what argv gave). Exits 2 with a
    line for anything else."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for a in argv:
        if a.endswith("=--"):                       # argparse takes it for the end of the flags
            fail(f"{a}: -- is no value")
    parser = Parser(
        usage="python %(prog)s --flag=value ...", description=inspect.cleandoc(cls.__doc__ or ""),
        epilog=epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = notes(cls)
    for field in fields(cls):
        add(parser, field, *comments[field.name])
    given = vars(parser.parse_intermixed_args(argv))

    names = [a.split("=")[0] for a in argv if a.startswith("--")]
    for field in fields(cls):
        if field.type is not tuple and names.count(f"--{field.name}") > 1:
            fail(f"--{field.name} is given twice")
    for name, v in given.items():
        if isinstance(v, list):
            given[name] = tuple(v)
            continue
        wrong = fault(v, comments[name][0])
        if wrong:
            fail(f"--{name} {wrong}" if isinstance(v, str) else f"--{name}={v} {wrong}")
        if isinstance(v, str) and v.startswith("~"):
            given[name] = os.path.expanduser(v)
    return cls(**given), given
