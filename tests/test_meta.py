"""The inner loop is held to mathematics: weights written out by hand, finite differences, and what
must not matter."""
import itertools
import math
import random

import pytest
import torch
from conftest import a_run, close, logp_at_end, slow_nll
from torch.func import functional_call

import meta
import train
from data import arithmetic, tasks, text
from lab import score

TAU = 3.0


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])

def some_tasks(G=3, seed=0, queries=3):
    rng, found = random.Random(seed), []
    for i in range(G):
        q, whole = arithmetic.draw(rng, "expr", 3 + i % 3), i % 2 == 0
        steps = arithmetic.steps(q, rng)[0]
        asked = [arithmetic.draw(rng, "expr", rng.randint(2, 5)) for _ in range(queries)]
        found.append(tasks.Task(q, steps if whole else steps[:-1], asked, whole))
    return found

def inner_of(model, K=1, fast="*.up,*.down", alpha=0.05, **options):
    """-> (Inner, {(layer, step): logarithm of its rate}), all rates different."""
    names = meta.fast_layers(model, fast)
    inner, logs = meta.Inner(model, names, K, 1.0, TAU, **options).double(), {}
    for (i, name), k in itertools.product(enumerate(names), range(K)):
        inner.log_alpha.data[i, k] = log = math.log(alpha * (1 + 0.3 * i + 1.7 * k))
        logs[name, k] = torch.tensor(log, dtype=torch.float64, requires_grad=True)
    for matrix in inner.matrices or []:
        matrix.data.normal_(0, 0.1)                 # a fresh write moves nothing
    return inner, logs

def dual(model, inner, some, order=2):
    """The losses of every query's row, summed, by the fast form, all side by side."""
    query, hook = tasks.query(some), meta.adapt(model, inner, tasks.support(some), order).hook
    return model.score(model(**query.inputs(), hook=hook), query.targets).sum(1)

def losses_of(model, weights, q):
    """What a query asks, each after a plain row: its brackets, its answer, the end."""
    return slow_nll(model, text.row(q.text, [], q.answer, brackets=True), weights)

def path_of(name):
    return f"blocks.{name}.weight"

def weights_of(model, logs):
    return {path_of(name): model.get_parameter(path_of(name)) for name, _ in logs}

def moved_by_hand(model, logs, K, task, first_order=False):
    """theta' of one task, weights written out: no asides, no masks, no dual form, and every rate by
    its own name -> {parameter: tensor}."""
    head, t = text.prompt(task.solved.text), text.encode(";".join(task.steps))
    ids, weights = torch.tensor([[*head, *t]]), weights_of(model, logs)
    for k in range(K):
        h = functional_call(model, weights, (ids,))
        logp, loss = (model.logits(h)[0] / TAU).log_softmax(-1), 0
        for i, target in enumerate([*t, text.END_THINK]):
            loss = loss - logp[len(head) - 1 + i, target]
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=not first_order)
        grads, moved = dict(zip(weights, grads)), {}
        for name in {name for name, _ in logs}:
            path = path_of(name)
            moved[path] = weights[path] - logs[name, k].exp() * grads[path]
        weights = moved
    return weights

def gradient(loss, model, rates):
    return flat(torch.autograd.grad(loss, [*model.parameters(), *rates], retain_graph=True,
                                    materialize_grads=True))


@pytest.mark.parametrize("K,fast", [(1, "*.up,*.down"), (2, "*.up,*.down"), (3, "*.down"),
                                    (1, "*"), (2, "1.qkv,*.out,2.up")])
@pytest.mark.parametrize("order", (2, 1))
def test_dual_equals_primal_losses_and_meta_gradients(tiny, K, fast, order):
    """Several tasks of different lengths side by side, each with several queries; order 1 takes the
    update for a constant."""
    (inner, logs), some, primal = inner_of(tiny, K, fast), some_tasks(), []
    for task in some:
        weights = moved_by_hand(tiny, logs, K, task, first_order=order == 1)
        primal += [sum(losses_of(tiny, weights, q)) for q in task.queries]
    found, primal = dual(tiny, inner, some, order), torch.stack(primal)
    still = dual(tiny, inner_of(tiny, K, fast, alpha=1e-12)[0], some)
    assert (found - still).abs().min() > 1e-5           # every query's loss was moved
    close(found, primal)
    exact = gradient(primal.sum(), tiny, logs.values())
    close(gradient(found.sum(), tiny, [inner.log_alpha]), exact)
    if order == 2:
        moved = meta.theta_prime(tiny, inner, tasks.support(some[-1:]))
        hand = flat(weights[path] for path in moved)
        close(flat(moved.values()), hand)
        exact = gradient(hand.sin().sum(), tiny, logs.values())
        close(gradient(flat(moved.values()).sin().sum(), tiny, [inner.log_alpha]), exact)

