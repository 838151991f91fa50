"""Attacks by command lines and environments."""
import functools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

from forks import LONG, ROOT, SFT, Ended, module, refused, run


VALUES = ["", "x", "-1", "-0.5", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "٣", "１", "²",
          "1_000", "0x10", "1,5", "--", "🙂", "\udcff", "None", "[]", "%s", "1;2", " 3", "3 ",
          "(" * 99, "(" * 9000]
# Of these any other text is a path, a pattern or a name.
LOOSE = {"out", "init", "fast", "sft", "meta", "tag"}

LINES = {
    "train": """
        --resume --overwrite | --resume | --method=grpo | --kl=1 | --beta=1 | --group=4 | extra |
        --ask=3+4 --steps=3 | --ask=3+4 | --direct=0.6 --cut=0.6 | --width=15 | --support=4 |
        --method=dpo --init=x --style=long | --method=dpo --init=x --kl=1 | --style=long,direct |
        --method=grpo --init=x --update=99 | --method=grpo --init=x --group=7 | --init=nowhere |
        --domains=sum --operands=9 | --ask=1/0 --resume | --ask=3+5 --resume --steps=5 |
        --pool=500 --domains=expr --operands=2 --support=9""",
    "meta": """
        --resume --overwrite | --resume | extra |
        --operands=3,,4 | --domain=sum --operands=9 | --init=nowhere""",
    "analyze": """
        nope | nope --redraw | curve curve | compare | compare --arm=--steps=3 | --grid=4 |
        curve --arm=a --arm=b | --cells=expr:4, | tokens --sft=mistyped | report |
        explicit --meta=mistyped | --redraw | curve --redraw"""}
ANY_SCRIPT = "--nope|--nope=1|-x|--out|--seed=1 --seed=2|--seed|-- x|--SEED=1|--see=1|é"

@functools.cache
def hostile_lines():
    """[(script, words)]: those above, then every flag with every value, in a random order."""
    lines, valued = [], []
    for script, some in LINES.items():
        for line in f"{some} | {ANY_SCRIPT}".split("|"):
            lines.append((script, line.split()))
        for field in fields(getattr(module(script), script.title())):
            values = ["", "9" * 5000] if field.name in LOOSE else VALUES
            valued += [(script, [f"--{field.name}={value}"]) for value in values]
    random.Random(0).shuffle(valued)
    return lines + valued

def hostile(i, call=run, limit=2):
    """call(script, words, what to do before) -> Ended. -> seconds that it took"""
    script, words = hostile_lines()[i]
    folder = tempfile.mkdtemp(dir=".")

    def before():
        os.chdir(folder)
        signal.alarm(10)                            # for a line that is taken for a good one
    began = time.perf_counter()
    ended = call(script, words, before)
    took = time.perf_counter() - began
    about = script, [word[:60] for word in words], took, ended, os.listdir(folder)
    assert ended.code == 2 and took < limit and not os.listdir(folder), about
    refused(ended)
    return took

def process(script, words, before):
    """`run` in a process that imports everything for itself."""
    command = [sys.executable, ROOT / f"{script}.py", *words]
    ended = subprocess.run(command, preexec_fn=before, capture_output=True)
    return Ended(ended.returncode, ended.stderr.decode(errors="replace"))

def hostile_process(i):
    """3 s are a limit for a computer that does nothing else; the tests may share theirs."""
    anywhere = random.Random(i).randrange(len(hostile_lines()))
    return hostile(anywhere, process, 3 if LONG else 10)


# ---------------------------------------------------------------------------------- environments

def in_process(words, **env):
    """A command in a process of its own, in this folder -> Ended"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True)
    return Ended(ended.returncode, ended.stderr.decode(errors="replace"))

def half_of_torchrun(i):
    """What torchrun sets, set by somebody else."""
    env = [{"WORLD_SIZE": "2"}, {"RANK": "1"}][i]
    refused(in_process([ROOT / "train.py", "--out=alone", *SFT], **env), "torchrun")
    assert not Path("alone").exists()

def while_importing(i):
    """Ctrl-C while a script imports torch, or a little later."""
    out = f"early-{i}"
    command = [sys.executable, ROOT / "train.py", f"--out={out}", "--steps=2", *SFT]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    time.sleep(0.5 + 0.1 * i)                       # by then Python itself has started
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1].decode()
    code = process.returncode
    assert (code, err) == (-signal.SIGINT, "") or code == 130 and "stopped" in err, (code, err)
    assert "Traceback" not in err, err
    return "at once" if code < 0 else "with a line"

def odd_environment(i):
    """Python without docstrings; letters that the terminal lacks; no compiler; a home of one's own;
    a reader that goes away."""
    small = ["--steps=2", *SFT]
    if i == 0:
        words = [ROOT / "analyze.py", "tokens", "--sft=base", "--out=optimised", "--questions=4"]
        ended = in_process(words, PYTHONOPTIMIZE="2")
    if i == 1:
        ended = in_process([ROOT / "train.py", "--out=папка", *small], LC_ALL="C",
                           PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        assert Path("папка/summary.json").exists()
    if i == 2:
        ended = in_process([ROOT / "train.py", "--out=eager", "--compile=yes", *small],
                           CXX="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(Path("cache").resolve()))
        assert "going on without" in ended.err, ended
    if i == 3:
        home = functools.partial(os.environ.update, HOME=str(Path.cwd()))
        ended = run("train", ["--out=~/x", *small], home)
        assert Path("x/summary.json").exists() and not Path("~").exists()
    if i == 4:
        command = f"{sys.executable} -m data.arithmetic | head -1"
        shell = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True)
        ended = Ended(shell.returncode, shell.stderr.decode())
    assert ended.code == 0 and "Traceback" not in ended.err, ended
