"""A dataclass becomes a command line.

    steps: int = flag(500, "optimiser steps", 1)
    method: Literal["sft", "grpo"] = flag("sft", "how to learn")
    names: tuple = flag((), "experiments", words=True)

makes `--steps=N` of at least 1, `--method` one of two, and `names` the words that belong to no
flag. A `bool` takes no value; a `tuple` without `words` may be given several times.
"""
import argparse
import inspect
import math
import os
import re
import sys
import typing
from dataclasses import field, fields


def fail(message):
    """Prints one line on stderr and ends with exit code 2."""
    line = " ".join(str(message).split())
    print("error: " + line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    raise SystemExit(2)

def flag(default, text: str, low: float = 0, high: float = 1e9, words: bool = False):
    """Describes a field of a command line: its help, the range of a number."""
    return field(default=default, metadata={"text": text, "range": (low, high), "words": words})


def chosen(c) -> dict:
    """What of a command line's dataclass is not its default: somebody chose it, in a notebook."""
    return {one.name: getattr(c, one.name) for one in fields(c)
            if getattr(c, one.name) != one.default}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the flags)")


def value_of(kind, text: str):
    """Reads the text of a flag's value. ValueError says what was expected.

    Plain ASCII numbers only: int() and float() also take other scripts' digits, `_` and `nan`."""
    if kind is int:
        if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
            raise ValueError("a whole number is expected")
        return int(text)
    if kind is float:
        if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.ASCII | re.I):
            raise ValueError("a number is expected")
        return float(text)
    return os.path.expanduser(text) if text.startswith("~") else text

def fault(one, value):
    """Says what is wrong with a field's value, or gives None."""
    choices, text = typing.get_args(one.type), one.metadata["text"]
    if choices:
        return None if value in choices else f"one of {', '.join(choices)} is expected ({text})"
    if type(value) is not one.type and not (one.type is float and type(value) is int):
        return f"it should be of type {one.type.__name__}"
    if one.type in (int, float):
        low, high = one.metadata["range"]
        if not math.isfinite(value) or not low <= value <= high:
            return f"{low:g} to {high:g} is allowed"
    if one.type is str and len(value) > 1000:
        return "it is too long"
    return None

def from_file(cls, config, path):
    """Builds a cls from the config that a file holds. Exits 2 with a line where it does not fit."""
    if not isinstance(config, dict) or set(config) != {f.name for f in fields(cls)}:
        fail(f"{path} is not a run of {cls.script} in this version")
    for one in fields(cls):
        wrong = fault(one, config[one.name])
        if wrong:
            fail(f"{path} holds {one.name}={config[one.name]!r}, but {wrong}")
    return cls(**config)

def flags(cls, argv: list = None, epilog: str = ""):
    """Reads a command line -> (an instance of the dataclass cls, {name: value} of what was given).
    Exits 2 with a line for anything that cannot be meant."""
    argv = sys.argv[1:] if argv is None else list(argv)
    known = {one.name: one for one in fields(cls)}
    parser = Parser(
        usage="python %(prog)s --flag=value ...", description=inspect.cleandoc(cls.__doc__ or ""),
        epilog=epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, one in known.items():
        text = f"{one.metadata['text']} (default: {one.default!r})".replace("%", "%%")
        if one.metadata["words"]:
            parser.add_argument(name, nargs="*", help=text)
        elif one.type is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            choices = "|".join(typing.get_args(one.type))
            parser.add_argument(f"--{name}", action="append", help=text,
                                metavar=choices or one.type.__name__)
    for word in argv:
        name = word[2:].partition("=")[0]
        if word.startswith("--") and "=" in word and name in known and known[name].type is bool:
            fail(f"{word}: --{name} takes no value; give it, or leave it out")
        if word.endswith("=--"):                    # argparse takes it for the end of the flags
            fail(f"{word}: -- is no value")

    given = {}
    for name, texts in vars(parser.parse_intermixed_args(argv)).items():
        one = known[name]
        if one.type is bool:
            given[name] = True
        elif one.type is tuple:
            given[name] = tuple(texts)
        else:
            if len(texts) > 1:
                fail(f"--{name} is given twice")
            try:
                given[name] = value_of(one.type, texts[0])
                wrong = fault(one, given[name])
            except ValueError as e:
                wrong = e
            if wrong or not texts[0]:
                fail(f"--{name}={texts[0]}: {wrong or 'it is empty'}")
    return cls(**given), given