@pytest.mark.parametrize("K", (1, 2))
@pytest.mark.parametrize("algo,update,holds", [
    ("maml", "gradient", True), ("none", "gradient", True), ("context", "gradient", True),
    ("maml", "write", True), ("maml", "register", True), ("maml", "recursive", True),
    ("fomaml", "gradient", False), ("fomaml", "write", False)])
def test_meta_gradient_is_that_of_finite_differences_and_fomamls_is_not(tiny, K, algo, update,
                                                                        holds):
    """Along a random direction of theta and of what the inner loop learns."""
    inner, _ = inner_of(tiny, K, update=update)
    parameters, h = [*tiny.parameters(), *inner.parameters()], 1e-6
    direction, values = [torch.randn_like(p) for p in parameters], []
    loss, _ = meta.meta_loss(tiny, inner, some_tasks(), algo)
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for by in (h, -2 * h):
        for p, d in zip(parameters, direction):
            p.data += by * d
        values.append(float(meta.meta_loss(tiny, inner, some_tasks(), algo)[0].detach()))
    measured = (values[0] - values[1]) / (2 * h)
    off = abs(float(flat(grads) @ flat(direction)) / measured - 1)
    assert off < 1e-6 if holds else off > 1e-3

def test_fast_layers_are_those_that_patterns_name_and_no_other_moves(tiny):
    assert meta.fast_layers(tiny, "2.up,0.*") == ["0.qkv", "0.out", "0.up", "0.down", "2.up"]
    with pytest.raises(ValueError, match="no layer matches"):
        meta.fast_layers(tiny, "9.up")
    some, moves = tasks.support(some_tasks(1)), set()
    hook = meta.adapt(tiny, inner_of(tiny, fast="2.*")[0], some).hook

    def watched(name, x, y):
        moves.update([] if torch.equal(hook(name, x, y), y) else [name])
        return y
    tiny(torch.arange(6)[None], hook=watched)
    assert moves == {"2.qkv", "2.out", "2.up", "2.down"}

@pytest.mark.parametrize("kind", ("own", "permuted", "constant", "random"))
def test_nonsense_targets_are_asked_where_the_trajectorys_own_stand(tiny, kind):
    support = tasks.support(some_tasks(4))
    asked, again = (inner_of(tiny, targets=kind)[0].asked(support) for _ in range(2))
    own, there = support.inner, support.inner >= 0
    pairs = set(zip(own[there].tolist(), asked[there].tolist()))
    before, after = ({pair[i] for pair in pairs} for i in (0, 1))
    assert torch.equal(asked, again) and torch.equal(asked >= 0, there)
    assert torch.equal(asked, own) == (kind == "own")
    assert (len(pairs) == len(before) == len(after)) == (kind in ("own", "permuted"))
    assert after == {"constant": {text.END_THINK}, "random": set(range(10))}.get(kind, after)

def test_an_inner_loss_can_be_asked_of_a_part_of_the_trajectory(tiny):
    """3+5;8 closed: `<think>` and all that follows it but 8 predict t and `</think>`."""
    support = text.batch([text.row("(3+5)*2", ["8*2", "6"], "6"), text.row("3+5", ["8"], "8")])
    parts = {"closing": ["|", "|"], "unclosed": ["8*2;6", "8"], "last": ["6|", "8|"],
             "earlier": ["8*2;", ""]}
    for name, expected in parts.items():
        asked = inner_of(tiny, targets=name)[0].asked(support)
        rows = [text.decode(row[row >= 0]).replace("</think>", "|") for row in asked]
        assert rows == expected, name

def test_queries_can_show_the_trajectory_in_the_context_and_learn_what_they_learn_without(tiny):
    some = some_tasks(4)
    plain, shown = tasks.query(some), tasks.query(some, shown=True)
    queries = [(task, q) for task in some for q in task.queries]
    for (task, q), ids, targets, alone in zip(queries, shown.ids, shown.targets, plain.targets):
        assert text.decode(ids[ids != text.PAD]).count(f"<think>{';'.join(task.steps)}</think>")
        assert torch.equal(targets[targets >= 0], alone[alone >= 0])
    loss, _ = meta.meta_loss(tiny, None, some, "context", joint=0)
    losses = tiny.score(tiny(**shown.inputs()), shown.targets)
    close(loss, losses.sum() / (shown.targets >= 0).sum())

