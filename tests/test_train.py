"""The losses of Table 1 against slow paths and finite differences; runs, and what they leave."""
import copy
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, a_run, close, logp_at_end, product, rated, same, slow_nll

import meta
import train
from data import arithmetic, tasks, text
from lab import run, score
from lab.flags import flags

MODES = ("trajectory", "direct")
Q = arithmetic.parse("(3+5)*2-7")
HELD = next(s for s in (f"({a}+5)*{b}" for a in range(10) for b in range(10))
            if arithmetic.split(s) == "test")


def grads(model):
    """All gradients as one vector; takes them away."""
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found

def ids_of(outputs):
    return [text.ENCODING.encode(output, allowed_special="all") for output in outputs]


def test_sft_is_the_mean_nll_of_every_target_and_its_gradient(tiny):
    c, mix = train.Train(batch=10), text.Mix(operands=(3, 4), styles=arithmetic.STYLES)
    numbers, found = train.sft(c, tiny, train.pieces(c, mix, 4, 5), 5), grads(tiny)
    rows = text.batch_at(5, 10, mix, 0)
    loss = torch.stack([x for row in rows for x in slow_nll(tiny, row)]).mean()
    loss.backward()
    close(found, grads(tiny))
    assert numbers == {"loss": pytest.approx(float(loss.detach()), rel=1e-10),
                       "tokens": sum(len(trunk) + len(asides) for trunk, asides in rows)}

def test_policy_loss_equals_a_written_out_loop_with_clipping_on_both_sides():
    torch.manual_seed(0)
    old, mask = torch.randn(6, 5).double(), torch.rand(6, 5) < 0.7
    new = (old + 0.4 * torch.randn(6, 5)).requires_grad_()
    A, expected, clipped = [1.0, -1.0, 0.5, -0.5, 0.0, 2.0], 0, set()
    for i, j in mask.nonzero().tolist():
        rho = (new[i, j] - old[i, j]).exp()
        bounded = min(max(rho, 0.8), 1.2)
        expected = expected - min(rho * A[i], bounded * A[i]) / 7 / 6
        clipped.add((A[i] > 0, bool(rho * A[i] > bounded * A[i])))
    assert len(clipped) == 4
    loss = train.policy_loss(new, old, mask, torch.tensor(A), 7)
    close(loss, expected)
    close(*(torch.autograd.grad(x, new)[0] for x in (loss, expected)))

# Groups of four: a held-out question and what never ends in the second, no form in the third.
OUTPUTS = ["(8*2)-7;6-7;9</think>9<eos>", "9</think>9<eos>", "8</think>1<eos>", "</think>3<eos>",
           f"{HELD}</think>9<eos>", "</think>9<eos>", "</think>3<eos>",
           "8" * arithmetic.room(4), *["9<eos>"] * 4]
TOKENS = sum(map(len, ids_of(OUTPUTS)))
QUESTIONS = [Q, arithmetic.parse("(1+7)*2-7"), Q]

def lessons():
    asked = iter(QUESTIONS)
    return SimpleNamespace(lesson=lambda rng: (next(asked), []))

