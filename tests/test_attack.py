"""Nothing lost, nothing silent: runs that are killed, disks that are full, files that are damaged,
command lines that mean nothing. Every run is a fork of this process: torch is imported once."""
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback

import pytest
import torch
from conftest import KINDS, contents, product, rated, same

import experiments
import meta
import train
from data import arithmetic
from lab import run

MAINS = {"train": train.main, "meta": meta.main, "analyze": experiments.main}


def start(script, args, before=None):
    """Forks a child that calls `before`, then a script's command line -> (pid, its stderr)."""
    err = tempfile.TemporaryFile()
    pid = os.fork()
    if pid:
        return pid, err
    signal.alarm(60)
    sys.stdout = open(os.devnull, "w", encoding="ascii")        # as under LC_ALL=C
    sys.stderr = open(err.fileno(), "w", encoding="ascii", buffering=1)
    sys.argv, code = [f"{script}.py", *map(str, args)], 99
    try:
        if before:
            before()
        run.command(MAINS[script])
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

def ended(pid, err):
    """Waits for a child -> (exit code or minus the signal, what it wrote to stderr)."""
    _, status = os.waitpid(pid, 0)
    err.seek(0)
    return os.waitstatus_to_exitcode(status), err.read().decode(errors="replace")

def refused(word, script, *args, before=None):
    """Asserts that a command line ends with exit code 2 and one line that has the word."""
    code, err = ended(*start(script, args, before))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err, err


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_moments_and_resumed_is_the_straight_one(straight, tmp_path, kind,
                                                                        monkeypatch):
    """kill -9, again and again; what is left is always whole. Bit for bit."""
    monkeypatch.setattr(arithmetic, "reward", rated)
    (args, expected, seconds), script = straight[kind], "meta" if kind == "meta" else "train"
    rng, codes = random.Random(kind), []
    for pause in (*(rng.uniform(0.1, 0.6) * seconds for _ in range(4)), 60):
        words = ["--resume"] if (tmp_path / "ckpt.pt").exists() else [*args, "--overwrite"]
        pid, err = start(script, [f"--out={tmp_path}", *words])
        if pause < 60:
            time.sleep(pause)
            os.kill(pid, signal.SIGKILL)
        code, message = ended(pid, err)
        assert code in (0, -signal.SIGKILL) and "error" not in message, message
        codes.append(code)
    assert -signal.SIGKILL in codes and codes[-1] == 0
    same(product(tmp_path), product(expected))

def full_at(owner, name, call):
    """A `before`: from the call-th call of owner.name on no file may be longer than 350 bytes."""
    real, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(name)
        if len(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (350, 350))
        return real(*args, **options)
    return lambda: setattr(owner, name, counted)

@pytest.mark.parametrize("where,step", [((run, "save", 3), 4), ((run.Run, "log", 6), 4),
                                        ((train, "provenance", 1), 24), ((run, "write", 1), 0)],
                         ids=["checkpoint", "log", "summary", "config"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_goes_on(straight, tmp_path, where, step):
    args, expected, _ = straight["sft"]
    refused("", "train", f"--out={tmp_path}", *args, before=full_at(*where))
    assert not (tmp_path / "summary.json").exists()
    if step:
        assert run.load(tmp_path / "ckpt.pt")["step"] == step
        assert ended(*start("train", [f"--out={tmp_path}", "--resume"]))[0] == 0
        same(product(tmp_path), product(expected))
    else:
        assert not (tmp_path / "ckpt.pt").exists()

@pytest.mark.parametrize("script", ("train", "meta"))
def test_a_run_whose_output_nobody_reads_is_finished(script, base, tmp_path):
    """`train.py | true`, `train.py > /dev/full`."""
    read, pipe = os.pipe()
    os.close(read)
    for target in (pipe, os.open("/dev/full", os.O_WRONLY)):
        args = KINDS["sft"] if script == "train" else [*KINDS["meta"], f"--init={base}/ckpt.pt"]
        code, err = ended(*start(script, [f"--out={tmp_path}", "--overwrite", *args],
                               lambda: setattr(sys, "stdout", os.fdopen(target, "w"))))
        assert (tmp_path / "summary.json").exists(), err
        (tmp_path / "summary.json").unlink()

@pytest.mark.skipif(sys.platform != "linux", reason="nothing tells a run of it elsewhere")
def test_the_runs_of_a_compare_that_is_killed_save_and_end(tmp_path):
    tiny = "--layers=1 --heads=2 --width=16 --save_every=100000 --steps"
    pid, err = start("analyze", ["compare", f"--out={tmp_path}", "--jobs=1", "--device=cpu",
                                 f"--arm={tiny}=99998", f"--arm={tiny}=99999"])
    until(lambda: list(tmp_path.glob("runs/*/0/metrics.jsonl")))
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    ended(pid, err)
    until(lambda: list(tmp_path.glob("runs/*/0/ckpt.pt")))

def until(what):
    """Waits at most a minute."""
    for _ in range(600):
        if not what():
            time.sleep(0.1)
    assert what()

def test_a_run_needs_no_stderr_and_says_so_when_memory_is_out(straight, tmp_path):
    """`2>&-`, as under pythonw; `ulimit -v`."""
    args, expected, _ = straight["sft"]
    close = start("train", [f"--out={tmp_path}", *args], lambda: setattr(sys, "stderr", None))
    assert ended(*close) == (0, "")
    same(product(tmp_path), product(expected))
    refused("out of memory", "train", f"--out={tmp_path / 'large'}", "--width=20000", "--heads=1",
            before=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)))

def test_a_run_whose_folder_another_takes_over_ends_at_its_next_checkpoint(tmp_path, exits):
    c = train.Train(out=str(tmp_path), steps=1)
    with run.Run(c, None, []) as first, run.Run(c, None, []):
        before = contents(tmp_path)
        exits(["another run"], first.save, 0)
    assert contents(tmp_path) == before

