"""The bench: flags, runs and resuming, checkpoints, optimisers, the machine, held-out questions."""
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import time

import pytest
import torch

import analyze
import meta
import train
from data import arithmetic, text
from lab import flags, machine, optim, score
from lab.run import FORMAT, Run, command, load, read_log
from model import Config, Model

SMALL = ["--layers=2", "--heads=2", "--width=16", "--batch=8", "--questions=3", "--save_every=4",
         "--threads=1", "--device=cpu"]


def trained(*args):
    return train.train(*flags.flags(train.Train, args))

def always(value):
    """A function that returns this value, whatever it is asked."""
    def f(*args, **kw):
        return value
    return f

def numbers_of(folder):
    """A run's log without its times."""
    rows = read_log(folder)
    for row in rows:
        del row["seconds"]
    return rows

def same_weights(a, b):
    a, b = (load(folder / "ckpt.pt")["model"]["weights"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------- runs, resuming

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    trained(f"--out={out}", "--steps=120", *SMALL)
    return out


def test_a_look_on_the_way_is_taken_once_and_changes_nothing(tmp_path, straight, monkeypatch):
    seen, out = [], tmp_path / "looked"
    monkeypatch.setattr(Run, "look", (8, lambda: seen.append(load(out / "ckpt.pt")["step"])))
    trained(f"--out={out}", "--steps=120", *SMALL)
    assert seen == [8]
    assert same_weights(out, straight) and numbers_of(out) == numbers_of(straight)

def test_interrupted_and_resumed_equals_straight(tmp_path, straight, start):
    """Ctrl-C as a terminal sends it, to the process that makes batches as well: a checkpoint, a
    line, exit code 130; then the same bits and log as without it."""
    out = tmp_path / "broken"
    p = start("train.py", f"--out={out}", "--steps=120", *SMALL, start_new_session=True)
    while p.poll() is None and not (out / "ckpt.pt").exists():
        time.sleep(0.02)
    os.killpg(p.pid, signal.SIGINT)
    message = p.communicate()[1]
    assert p.returncode == 130 and "--resume" in message, message
    assert not (out / "summary.json").exists()
    assert load(out / "ckpt.pt")["step"] < 120
    trained(f"--out={out}", "--resume")
    assert same_weights(straight, out)
    assert numbers_of(straight) == numbers_of(out)
    assert [row["step"] for row in numbers_of(out)] == list(range(120))


@pytest.mark.parametrize("args,words", [
    (["--steps=120", *SMALL], ["--resume", "--overwrite"]),
    (["--resume", "--lr=0.5"], ["--lr=0.5"]), (["--resume", "--overwrite"], ["choose one"])])
def test_a_run_is_not_replaced_or_changed_unasked(straight, refused, args, words):
    before = {path: path.read_bytes() for path in straight.iterdir()}
    refused(train, [f"--out={straight}", *args], words)
    assert before == {path: path.read_bytes() for path in straight.iterdir()}


def test_a_run_leaves_what_a_program_can_compare(straight):
    names = ["ckpt.pt", "config.json", "metrics.jsonl", "summary.json"]
    assert sorted(path.name for path in straight.iterdir()) == names
    summary = json.loads((straight / "summary.json").read_text())
    for domain, counts in score.CELLS.items():
        assert list(summary["exact_match"][domain]) == list(map(str, counts))
    assert summary["steps"] == 120
    assert summary["tokens"] == sum(row["tokens"] for row in read_log(straight))
    config = json.loads((straight / "config.json").read_text())
    assert summary["config"] == config == load(straight / "ckpt.pt")["config"]
    assert config["width"] == 16


def test_asking_prints_the_checked_trajectory_and_both_answers(straight, capsys, monkeypatch):
    args = ["train.py", f"--out={straight}", "--ask=3+5*2", "--device=cpu", "--threads=1"]
    monkeypatch.setattr("sys.argv", args)
    train.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "question    3+(5*2)"
    assert lines[-2].startswith("answer ") and lines[-1].startswith("direct ")
    assert len(lines) > 3
    for line in lines[1:-2]:
        assert line.split()[-1] in ("ok", "wrong")


@pytest.mark.parametrize("question,word", [("3+x", "'x'"), ("", "empty"), ("3+", "number"),
                                           ("2-5", "negative")])
def test_a_question_that_cannot_be_asked_is_refused(straight, refused, question, word):
    refused(train, [f"--out={straight}", f"--ask={question}"], [word])


def quadratic(c, model):
    """A loop of few steps on a loss that only shrinks the head."""
    run = Run(c, model, [torch.optim.SGD([model.head.weight], 0.1)])
    with run:
        for _ in run:
            loss = model.head.weight.square().sum()
            loss.backward()
            yield run
            run.update({"loss": float(loss.detach())})

def small_run(tmp_path, **kw):
    torch.manual_seed(0)
    c = train.Train(out=str(tmp_path / "run"), **kw)
    return c, Model(Config(text.VOCAB, 1, 2, 16))

def test_a_run_that_finishes_early_ends_as_if_all_steps_had_been_taken(tmp_path):
    c, model = small_run(tmp_path, steps=60, save_every=50)
    for run in quadratic(c, model):
        if run.done == 19:
            run.finish()
    assert run.done == 20 == len(read_log(c.out))
    last = load(run.checkpoint)
    assert last["step"] == 20
    assert torch.equal(last["model"]["weights"]["head.weight"], model.head.weight)


def test_a_runs_rate_warms_up_stays_level_and_falls_to_zero(tmp_path):
    """Every step is taken once, at its rate, on its own gradient alone."""
    c, model = small_run(tmp_path, steps=40, warmup=10, decay=0.5)
    expected = model.head.weight.detach().clone()
    rates = [run.opts[0].param_groups[0]["lr"] for run in quadratic(c, model)]
    assert rates[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert rates[10:20] == pytest.approx([0.1] * 10)
    assert rates[20:] == pytest.approx([0.005 * (20 - i) for i in range(20)])
    for rate in rates:
        expected *= 1 - 2 * rate
    torch.testing.assert_close(model.head.weight.detach(), expected, rtol=1e-4, atol=0)


def test_a_new_run_removes_what_an_older_one_left(tmp_path):
    """The summary of another run must not stand beside this one's weights."""
    c, model = small_run(tmp_path, steps=3)
    out = tmp_path / "run"
    out.mkdir()
    for name in ("ckpt.pt", "summary.json", "metrics.jsonl"):
        (out / name).write_text("{}\n")
    for run in quadratic(c, model):
        assert not (out / "ckpt.pt").exists()
        assert not (out / "summary.json").exists()
    assert [row["step"] for row in read_log(out)] == [0, 1, 2]


def test_flags_say_what_questions_and_trajectories_there_are():
    c = train.Train(domains="expr,sum", operands="3,4", direct=0.5, cut=0.5, style="short")
    mix, rng, seen = train.mix_of(c), random.Random(0), set()
    for _ in range(400):
        example = mix.sample(rng)
        q = arithmetic.parse(example.question)
        seen.add((q.domain, q.operands, example.learn))
        assert not set(example.think) & set(".W")
    cells = itertools.product(("expr", "sum"), (3, 4), ("answer", "cut"))
    assert seen == set(cells)
    pool = train.mix_of(train.Train(pool=5, support=3, domains="sum", operands="5")).pool
    assert [len(thinks) for _, thinks in pool] == [3] * 5
    assert {q.operands for q, _ in pool} == {5}


def ignore(number, frame):
    """A handler of signals."""

@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_acted_on_between_two_steps(tmp_path, capsys, number, code):
    """The step is taken and saved; whoever handled the signal before does so again."""
    c, model = small_run(tmp_path, steps=60, save_every=50)
    before = signal.signal(number, ignore)
    try:
        with pytest.raises(SystemExit) as e:
            for run in quadratic(c, model):
                if run.done == 6:
                    os.kill(os.getpid(), number)
        assert signal.getsignal(number) is ignore
    finally:
        signal.signal(number, before)
    assert e.value.code == code
    assert "--resume" in capsys.readouterr().err
    assert load(run.checkpoint)["step"] == 7 == len(read_log(c.out))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as e:
        trained(f"--out={out}", "--steps=60", "--lr=1e9", "--lr_adam=1e9", *SMALL)
    err = capsys.readouterr().err
    assert e.value.code == 1
    for word in ("not finite", "step", str(out / "ckpt.pt")):
        assert word in err
    last = load(out / "ckpt.pt")
    assert last["step"] == len(read_log(out)) // 4 * 4 < 60
    for weight in last["model"]["weights"].values():
        assert weight.isfinite().all()


def raising(error):
    def main():
        raise error
    return main

@pytest.mark.parametrize("error,words", [
    (MemoryError(), ["--batch", "--chunks"]), (FileNotFoundError("no such file"), ["no such file"]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["--batch", "--chunks"])])
def test_what_the_machine_lacks_is_a_line(error, words, exits):
    exits(words, command, raising(error))


def test_an_error_of_ours_is_a_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        command(raising(RuntimeError("shapes do not fit")))


# -------------------------------------------------------------------------------- flags, bad input

@pytest.mark.parametrize("module,args,words", [
    (train, ["--stepz=3"], ["--stepz"]), (train, ["--steps=0"], ["--steps"]),
    (train, ["--steps=-4"], ["--steps"]), (train, ["--steps=many"], ["--steps"]),
    (train, ["--steps=٣"], ["--steps"]), (train, ["--steps=1_0"], ["--steps"]),
    (train, ["--lr=nan"], ["--lr"]), (train, ["--lr=0"], ["--lr"]),
    (train, ["--lr=1e400"], ["--lr"]), (train, ["--cut=1.5"], ["--cut"]),
    (train, ["--style=direct"], ["--style"]),
    (train, ["--seed=1", "--seed=2"], ["twice"]), (train, ["--see=1"], ["--see"]),
    (train, ["--out=--"], ["no value"]), (train, ["--out=" + "9" * 5000], ["too long"]),
    (train, ["--width=15", "--out=run"], ["width"]),
    (train, ["--resume", "--out=none"], ["resume"]),
    (train, ["extra"], ["extra"]), (train, ["--ask=3+4", "--out=none"], ["no checkpoint"]),
    (train, ["--ask=3+4", "--steps=3"], ["--steps"]), (train, ["--support=4"], ["--pool"]),
    (train, ["--direct=0.7", "--cut=0.7", "--out=run"], ["direct"]),
    (train, ["--out=/dev/null/run", "--device=cpu"], ["/dev/null"]),
    (analyze, ["nonsense"], ["nonsense"]), (analyze, ["curve", "--questions=0"], ["--questions"])])
def test_bad_input_is_one_line_and_exit_code_2(module, args, words, tmp_path, refused):
    refused(module, args, words)
    assert not list(tmp_path.iterdir())


def test_cuda_that_is_missing_is_one_line(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", always(False))
    refused(train, ["--device=cuda"], ["CUDA"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", (train, meta, analyze))
def test_help_names_every_flag(module, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [module.__file__, "--help"])
    with pytest.raises(SystemExit) as e:
        module.main()
    shown, cls = capsys.readouterr().out, getattr(module, module.__name__.capitalize())
    assert e.value.code == 0
    for field in dataclasses.fields(cls):
        assert f"--{field.name}" in shown or field.name == "names"


@dataclasses.dataclass
class Example:
    """Flags of every kind."""
    steps: int = 5                  # [1, 1e3] a closed interval
    rate: float = 0.5               # (0, 1] open below
    kind: str = "one"               # {one, two} a choice
    free: str = "x"                 # any text, at 100 % of its length
    yes: bool = False               # on or off
    many: tuple = ()                # given several times
    names: tuple = ()               # ... words

def test_a_fields_comment_says_what_its_flag_may_be():
    c, given = flags.flags(Example, ["a", "--steps=1000", "--rate=1", "--kind=two", "--yes", "b",
                                     "--many=p", "--many=q"])
    assert c == Example(1000, 1.0, "two", "x", True, ("p", "q"), ("a", "b"))
    assert set(given) == {"steps", "rate", "kind", "yes", "many", "names"}
    assert flags.flags(Example, []) == (Example(), {})


def test_help_says_what_a_flag_may_be_and_is_otherwise(capsys):
    with pytest.raises(SystemExit):
        flags.flags(Example, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("a closed interval, [1, 1e3] (default: 5)", "open below, (0, 1] (default: 0.5)",
                  "--kind one|two", "at 100 % of its length (default: 'x')", "names words"):
        assert words in shown


@pytest.mark.parametrize("arg", ("--steps=0", "--steps=1001", "--steps=1.5", "--rate=0",
                                 "--rate=1.1", "--rate=inf", "--kind=three", "--free=", "--yes=1"))
def test_a_value_that_the_comment_does_not_allow_is_refused(arg, exits):
    exits([arg.split("=")[0]], flags.flags, Example, [arg])


# ------------------------------------------------------------------------------------- checkpoints

class Payload:
    """Makes a folder when it is unpickled."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)

def test_foreign_checkpoints_are_refused_and_left_alone(tmp_path, exits):
    own = {"format": FORMAT, "encoding": text.ENCODING.name}
    whole = {**own, "model": Model(Config(text.VOCAB, 1, 2, 16)).state(), "step": 0, "config": {}}
    torch.save(whole, tmp_path / "whole")
    train.load_model(tmp_path / "whole")
    contents = {
        "other": {"model": {}}, "list": [1], "payload": Payload(tmp_path / "executed"),
        "older": {**whole, "format": "raml-arithmetic checkpoint 1"},
        "encoding": {**whole, "encoding": "gpt2"}, "nothing": own,
        "shape": {**own, "model": {"shape": {"vocab": 3}, "weights": {}}}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text").write_bytes(b"hello")
    (tmp_path / "empty").write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in (*contents, "text", "empty", "missing", "."):
        exits([str(tmp_path / name)], train.load_model, tmp_path / name)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_flipped_bit_is_found(straight, tmp_path, exits):
    """In a weight, which is a number all the same."""
    weight = load(straight / "ckpt.pt")["model"]["weights"]["embed.weight"]
    good, number = (straight / "ckpt.pt").read_bytes(), weight[3].numpy().tobytes()
    at = good.index(number)
    flipped = bytes([good[at] ^ 1])
    (tmp_path / "flipped.pt").write_bytes(good[:at] + flipped + good[at + 1:])
    exits(["flipped.pt", "damaged"], load, tmp_path / "flipped.pt")


# -------------------------------------------------------------------------------------- optimisers

def test_muon_steps_along_the_nearest_orthogonal_matrix():
    """Newton-Schulz against an SVD: same directions, singular values within the band that its
    coefficients give."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(3, 8, 20, generator=generator, dtype=torch.float64)
    x = optim.Muon.orthogonal(g.float()).double()
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    middle = u.mT @ x @ v.mT
    values = middle.diagonal(dim1=-2, dim2=-1)
    assert (middle - torch.diag_embed(values)).abs().max() < 1e-3
    assert ((values - 1).abs() < 0.35).all()


def muon_alone(grads, lr, momentum):
    """Where steps along these gradients take a matrix of zeros: Nesterov's momentum, tall matrices
    as their transposes and by sqrt(rows / columns) further."""
    rows, columns = grads[0].shape
    p, m = torch.zeros(rows, columns), torch.zeros(rows, columns)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        direction = momentum * m + (1 - momentum) * g
        wide = direction if rows <= columns else direction.mT
        u = optim.Muon.orthogonal(wide[None])[0]
        u = u if rows <= columns else u.mT
        p = p - lr * math.sqrt(max(1, rows / columns)) * u
    return p

def test_muon_moves_matrices_of_any_shape_as_if_each_were_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 20), (20, 8), (8, 20), (5, 5)]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    grads = [torch.randn(3, *shape, generator=generator) for shape in shapes]
    muon = optim.Muon(params, lr=0.1, momentum=0.9)
    for step in range(3):
        for p, own in zip(params, grads):
            p.grad = own[step].clone()
        muon.step()
    for p, own in zip(params, grads):
        expected = muon_alone(own, lr=0.1, momentum=0.9)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------- the machine

@pytest.mark.parametrize("args", ([], ["--preset=gpu"], ["--method=grpo", "--init=x"],
                                  ["--method=dpo", "--init=x", "--device=cpu"]))
def test_flags_mean_the_same_with_and_without_cuda(monkeypatch, args):
    """CPU and CUDA train the same model on the same batches."""
    configs = []
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", always(there))
        configs.append(train.configure(*flags.flags(train.Train, args)))
    assert configs[0] == configs[1]
    assert configs[0].compile == "no"


@pytest.mark.parametrize("asked,there,got", [("auto", True, "cuda"), ("auto", False, "cpu"),
                                             ("cpu", True, "cpu"), ("cuda", True, "cuda")])
def test_the_device_is_the_one_asked_for(monkeypatch, asked, there, got):
    monkeypatch.setattr(torch.cuda, "is_available", always(there))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", always(None))
    assert machine.device_of(train.Train(device=asked)).type == got


class Recorder:
    """Stands in a function's place and remembers what it was called with."""
    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kw):
        self.calls.append((*args, *kw.values()))

def torchrun(monkeypatch, local, devices):
    """As in a process of a torchrun with that number, where torch finds that many CUDA devices. ->
    what `join` calls to choose a device, and to join the others."""
    monkeypatch.setattr(torch.cuda, "device_count", always(devices))
    names = {"RANK": local, "LOCAL_RANK": local, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    chosen, joined = Recorder(), Recorder()
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    monkeypatch.setattr(machine.dist, "init_process_group", joined)
    return chosen, joined

@pytest.mark.parametrize("local,devices", [(1, 1), (2, 2), (5, 2)])
def test_more_processes_than_devices_are_refused(monkeypatch, exits, local, devices):
    chosen, joined = torchrun(monkeypatch, local, devices)
    exits([f"process {local}", f"{devices} CUDA devices"], machine.join, True)
    assert chosen.calls == joined.calls == []


def test_processes_join_with_a_device_each_or_on_the_cpu(monkeypatch):
    chosen, joined = torchrun(monkeypatch, 1, 2)
    machine.join(True)
    machine.join(False)
    assert chosen.calls == [(1,)]
    assert joined.calls == [("nccl", torch.device("cuda", 1)), ("gloo",)]


def test_a_world_size_without_torchrun_is_refused(monkeypatch, exits):
    _, joined = torchrun(monkeypatch, 0, 1)
    monkeypatch.delenv("MASTER_ADDR")
    exits(["torchrun"], machine.join, True)
    assert joined.calls == []


@pytest.mark.parametrize("dtype,capability,half", [
    ("bfloat16", (7, 5), False), ("bfloat16", (8, 0), True), ("bfloat16", (9, 0), True),
    ("float32", (7, 5), False), ("float32", (9, 0), False), ("auto", (9, 0), False)])
def test_bfloat16_needs_a_device_that_has_it(monkeypatch, capsys, dtype, capability, half):
    """Below compute capability 8.0 training stays in float32, and a line says so."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", always(capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", always("a device"))
    chosen = machine.precision_of(train.Train(dtype=dtype), torch.device("cuda"))
    assert chosen == (torch.bfloat16 if half else None)
    said = capsys.readouterr().err
    assert ("float32" in said) == (dtype == "bfloat16" and not half)


@pytest.mark.parametrize("dtype,has_units,half", [
    ("auto", True, True), ("auto", False, False), ("bfloat16", False, True),
    ("float32", True, False)])
def test_a_cpu_computes_in_bfloat16_where_it_multiplies_in_it(monkeypatch, dtype, has_units, half):
    monkeypatch.setattr(machine, "fast_bfloat16", always(has_units))
    chosen = machine.precision_of(train.Train(dtype=dtype), torch.device("cpu"))
    assert chosen == (torch.bfloat16 if half else None)


def test_weights_and_their_gradients_stay_in_float32_where_bfloat16_is_computed(tiny):
    model, (x, targets) = tiny.float(), torch.randint(0, 20, (2, 3, 9))
    exact, rough = (gradient_of(model, x, targets, dtype) for dtype in (None, torch.bfloat16))
    assert exact.dtype == rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.1

def gradient_of(model, x, targets, dtype):
    model.zero_grad()
    with machine.computing_in(model, dtype):
        model.nll(x, targets).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_tf32_is_on_within_a_training_loop_on_cuda_only():
    before = torch.get_float32_matmul_precision()
    with machine.training_precision(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before == "highest"
    with pytest.raises(RuntimeError), machine.training_precision(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


# ------------------------------------------------------------------------------- held-out questions

@pytest.mark.parametrize("domain", score.CELLS)
def test_held_out_questions_are_the_same_for_every_model_and_never_trained_on(domain):
    for k in score.CELLS[domain]:
        questions = score.held_out(domain, k, 40)
        assert questions == score.held_out(domain, k, 40)
        assert len({arithmetic.canonical(q) for q in questions}) == len(questions)
        part = "test" if k in arithmetic.TRAINED.get(domain, ()) else "ood"
        assert {arithmetic.split(q) for q in questions} == {part}
