"""Nothing lost, nothing executed, nothing silent: what is tried, how often, what was lost. Prints a table; exit code 1 if anything was.

    python tests/robust.py            # the short form, which the tests run
    python tests/robust.py --long     # the counts in the README

Runs are tiny but real. Each is a fork of this process, so that torch is imported once and a kill costs no more than the run.
"""
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch                                                                # noqa: E402

import meta                                                                 # noqa: E402
import train                                                                # noqa: E402

LONG = "--long" in sys.argv
RNG = random.Random(0)
SHAPE = ["--layers=2", "--heads=2", "--width=16"]
SMALL = ["--questions=2", "--threads=1", "--device=cpu"]
lost, rows, checks = [], [], [0]


def start(script, args, before=lambda: None):
    """Forks a child that runs a script's command line. -> its pid; its stderr goes to a file beside --out."""
    out = next(a for a in args if a.startswith("--out="))[6:]
    pid = os.fork()
    if pid:
        return pid
    with open(out + ".err", "w") as err:
        os.dup2(err.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [script.__file__, *args]
        torch.set_num_threads(1)
        before()
        try:
            train.command(script.main)
            code = 0
        except SystemExit as e:
            code = e.code
        except BaseException as e:
            print("Traceback", repr(e), file=sys.stderr)
            code = 99
        sys.stderr.flush()
        os._exit(code)

def finish(pid, patience=60):
    """-> exit code; a run that takes longer than a minute hangs, and is killed."""
    for _ in range(100 * patience):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"

def run(script, args, before=lambda: None):
    return finish(start(script, args, before))

def product(folder):
    """What a run leaves that may not depend on how often it was stopped: weights, optimisers, log without times."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    log = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    flat = {k: v for k, v in state["model"]["weights"].items()}
    for i, o in enumerate(state["optimisers"]):
        flat |= {f"{i}/{j}/{k}": v for j, s in o["state"].items() for k, v in s.items()}
    return flat, log

def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[0][k])) for k, v in a[0].items())

def expect(what, ok, *about):
    checks[0] += 1
    if not ok:
        lost.append(f"{what}: {about}")
    return ok

def row(what, how, tried=None):
    """Closes a part of the table: how often (default: the checks since the last row), and `how` only if none of them failed."""
    failed = len(lost) - sum(f for *_, f in rows)
    rows.append((what, checks[0] if tried is None else tried, f"LOST: {failed}" if failed else how, failed))
    checks[0] = 0

def one_line(path):
    err = Path(path).read_text()
    return err.startswith("error: ") and err.count("\n") == 1


def kills(work):
    """SIGKILL at random moments, half of them in runs that do little but write checkpoints; then --resume, against a run never stopped."""
    base = work / "base"
    run(train, [f"--out={base}", "--steps=2", "--batch=8", *SHAPE, *SMALL])
    modes = {"sft": (train, ["--steps=40", "--batch=8", *SHAPE]), "grpo": (train, ["--method=grpo", f"--init={base / 'ckpt.pt'}", "--steps=12", "--batch=8", "--group=4", "--max_new=8"]),
             "meta": (meta, [f"--init={base / 'ckpt.pt'}", "--steps=12", "--batch=4"])}
    tried = 0
    for mode, (script, args) in modes.items():
        for every in (1, 4):
            args_ = [*args, *SMALL, f"--save_every={every}"]
            began = time.perf_counter()
            expect("a straight run", run(script, [f"--out={work / f'{mode}-{every}'}", *args_]) == 0, mode)
            whole, straight = time.perf_counter() - began, product(work / f"{mode}-{every}")
            for i in range(5 if LONG else 1):
                out = work / f"{mode}-{every}-{i}"
                pid = start(script, [f"--out={out}", *args_])
                time.sleep(RNG.uniform(0.02, whole))
                os.kill(pid, signal.SIGKILL)
                finish(pid)
                tried += 1
                again = ["--resume"] if (out / "ckpt.pt").exists() else [*args_, "--overwrite"]
                expect("resuming", run(script, [f"--out={out}", *again]) == 0, mode, Path(f"{out}.err").read_text()[-300:])
                expect("the bits and lines of a run never stopped", same(product(out), straight), mode, every, i)
    row("kill -9 at a random moment (sft, grpo, meta), then --resume", "bit-identical weights, optimisers and log", tried)
    return work / "sft-4", modes["sft"][1]

def stops(work, args):
    for s, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = work / f"signal-{code}"
        pid = start(train, [f"--out={out}", *(a for a in args if "steps" not in a), *SMALL, "--steps=2000"])
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(pid, s)
        expect("a signal", finish(pid) == code and "--resume" in Path(f"{out}.err").read_text() and (out / "ckpt.pt").exists(), code)

def refused(path):
    """Is a file refused with one line and exit code 2? -> (refused, its content if it was taken)."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            return False, train.load(path)
        except SystemExit as e:
            return e.code == 2 and err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1, None

def files(work, run_):
    good = (run_ / "ckpt.pt").read_bytes()
    path, truth = work / "x.pt", product(run_)[0]
    for i in range(16):
        path.write_bytes(good[:len(good) * i // 16])
        expect("a checkpoint cut short is refused", refused(path)[0], i)
    flips = caught = 0
    for _ in range(200 if LONG else 60):
        at = RNG.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << RNG.randrange(8)]) + good[at + 1:])
        no, state = refused(path)
        flips, caught = flips + 1, caught + no
        expect("a flipped bit is refused, or harmless", no or all(torch.equal(v, truth[k]) for k, v in state["model"]["weights"].items()) and state["config"] is not None, at)
    row("a checkpoint cut at every sixteenth, or with one bit flipped", f"{16 + caught} refused, {flips - caught} flips in bytes that mean nothing", 16 + flips)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(work / "executed"),)
    state = torch.load(run_ / "ckpt.pt", weights_only=True)
    for name, made in {"payload": Payload(), "another version": state | {"format": "raml-arithmetic checkpoint 0"}, "another encoding": state | {"encoding": "gpt2"}, "a list": [1]}.items():
        torch.save(made, path)
        expect(f"{name} is refused", refused(path)[0])
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", b"cos\nsystem\n(S'touch executed'\ntR.")
    expect("a raw pickle is refused", refused(path)[0])
    for made in (b"", b"hello"):
        path.write_bytes(made)
        expect("no checkpoint at all is refused", refused(path)[0])
    expect("a directory is refused", refused(work)[0])
    expect("a missing file is refused", refused(work / "nowhere")[0])
    expect("nothing was executed", not (work / "executed").exists() and not Path("executed").exists())
    broken = work / "broken"
    shutil.copytree(run_, broken)
    (broken / "ckpt.pt").write_bytes(good[:len(good) // 2])
    before = {p.name: p.read_bytes() for p in broken.iterdir()}
    expect("resuming from a broken file is refused", run(train, [f"--out={broken}", "--resume"]) == 2 and one_line(f"{broken}.err"))
    expect("and nothing is overwritten", before == {p.name: p.read_bytes() for p in broken.iterdir()})
    row("other files: payload, raw pickle, other version or encoding, empty, text, directory, missing, resume from a half (checks)", "refused, nothing executed or overwritten")

def disk(work, args):
    """The second checkpoint does not fit; neither does a line of the log; the folder cannot be made."""
    out, real = work / "full", train.save
    def small():
        calls = []
        def save(path, **state):
            calls.append(1)
            if len(calls) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
            real(path, **state)
        train.save = save
    args = [*args, *SMALL, "--save_every=4"]
    expect("a full disk is a line", run(train, [f"--out={out}", *args], small) == 2 and one_line(f"{out}.err") and "before still does" in Path(f"{out}.err").read_text(), Path(f"{out}.err").read_text())
    expect("the last good checkpoint stands", torch.load(out / "ckpt.pt", weights_only=True)["step"] == 4 and not list(out.glob("*.part")))
    expect("and can be gone on from", run(train, [f"--out={out}", "--resume"]) == 0 and same(product(out), product(work / "sft-4")))
    tight = work / "tight"
    expect("no room for the log is a line", run(train, [f"--out={tight}", *args], lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))) == 2 and one_line(f"{tight}.err"), Path(f"{tight}.err").read_text())
    (work / "file").write_text("")
    expect("a file in the way is a line", run(train, [f"--out={work / 'file'}", *args]) == 2 and one_line(str(work / "file") + ".err"))
    before = (out / "ckpt.pt").read_bytes()
    expect("a second run into one folder is refused", run(train, [f"--out={out}", *args]) == 2 and (out / "ckpt.pt").read_bytes() == before)
    wild = work / "wild"
    expect("a loss that explodes stops and names the step", run(train, [f"--out={wild}", *[a for a in args if "steps" not in a], "--steps=60", "--lr=1e9", "--lr_adam=1e9"]) == 1 and "step" in Path(f"{wild}.err").read_text())
    def hungry():
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
    huge = work / "huge"
    expect("out of memory is a line with two flags", run(train, [f"--out={huge}", "--steps=1", "--batch=100000", "--chunks=1", "--width=64", "--heads=2", "--layers=2", *SMALL], hungry) == 2
           and all(w in Path(f"{huge}.err").read_text() for w in ("--batch", "--chunks")), Path(f"{huge}.err").read_text()[-300:])
    row("full disk at a checkpoint or in the log, file in the way, second run into a folder, exploding loss, out of memory (checks)", "one line each, last good checkpoint stands")

def hostile(work):
    flags = {"train.py": "steps batch lr width seed out style domains operands method init group cut direct threads device".split(),
             "meta.py": "algo K alpha tau operands missing fast inner steps cut_from out seed context_grad".split(), "analyze.py": "questions cells grid seeds sft out device seed".split()}
    values = ["", "x", "-1", "-0.5", "nan", "inf", "1e400", "9" * 30, "9" * 5000, "٣", "１", "²", "1_000", "0x10", "1,5", "--", "🙂", "\udcff", "None", "[]", "%s", "1;2", " 3", "3 "]
    loose = {"train.py": {"out", "init"}, "meta.py": {"out", "fast"}, "analyze.py": {"out", "sft"}}      # any text is a path or a pattern
    lines = []
    for script, names in flags.items():
        lines += [(script, [f"--{n}={v}"]) for n in names if n not in loose[script] for v in values]
        lines += [(script, [f"--{n}={v}"]) for n in sorted(loose[script] - {"fast"}) for v in ("", "9" * 5000)]
        lines += [(script, a) for a in (["--nope"], ["--nope=1"], ["-x"], ["--out"], ["--seed=1", "--seed=2"], ["--seed"], ["--"] + ["x"], ["--SEED=1"], ["--see=1"], ["é"])]
    lines += [("train.py", a) for a in (["--resume", "--overwrite"], ["--method=grpo"], ["--kl=1"], ["--ask=3+4", "--steps=3"], ["--ask="], ["--ask=" + "(" * 9000], ["--direct=0.6", "--cut=0.6"], ["--width=15"], ["--support=4"],
                                        ["--method=dpo", "--init=x", "--style=long"], ["--method=grpo", "--init=x", "--update=99"], ["extra"])]
    lines += [("meta.py", a) for a in (["--cut_from=0.9", "--cut_full=0.1"], ["--missing=0,0,0"], ["--operands=3,,4"], ["--domain=sum", "--operands=9"])]
    lines += [("analyze.py", a) for a in (["nope"], ["curve", "curve"], ["compare"], ["compare", "--arm=--steps=3"], ["curve", "--arm=a", "--arm=b"], ["--grid=4"], ["--cells=expr:4,"])]
    RNG.shuffle(lines)
    lines, slowest = lines[:300 if LONG else 40], 0.0
    if not expect("enough hostile lines", len(lines) == (300 if LONG else 40), len(lines)):
        return
    for script, args in lines:
        began = time.perf_counter()
        try:
            r = subprocess.run([sys.executable, ROOT / script, *args], capture_output=True, text=True, errors="replace", cwd=work / "empty", timeout=10)
        except subprocess.TimeoutExpired:
            expect("a hostile command line is refused", False, script, [a[:60] for a in args])
            continue
        slowest = max(slowest, took := time.perf_counter() - began)
        expect("a hostile command line is one line and exit code 2", r.returncode == 2 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1, script, [a[:60] for a in args], r.stderr[-200:])
        expect("in under two seconds", took < 2, script, [a[:60] for a in args], took)
    expect("nothing was written", not list((work / "empty").iterdir()))
    row("hostile command lines for the three scripts", f"exit code 2 and one line, the slowest after {slowest:.2f} s", len(lines))

def main():
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "empty").mkdir()
        hostile(work)
        straight, args = kills(work)
        expect("the same seed, the same bits in a fresh process", run(train, [f"--out={work / 'twin'}", *args, *SMALL, "--save_every=4"]) == 0 and same(product(work / "twin"), product(straight)))
        stops(work, args)
        row("the same seed in a fresh process; SIGINT, SIGTERM (checks)", "the same bits; saved, exit codes 130, 143")
        files(work, straight)
        disk(work, args)
    for what, n, how, _ in rows:
        print(f"| {what} | {n} | {how} |")
    print("lost: nothing" if not lost else "LOST:\n" + "\n".join(map(str, lost)))
    return 1 if lost else 0

if __name__ == "__main__":
    raise SystemExit(main())