class Payload:
    """Makes a folder where it is unpickled."""
    def __reduce__(self):
        return os.mkdir, ("executed",)

def damaged(good, whole, other):
    """Checkpoints that are none: cut short, of another kind, without a part, of another run."""
    weights = {name: value.T for name, value in whole["model"]["weights"].items()}
    found = [good[:len(good) * i // 8] for i in range(8)]
    found += [b"hello", [1], Payload(), whole | {"format": "raml-arithmetic checkpoint 1"}]
    for part in ("model", "step", "config", "optimisers", "seconds"):
        found.append({name: value for name, value in whole.items() if name != part})
    return [*found, whole | {"model": whole["model"] | {"weights": weights}},
            whole | {"optimisers": whole["optimisers"][::-1]}, whole | {"step": 99},
            whole | {"config": whole["config"] | {"steps": "many"}}, whole | {"config": other},
            whole | {"model": {"shape": {"width": 10**9}}}]

def test_a_damaged_checkpoint_is_refused_and_nothing_is_touched_or_executed(base, tmp_path,
                                                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "run")
    path, other = tmp_path / "run" / "ckpt.pt", vars(meta.Meta(fast="1.up"))
    for content in damaged(path.read_bytes(), run.load(path), other):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = contents(tmp_path)
        refused("run/", "train", "--out=run", "--resume")
        refused("run/ckpt.pt", "meta", "--out=run", "--resume")
        assert contents(tmp_path) == before and os.listdir() == ["run"]

def test_a_log_with_a_gap_is_refused_and_one_torn_after_the_checkpoint_is_not(base, tmp_path):
    out = tmp_path / "l\xe4uft"
    shutil.copytree(base, out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    twice, torn = [*lines[:9], *lines[10:], lines[-1]], [*lines[:9], "{\n", *lines[10:]]
    for broken in (twice, torn, lines[:9]):
        (out / "metrics.jsonl").write_text("".join(broken))
        before = contents(out)
        refused("metrics.jsonl", "train", f"--out={out}", "--resume")
        assert contents(out) == before
    (out / "metrics.jsonl").write_text("".join([*lines, '{"step": 24, "lo']))
    assert ended(*start("train", [f"--out={out}", "--resume"]))[0] == 0
    same(product(out), product(base))

# A command line : a word of the answer.
LINES = {"train": """
    --stepz=3 : stepz | --steps=0 : steps | --steps=-4 : steps | --steps=many : steps | -x : -x |
    --steps=٣ : steps | --steps=1_0 : steps | --lr=nan : lr | --lr=1e400 : lr | --see=1 : see |
    --seed=1 --seed=2 : twice | --out=-- : value | --out : out | extra : extra | --ask= : empty |
    --resume=1 : value | --resume : resume | --resume --overwrite : choose | --group=4 : group |
    --method=ppo : sft | --method=grpo : init | --method=dpo --init=x --style=short : style |
    --method=grpo --init=x --update=99 : update | --method=grpo --init=x --group=7 : group |
    --pool=9 --domains=expr --operands=2 --support=9 : trajectories | --support=4 : pool |
    --style=states,,short : style | --domains=chain : chain | --domains=, : domains |
    --operands=11 : operands | --operands=3,,4 : operands | --operands=, : operands |
    --ops=/ : ops | --width=16 : multiple | --direct=1 : direct | --direct=9 : direct |
    --init=nowhere : nowhere | --init=foreign : foreign | --out=/dev/null/run : /dev/null |
    --out=foreign/run : foreign |
    --ask=3+4 : checkpoint | --ask=3+x : 'x' | --ask=12+3 : digits | --ask=3+4 --steps=3 : steps |
    --ask=１+2 : １ | --ask=1/0 : '/' | --device=mps : Mac |
    --out=BASE : overwrite | --out=BASE --resume --lr=0.5 : 0.5 | --out=BASE --resume --steps=9 : 9
    | --out=BASE --overwrite --init=BASE/ckpt.pt : overwritten""", "meta": """
    --operands=3,,4 : operands | --operands=2 : operands | --fast=9.up : 9.up | --K=0 : K |
    --algo=sgd : algo | --queries=1 : queries | --tau=0 : tau |
    --resume : resume | --init=nowhere : nowhere | --init=foreign : foreign""", "analyze": """
    nope : nope | curve curve : twice | compare : arms | compare --arm=--steps=3 : arms |
    curve --arm=a --arm=b : arms | --cells=expr:9 : cells | --cells=expr : cells | --tag=a/b : tag |
    curve --questions=0 : questions | curve --redraw : figures |
    dots --questions=20 --sft=BASE,BASE/. : twice | --tag=../../x : tag |
    curve --sft=mistyped : mistyped | explicit --sft=a,b --meta=c,d,e : pairs |
    explicit --sft=BASE --meta=BASE : meta.py"""}

@pytest.mark.parametrize("script", LINES)
def test_a_bad_command_line_is_one_line_and_changes_nothing(script, base, tmp_path, monkeypatch,
                                                            exits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").write_bytes(b"PK not really")
    monkeypatch.setattr(run.Run, "__enter__", lambda self: pytest.fail("training began"))
    for case in LINES[script].replace("BASE", str(base)).split("|"):
        line, word = (part.strip() for part in case.split(" : "))
        init = [f"--init={base / 'ckpt.pt'}"] if script == "meta" and "init" not in line else []
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *line.split(), *init])
        before = contents(tmp_path), contents(base)
        exits([word], run.command, MAINS[script])
        assert (contents(tmp_path), contents(base)) == before and os.listdir() == ["foreign"], line