@pytest.mark.parametrize("K", (1, 2))
def test_a_write_without_a_gradient_is_x_times_a_learned_matrix(tiny, K):
    """W' = W - alpha (X^T X B)^T, X the inputs at the tokens that the inner loss would ask."""
    (inner, logs), (task,) = inner_of(tiny, K, update="write"), some_tasks(1)
    head, weights = text.prompt(task.solved.text), weights_of(tiny, logs)
    ids, inputs = torch.tensor([[*head, *text.encode(";".join(task.steps))]]), {}

    def record(name, x, y):
        inputs[name] = x[0, len(head) - 1:]
        return y
    for k in range(K):
        functional_call(tiny, weights, (ids,), {"hook": record})
        for name, B in zip(inner.names, inner.matrices):
            change = logs[name, k].exp() * (inputs[name].T @ inputs[name] @ B).T
            weights[path_of(name)] = weights[path_of(name)] - change
            assert change.abs().max() > 1e-3
    expected = torch.stack([sum(losses_of(tiny, weights, q)) for q in task.queries])
    close(dual(tiny, inner, [task]), expected)

def test_a_register_adds_one_learned_vector_read_at_the_trajectorys_end(tiny):
    """The same at every token of the task's queries, as a bias would."""
    (inner, logs), (task,) = inner_of(tiny, fast="0.down", update="register"), some_tasks(1)
    (B,), ids = inner.matrices, text.prompt(task.solved.text) + text.encode(";".join(task.steps))
    bias = logs["0.down", 0].exp() * (tiny(torch.tensor([ids]))[0, -1] @ B)
    rows, expected = [text.row(q.text, [], q.answer, brackets=True) for q in task.queries], []
    for query in map(text.batch, [[row] for row in rows]):
        h = tiny(**query.inputs(), hook=lambda name, x, y: y - bias if name == "0.down" else y)
        expected.append(tiny.score(h, query.targets).sum())
    assert bias.abs().min() > 1e-4
    close(dual(tiny, inner, [task]), torch.stack(expected))

def test_the_recursion_moves_by_one_state_after_the_other_and_reads_it_alone(tiny):
    """Eq. 4, weights written out: theta'_i from theta'_(i-1) by a row `<bos> q <think> state i`
    that holds no other state; padding and tasks with fewer states change nothing."""
    (inner, logs), some, expected = inner_of(tiny, update="recursive"), some_tasks(), []
    for task in some:
        head, weights = text.prompt(task.solved.text), weights_of(tiny, logs)
        for i, state in enumerate(task.steps):
            ids = [*head, *text.encode(";" * (i > 0) + state)]
            before = [text.PAD, *ids[:-1]]
            if i:
                before[len(head)] = text.encode(task.steps[i - 1])[-1]
            tensors = (torch.tensor([ids]), torch.tensor([before]))
            logp = tiny.logits(functional_call(tiny, weights, tensors)[0]).div(TAU).log_softmax(-1)
            first = len(head) - (i == 0)            # `<think>`, or the `;` before the state
            last = text.END_THINK if i == len(task.steps) - 1 else text.SEPARATOR
            targets = [*ids[first + 1:], last]
            loss = -logp[range(first, len(ids)), targets].sum()
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {path: weights[path] - logs[name, 0].exp() * grad
                       for (name, _), path, grad in zip(logs, weights, grads)}
        expected += [sum(losses_of(tiny, weights, q)) for q in task.queries]
        moved = meta.theta_prime(tiny, inner, tasks.support([task]))
        close(flat(moved.values()), flat(weights[path] for path in moved))
    close(dual(tiny, inner, some), torch.stack(expected))

@pytest.mark.parametrize("algo", ("maml", "fomaml", "none"))
def test_the_meta_objective_is_the_queries_loss_and_sfts_own_loss(tiny, algo):
    """At theta', or at theta without an inner loop, + joint * L(theta); logged of the queries are
    the answers alone."""
    (inner, logs), some = inner_of(tiny, 2), some_tasks()
    loss, numbers = meta.meta_loss(tiny, inner, some, algo, joint=0.7)
    losses, answers = [], []
    for task in some:
        weights = moved_by_hand(tiny, logs, 0 if algo == "none" else 2, task)
        for q in task.queries:
            losses += losses_of(tiny, weights, q)
            answers.append(losses[-2])
    rows = [text.row(t.solved.text, t.steps, t.solved.answer, whole=t.whole) for t in some]
    close(numbers["joint"], train.sft(None, tiny, [text.batch(rows)], 0)["loss"])
    close(numbers["L_q"], float(sum(answers).detach() / len(answers)))
    close(loss.detach(), sum(losses).detach() / len(losses) + 0.7 * numbers["joint"])