def log_likelihood(model, j):
    """log p of a whole output to its group's question, token by token."""
    head, (ids,) = text.prompt(QUESTIONS[j // 4].text), ids_of([OUTPUTS[j]])
    return sum(logp_at_end(model, [*head, *ids[:i]])[token] for i, token in enumerate(ids))

class Writer:
    """A model with scripted outputs in place of its own."""
    def __init__(self, model):
        self.nll, self.device = model.nll, model.device

    def generate(self, prompts, stop, *_):
        return [[i for i in ids if i != stop] for ids in ids_of(OUTPUTS)]

@pytest.mark.parametrize("update", (0, 2))
def test_grpo_moves_along_advantage_times_log_likelihood(tiny, update):
    """What is better than its group's mean, per a constant length; `update` of a group; no output
    with a held-out question in it."""
    c = train.Train(method="grpo", batch=12, group=4, update=update)
    numbers = train.grpo(c, Writer(tiny), lessons(), 3)
    found, rng, n = grads(tiny), random.Random("update/0/3"), update or 4
    advantages = [0.5, 0.5, -0.5, -0.5, 0, 0.75, -0.25, -1.25, *[0] * 4]
    for j in [first + j for first in (0, 4, 8) for j in rng.sample(range(4), n)]:
        gain = advantages[j] * log_likelihood(tiny, j)
        (-gain / arithmetic.room(4) / (3 * n)).backward()
    close(found, grads(tiny))
    assert numbers == pytest.approx({"reward": 1 / 12, "right": 4 / 12, "form": 7 / 12,
                                     "signal": 2 / 3, "length": TOKENS / 12, "tokens": TOKENS})

def test_dpo_prefers_right_outputs_to_wrong_ones_by_its_formula(tiny):
    """More than the model that it starts from does; pairs of clean outputs alone."""
    c, ref, margins = train.Train(method="dpo", batch=12, group=4), copy.deepcopy(tiny), []
    ref.blocks[0].down.weight.data += 0.2 * torch.randn_like(ref.blocks[0].down.weight)
    numbers = train.dpo(c, Writer(tiny), lessons(), 0, Writer(ref))
    found = grads(tiny)
    for pair in ((0, 2), (1, 3), (5, 6)):
        better, worse = (log_likelihood(tiny, j) - log_likelihood(ref, j).detach() for j in pair)
        margins.append(0.1 * (better - worse))
    loss = sum((1 + (-m).exp()).log() for m in margins) / 3
    loss.backward()
    close(found, grads(tiny))
    preferred = sum(bool(m > 0) for m in margins) / 3
    assert 0 < preferred < 1 and numbers == pytest.approx({
        "loss": float(loss.detach()), "preferred": preferred, "signal": 3, "tokens": TOKENS})

def test_pairs_are_a_right_output_and_a_wrong_one_of_the_same_question():
    """Each at most once, only clean ones, none of a group that is all right or all wrong."""
    rewards = torch.tensor([[1, 0, 1, -1], [1, 1, 1, 1], [-0.5, 0, 1, 0]])
    clean = torch.ones(3, 4, dtype=torch.bool)
    assert train.pairs_of(rewards, clean) == [(0, 1), (2, 3), (10, 8)]
    clean[0, 0] = clean[2, 0] = False
    assert train.pairs_of(rewards, clean) == [(2, 1), (10, 9)]


@pytest.mark.parametrize("method", ("grpo", "dpo"))
@pytest.mark.parametrize("reward", (1.0, 0.0))
def test_without_a_signal_no_step_is_taken(tmp_path, base, monkeypatch, method, reward):
    """After two steps with one, all outputs are equally good: momentum must not go on alone."""
    saved, judged, real = [run.load(base / "ckpt.pt")["model"]["weights"]], [], run.save

    def judge(q, output):
        judged.append(output)
        return rated(q, output) if len(judged) <= 16 else reward

    def save(path, **state):
        saved.append({name: w.clone() for name, w in state["model"]["weights"].items()})
        real(path, **state)
    monkeypatch.setattr(arithmetic, "reward", judge)
    monkeypatch.setattr(run, "save", save)
    a_run(method, tmp_path, f"--init={base / 'ckpt.pt'}")
    start, *after = saved
    assert len(after) == 3 and not torch.equal(start["head.weight"], after[0]["head.weight"])
    same(after[1:], [after[0]] * 2)

def stopped_within_step(after, kind, out, init):
    """A run that gets SIGTERM, or whose terminal is closed, within a step, and stops after it."""
    module, steps = meta if kind == "meta" else train, []
    number = signal.SIGTERM if kind == "meta" else signal.SIGHUP
    real, handler = module.move, signal.SIG_DFL
    signal.signal(number, handler)                  # whatever nohup says

    def move(*args):
        steps.append(real(*args))
        if len(steps) == after:
            os.kill(os.getpid(), number)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(module, "move", move)
        a_run(kind, out, *init)
    assert e.value.code == 128 + number and signal.getsignal(number) == handler

def test_a_signal_that_is_ignored_as_under_nohup_stops_nothing(tmp_path, monkeypatch):
    real, handler = train.move, signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(train, "move", lambda *args: [real(*args), os.kill(os.getpid(), 1)])
    a_run("sft", tmp_path)
    signal.signal(signal.SIGHUP, handler)
    assert run.load(tmp_path / "ckpt.pt")["step"] == 24

def test_a_run_keeps_what_it_read_and_the_number_type_that_it_used(tmp_path, base, monkeypatch):
    """DPO's reference is the model that it started from, read once, also when it is resumed."""
    init, real, paths = str(base / "ckpt.pt"), train.load, []
    monkeypatch.setattr(train, "load", lambda path, *a: paths.append(str(path)) or real(path, *a))
    a_run("dpo", tmp_path / "dpo", f"--init={init}")
    same(run.load(tmp_path / "dpo" / "ckpt.pt")["extra"], run.load(init)["model"]["weights"])
    assert paths == [init]
    c = run.prepare(train.Train(out=str(tmp_path / "new"), device="cpu"), {})
    expected = "bfloat16" if run.precision_of(train.Train(), torch.device("cpu")) else "float32"
    assert c.dtype == expected

@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_straight(tmp_path, base, straight, monkeypatch, capsys,
                                                 kind):
    """Weights, optimisers, rates and log, bit for bit; and every number that it logs next is that
    of the weights and the batch that it goes on with."""
    monkeypatch.setattr(arithmetic, "reward", rated)
    (words, whole, _), out = straight[kind], tmp_path / "broken"
    stopped_within_step(5, kind, out, words[len(KINDS[kind]):])
    assert "--resume" in capsys.readouterr().err and not (out / "summary.json").exists()
    step = run.load(out / "ckpt.pt")["step"]
    assert step == len(run.read_log(out)) < run.load(whole / "ckpt.pt")["step"]
    (model, _), (ref, _) = (train.load_model(path / "ckpt.pt") for path in (out, base))
    if kind == "meta":
        _, inner, c = meta.load_meta(out / "ckpt.pt")
        some = tasks.tasks_at(step, c)
        loss, numbers = meta.meta_loss(model, inner, some)
        loss.backward()
        squares = [p.grad.square().sum() for p in (*model.parameters(), *inner.parameters())]
        numbers |= {"norm": float(sum(squares)) ** 0.5,
                    "tokens": sum(len(q.text + "".join(steps)) for q, steps, *_ in some)}
    else:
        c, _ = flags(train.Train, words)
        mix = train.mix_of(c)
        given = train.pieces(c, mix, 8, step) if kind == "sft" else mix
        numbers = train.METHODS[kind](c, model, given, step, ref)
    a_run(kind, out, "--resume")
    same(product(out), product(whole))
    logged = run.read_log(out)[step]
    assert logged == pytest.approx(numbers | {k: logged[k] for k in ("step", "seconds")}, rel=1e-4)

SCRIPT = """import hashlib, meta, train
from data import tasks
train.main()
print(hashlib.sha256(repr(tasks.tasks_at(0, meta.Meta())).encode()).hexdigest())"""

def test_a_run_does_not_depend_on_the_process_nor_on_its_hash_seed(tmp_path, base):
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(run.ROOT)}
    words = [sys.executable, "-c", SCRIPT, f"--out={tmp_path}", *KINDS["sft"]]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    some = repr(tasks.tasks_at(0, meta.Meta())).encode()
    assert done.stdout.split()[-1] == hashlib.sha256(some).hexdigest()
    same(product(tmp_path), product(base))

def test_a_run_leaves_what_a_program_can_compare(base):
    files = {path.stem: path for path in base.iterdir()}
    summary, config = (json.loads(files[name].read_text()) for name in ("summary", "config"))
    (model, state), log = train.load_model(files["ckpt"]), run.read_log(base)
    assert summary["config"] == config == state["config"] and config["width"] == 16
    assert [line["step"] for line in log] == list(range(24)) and len(files) == 4
    assert (summary["steps"], summary["seconds"]) == (24, round(log[-1]["seconds"], 1))
    assert summary["tokens"] == sum(line["tokens"] for line in log)
    assert summary["parameters"] == sum(w.numel() for w in state["model"]["weights"].values())
    table, wrong = {}, []
    for (domain, counts), mode in itertools.product(arithmetic.TESTED.items(), MODES):
        for n in counts:
            questions = score.held_out(domain, n, 2)
            right = [score.right(model, [q], mode)[0] for q in questions]
            table.setdefault(domain, {}).setdefault(str(n), {})[mode] = sum(right) / 2
            wrong += [q.text for q, ok in zip(questions, right)
                      if mode == "trajectory" and arithmetic.trained(domain, n) and not ok]
    assert summary["exact_match"] == table
    assert [line.split(" -> ")[0] for line in summary["mistakes"]] == wrong[:20]

def test_what_a_notebook_passes_is_what_runs_also_in_a_thread(tmp_path, exits):
    """Presets lie below it; what contradicts something is refused as on a command line."""
    c = train.Train(steps=2, layers=1, heads=2, width=16, batch=4, questions=1, device="cpu",
                    threads=1, out=str(tmp_path))
    with ThreadPoolExecutor() as pool:
        summary = pool.submit(train.train, c).result()
    assert summary["config"] | {"dtype": "auto"} == asdict(c) and summary["steps"] == 2
    exits(["--steps=9"], train.train, replace(c, steps=9, resume=True))
    large = train.configure(train.Train(preset="gpu", batch=4), {})
    assert (large.batch, large.width) == (4, 512)
    exits(["--style"], train.configure, train.Train(method="dpo", init="x", style="short"), {})
    exits(["nothing to resume"], meta.meta, meta.Meta(resume=True, out=str(tmp_path / "none")))

@pytest.mark.parametrize("step", (4, 5))
def test_a_number_that_is_not_finite_ends_a_run_and_keeps_the_last_checkpoint(
        tmp_path, base, monkeypatch, capsys, step):
    """A loss, or a weight where no loss has told yet; what an older run left is gone."""
    shutil.copytree(base, tmp_path / "run")
    monkeypatch.setattr(train, "lr_at", lambda c, i: math.nan if i == step else 0.1)
    with pytest.raises(SystemExit) as e:
        a_run("sft", tmp_path / "run", "--overwrite")
    assert e.value.code == 1 and "step 5: a number is not finite" in capsys.readouterr().err
    out = tmp_path / "run"
    assert run.load(out / "ckpt.pt")["step"] == 4 <= len(run.read_log(out))
    assert not (out / "summary.json").exists()

def test_asking_prints_the_checked_trajectory_and_both_answers(base, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", f"--out={base}", "--ask=3+5*2", "--device=cpu"])
    train.main()
    first, *steps, answer, direct, note = capsys.readouterr().out.splitlines()
    assert first == "question    3+(5*2)" and "modulo 10" in note
    assert answer.startswith("answer ") and direct.startswith("direct ")
    assert steps and {line.split()[-1] for line in steps} <= {"ok", "wrong"}