def test_answers_come_from_theta_from_theta_prime_or_from_the_context(tiny):
    """Batched and cached, against one question at a time with its weights written out."""
    (inner, logs), some, found = inner_of(tiny, alpha=0.5), some_tasks(12, queries=1), {}
    for where in ("theta", "theta_prime", "in_context"):
        expected = []
        for task in some:
            weights = moved_by_hand(tiny, logs, 1, task) if where == "theta_prime" else {}
            think = ";".join(task.steps) if where == "in_context" else ""
            logp = logp_at_end(tiny, text.prompt(task.queries[0].text, think), weights)
            expected.append(text.decode([logp.argmax()]).removesuffix("<eos>"))
        found[where] = meta.answers(tiny, inner, some, where, size=5)
        assert found[where] == expected
    assert found["theta"] != found["theta_prime"] != found["in_context"]

def test_trials_are_what_their_kinds_say():
    rng, questions = random.Random(0), score.held_out("expr", 4, 30)
    for q, kind in itertools.product(questions, meta.KINDS):
        relatives, complete = arithmetic.relatives(q), kind in ("whole", "beyond")
        task = meta.trial(q, questions, kind, "states", rng)
        if task is None:
            asked = relatives.get(kind)
            assert kind in ("left", "right") and (asked is None or asked.operands == 2)
            continue
        verdicts = arithmetic.check(task.solved, ";".join(task.steps))
        assert task.whole == complete == verdicts[-1] and all(verdicts[:-1])
        assert len(task.steps) == (3 if complete else 2) and (task.solved == q) == (kind != "other")
        asked, = task.queries
        assert asked == relatives.get(kind, q if kind in ("cut", "whole", "other") else asked)
        assert kind not in ("unrelated", "other") or task.solved.answer != asked.answer
        assert asked.operands == {"fact": 2, "beyond": 5}.get(kind, asked.operands)

def test_outcomes_are_the_right_answers_of_every_place(monkeypatch):
    """theta knows nothing, theta' the last digit shown, the context everything; a question alone
    has no other to be held against."""
    def made_up(model, inner, batch, where):
        return {"theta": ["?" for _ in batch], "in_context": [t.queries[0].answer for t in batch],
                "theta_prime": [t.steps[-1][-1] for t in batch]}[where]
    monkeypatch.setattr(meta, "answers", made_up)
    questions = score.held_out("expr", 4, 8)
    row, batch = meta.outcomes(None, True, questions, "whole")
    assert row == {"theta": [False] * 8, "theta_prime": [True] * 8, "in_context": [True] * 8}
    assert [task.solved for task in batch] == questions
    row, batch = meta.outcomes(None, True, questions, "other")
    said = [task.steps[-1][-1] == task.queries[0].answer for task in batch]
    assert row["theta_prime"] == said and not all(said)
    assert meta.outcomes(None, True, questions[:1], "other") == ({}, [])

@pytest.mark.parametrize("update", ("gradient", "write"))
def test_a_meta_checkpoint_holds_theta_and_what_the_inner_loop_learned(base, tmp_path, exits,
                                                                       update):
    init = f"--init={base / 'ckpt.pt'}"
    summary = a_run("meta", tmp_path, init, f"--update={update}")
    model, inner, c = meta.load_meta(tmp_path / "ckpt.pt")
    names = ["0.up", "0.down", "1.up", "1.down"]
    assert c.steps == 12 and inner.names == names and (inner.K, inner.tau) == (2, c.tau)
    assert summary["rates"] == dict(zip(inner.names, inner.log_alpha.exp().tolist()))
    assert (inner.log_alpha != 0).all() and (inner.matrices is None) == (update == "gradient")
    for name, folder in (("before", base), ("after", tmp_path)):
        theta, _ = train.load_model(folder / "ckpt.pt")
        for n, mode in itertools.product((3, 4, 5, 6), ("trajectory", "direct")):
            right = [score.right(theta, [q], mode)[0] for q in score.held_out("expr", n, 2)]
            assert summary[name]["expr"][str(n)][mode] == sum(right) / 2
    for n, kind in itertools.product((4, 5, 6, 7), meta.KINDS):
        _, batch = meta.outcomes(model, inner, score.held_out("expr", n, 2), kind)
        for where, share in summary["exact_match"]["expr"][str(n)][kind].items():
            said = [meta.answers(model, inner, [task], where) for task in batch]
            right = [[task.queries[0].answer] == answer for task, answer in zip(batch, said)]
            assert share == sum(right) / len(right)
    exits(["not one of meta.py"], meta.load_meta, base / "ckpt.pt")
