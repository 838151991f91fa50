"""The inner loop is held to mathematics: an independent slow form, finite differences, and what
must not matter."""
import random

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import meta
import model as theta
from data import arithmetic, text
from data.tasks import Task, sizes_of, tasks_at, tensors
from lab import machine
from lab.flags import flags
from lab.run import load, read_log, save
from model import Config, Model

SMALL = ["--batch=4", "--questions=4", "--threads=1", "--device=cpu"]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

def flat(tensors_):
    return torch.cat([t.flatten() for t in tensors_])

def some_tasks(n=3, support=2, seed=0, domain="sum", operands=4):
    rng, tasks = random.Random(seed), []
    for _ in range(n):
        q = arithmetic.draw(rng, domain, operands)
        thinks = [";".join(steps) for steps in arithmetic.distinct(q, rng, support)]
        tasks.append(Task(q, thinks))
    return tasks

def inner_of(model, K=1, fast="*.up,*.down", alpha=0.05, tau=3.0, weigh=False):
    """An Inner whose rates differ, so that a mix-up of layers or steps shows."""
    inner = meta.Inner(meta.fast_layers(model, fast), K, alpha, tau, weigh).double()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(inner.log_alpha.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        inner.log_alpha += 0.3 * noise
    return inner

def steps_of(support, inner, mode):
    return meta.by_step(support) * inner.K if mode == "step" else None

def dual_loss(model, inner, tasks, order=2, mode="whole"):
    """L_q(theta') of every question by the dual form, all side by side."""
    support, query = tensors(tasks)
    steps, pairs = steps_of(support, inner, mode), [(support.ids, support.inner)]
    fast, _ = meta.adapt(model, inner, pairs, len(tasks), steps, order)
    h = model(query.ids, hook=fast, plain_from=0)
    return model.score(h, query.targets).sum(1)

def primal_loss(model, inner, tasks, mode="whole", create_graph=True):
    """The same by weights written out, one question after the other."""
    losses = []
    for task in tasks:
        support, query = tensors([task])
        steps = steps_of(support, inner, mode)
        pairs = [(support.ids, support.inner)]
        weights = meta.theta_prime(model, inner, pairs, steps, create_graph)
        h = functional_call(model, weights, (query.ids,), {"plain_from": 0})
        losses.append(model.score(h, query.targets).sum())
    return torch.stack(losses)

def everything(model, inner):
    return [*model.parameters(), inner.log_alpha]

def gradient(loss, model, inner):
    return flat(torch.autograd.grad(loss, everything(model, inner), materialize_grads=True))


# -------------------------------------------------------------------------- the inner loop (Eq. 4)

@pytest.mark.parametrize("K,support,fast,mode", [
    (1, 1, "*.up,*.down", "whole"), (2, 2, "*.up,*.down", "whole"), (3, 2, "*.up,*.down", "whole"),
    (1, 2, "1.qkv,*.out,2.up", "whole"), (2, 1, "*", "whole"), (1, 1, "*.down", "step"),
    (2, 2, "*.up", "step")])
def test_dual_equals_primal_losses_and_meta_gradients(tiny, K, support, fast, mode):
    inner, tasks = inner_of(tiny, K, fast, weigh=True), some_tasks(support=support)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        noise = torch.rand(text.VOCAB, generator=generator, dtype=torch.float64)
        inner.weight += 0.2 * noise
    a = dual_loss(tiny, inner, tasks, mode=mode)
    b = primal_loss(tiny, inner, tasks, mode)
    still = dual_loss(tiny, inner_of(tiny, K, fast, alpha=1e-12), tasks, mode=mode)
    assert (a - still).abs().min() > 1e-4           # every question's loss was moved
    close(a, b)
    close(gradient(a.sum(), tiny, inner), gradient(b.sum(), tiny, inner))


@pytest.mark.parametrize("K", (1, 2))
def test_fomaml_takes_the_update_for_a_constant(tiny, K):
    """Its gradient is that of L_q at theta', theta' - theta moving with the rates only."""
    inner, tasks = inner_of(tiny, K), some_tasks()
    a = dual_loss(tiny, inner, tasks, order=1)
    b = primal_loss(tiny, inner, tasks, create_graph=False)
    close(a, b)
    close(gradient(a.sum(), tiny, inner), gradient(b.sum(), tiny, inner))


def shift(parameters, direction, by):
    with torch.no_grad():
        for p, d in zip(parameters, direction):
            p += by * d

def directional(model, inner, tasks, order):
    """The meta-gradient along a random direction: from autograd, and from central differences of
    the loss.

    h is small because theta' jumps where theta makes a ReLU flip: on that set of measure zero there
    is no derivative to find."""
    generator, parameters, h = torch.Generator().manual_seed(3), everything(model, inner), 1e-7
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64)
                 for p in parameters]
    exact = gradient(dual_loss(model, inner, tasks, order).sum(), model, inner) @ flat(direction)
    values = []
    for sign in (1, -1):
        shift(parameters, direction, sign * h)
        values.append(float(dual_loss(model, inner, tasks, order=1).sum().detach()))
        shift(parameters, direction, -sign * h)
    return float(exact), (values[0] - values[1]) / (2 * h)

@pytest.mark.parametrize("K", (1, 2))
def test_meta_gradient_equals_finite_differences_and_fomaml_fails_that_test(tiny, K):
    inner, tasks = inner_of(tiny, K), some_tasks()
    exact, measured = directional(tiny, inner, tasks, order=2)
    assert abs(exact - measured) < 1e-6 * abs(measured), (exact, measured)
    first, measured = directional(tiny, inner, tasks, order=1)
    assert abs(first - measured) > 1e-3 * abs(measured), (first, measured)


def test_blocks_that_are_differentiated_twice_are_plain_where_others_are_fused(tiny, monkeypatch):
    """As on CUDA, where None means fused, which has no double backward."""
    inner, tasks, fused = inner_of(tiny, 2, "1.down,2.up"), some_tasks(), []
    expected = dual_loss(tiny, inner, tasks)
    attention = theta.attention

    def as_on_cuda(q, k, v, bias=None, plain=None):
        fused.append(not plain)
        return attention(q, k, v, bias, bool(plain))
    monkeypatch.setattr(theta, "attention", as_on_cuda)
    loss, _ = meta.meta_loss(tiny, inner, meta.Meta(joint=0.0), tasks)
    assert fused[:6] == [True, False, False] * 2    # two inner steps; then the query
    loss = loss * sizes_of(tasks).answer_tokens
    close(loss, expected.sum())
    close(gradient(loss, tiny, inner), gradient(expected.sum(), tiny, inner))


def test_the_inner_loss_is_the_weighed_nll_at_its_temperature(tiny):
    inner, tasks = inner_of(tiny, tau=3.0, weigh=True), some_tasks(2)
    with torch.no_grad():
        inner.weight.copy_(torch.linspace(0, 2, text.VOCAB))
    support, _ = tensors(tasks)
    h = tiny(support.ids)
    logp = (tiny.logits(h) / 3.0).log_softmax(-1)
    expected = 0
    for row, targets in zip(logp, support.inner):
        for at, target in enumerate(targets.tolist()):
            if target >= 0:
                expected = expected - inner.weight[target] * row[at, target]
    close(inner.loss(tiny, h, support.inner), expected)


def test_steps_of_the_inner_loop_are_those_of_the_trajectory():
    """Each with its closing ; or </think>, one after the other, nothing twice."""
    tasks = [Task(arithmetic.parse("(3+5)*2"), ["3+5=8;8*2=16"]),
             Task(arithmetic.parse("9-4"), ["9-4=5"])]
    support, _ = tensors(tasks)
    spelt = []
    for targets in meta.by_step(support):
        spelt.append([text.decode(row[row >= 0].tolist()) for row in targets])
    assert spelt == [["3+5=8;", "9-4=5</think>"], ["8*2=16</think>", ""]]


def test_fast_layers_are_those_that_every_pattern_names(tiny):
    """In the model's order; of anil, those of the last block."""
    assert meta.fast_layers(tiny, "2.up,0.*") == ["0.qkv", "0.out", "0.up", "0.down", "2.up"]
    assert meta.fast_layers(tiny, "*.up,*.out", "anil") == ["2.out", "2.up"]
    with pytest.raises(ValueError, match="no layer matches '9.up'"):
        meta.fast_layers(tiny, "*.up,9.up")
    with pytest.raises(ValueError, match="anil"):
        meta.fast_layers(tiny, "0.up", "anil")


def test_alpha_zero_gives_the_plain_gradient(tiny):
    tasks = some_tasks()
    _, query = tensors(tasks)
    inner = meta.Inner(meta.fast_layers(tiny, "*"), alpha=0.0).double()
    plain = tiny.nll(query.ids, query.targets).sum()
    adapted = dual_loss(tiny, inner, tasks).sum()
    parameters = list(tiny.parameters())
    expected = torch.autograd.grad(plain, parameters)
    for a, b in zip(expected, torch.autograd.grad(adapted, parameters)):
        close(a, b, 1e-12)


def test_one_question_never_touches_another_and_padding_changes_nothing(tiny):
    inner, tasks = inner_of(tiny, 2), some_tasks(4)
    for task in some_tasks(1, seed=9):              # another length, so another padding
        tasks.append(Task(task.question, [think[:9] for think in task.thinks]))
    together = dual_loss(tiny, inner, tasks)
    close(together, torch.cat([dual_loss(tiny, inner, [task]) for task in tasks]))
    changed = dual_loss(tiny, inner, [tasks[0], *some_tasks(3, seed=7), tasks[4]])
    close(together[[0, 4]], changed[[0, 4]])
    assert (together[1:4] - changed[1:4]).abs().min() > 1e-6


def test_the_answer_behind_the_trajectory_never_reaches_theta_prime(tiny):
    inner, tasks = inner_of(tiny), some_tasks(1)
    support, query = tensors(tasks)
    answer = (support.section == 2) & (support.ids != text.END_THINK)
    changed = support.ids.masked_fill(answer, text.encode("7")[0])
    assert not torch.equal(changed, support.ids)
    results = []
    for ids in (support.ids, changed):
        fast, _ = meta.adapt(tiny, inner, [(ids, support.inner)], 1)
        results.append(tiny.nll(query.ids, query.targets, hook=fast))
    assert torch.equal(*results)


def test_token_updates_with_a_causal_mask_are_the_theta_prime_of_every_prefix(tiny):
    """One pass under the mask against an inner loop run anew on every prefix (D local: a token's
    update knows no later token)."""
    inner, tasks = inner_of(tiny, alpha=0.3), some_tasks(1, support=1)
    support, query = tensors(tasks)
    first = len(text.prompt(tasks[0].question.text)) - 1    # where t's first token is a target
    n, T = len(tasks[0].thinks[0]), query.ids.size(1)
    fast, _ = meta.adapt(tiny, inner, [(support.ids, support.inner)], 1, local=True)
    prefix = torch.arange(n + 1).repeat_interleave(T)
    fast.seen = (torch.arange(support.ids.size(1)) < first + prefix[:, None])[None]
    ids, targets = query.ids.expand(n + 1, T), query.targets.expand(n + 1, T)
    together = tiny.nll(ids, targets, hook=fast).sum(1)
    for i in range(n + 1):
        only = support.inner.clone()
        only[:, first + i:] = text.IGNORE
        fast, _ = meta.adapt(tiny, inner, [(support.ids, only)], 1, local=True)
        close(together[i], tiny.nll(query.ids, query.targets, hook=fast).sum())
    assert (together[1:] - together[0]).abs().min() > 1e-6


class Largest(TorchDispatchMode):
    """How large the largest tensor is that any operation returns."""
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return out

def test_nothing_of_size_questions_x_parameters_is_allocated():
    """In a whole second-order meta-step, where questions x parameters is far above its tensors."""
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=2, heads=2, width=64))
    tasks = some_tasks(40, support=1, operands=3)
    inner = meta.Inner(meta.fast_layers(model, "*.up,*.down"))
    fast_parameters = 2 * 2 * 4 * 64 * 64
    with Largest() as largest:
        meta.meta_loss(model, inner, meta.Meta(), tasks)[0].backward()
    assert 0 < largest.numel < 40 * fast_parameters / 5


# -------------------------------------------------------------------------- the outer loop (Eq. 8)

def test_reptile_with_one_step_points_along_sgd(tiny):
    """theta - theta' after one step at rate 1 is the gradient of the task's own loss."""
    tasks = some_tasks(support=1)
    inner = meta.Inner(meta.fast_layers(tiny, "*"), alpha=1.0, tau=3.0).double()
    c = meta.Meta(algo="reptile", joint=0.0)
    loss, _ = meta.meta_loss(tiny, inner, c, tasks, order=1)
    loss.backward()
    inside = [(n, p) for n, p in tiny.named_parameters() if n.startswith("blocks.")]
    moves = {name: p.grad.clone() for name, p in inside}
    tiny.zero_grad()
    support, query = tensors(tasks)
    own = tiny.score(tiny(support.ids), support.inner, 3.0).sum()
    own = own + tiny.score(tiny(query.ids), query.targets, 3.0).sum()
    (own / len(tasks)).backward()
    for name, p in inside:
        close(moves[name], p.grad)


@pytest.mark.parametrize("algo", ["maml", "reptile", "none"])
def test_gradients_stay_in_float32_where_bfloat16_is_computed(tiny, algo):
    tasks, c, model = some_tasks(support=1), meta.Meta(algo=algo), tiny.float()
    exact, rough = [], []
    for dtype, left in ((None, exact), (torch.bfloat16, rough)):
        model.zero_grad()
        with machine.computing_in(model, dtype):
            meta.meta_loss(model, inner_of(model).float(), c, tasks, order=1)[0].backward()
        left.extend(p.grad for p in model.parameters())
    assert all(g.dtype == torch.float32 for g in rough)
    assert torch.cosine_similarity(flat(exact), flat(rough), dim=0) > 0.99


def test_context_gradients_full_and_detached_differ_only_behind_the_trajectory(tiny):
    """The same loss; not the same gradient."""
    tasks, losses, gradients = some_tasks(support=1), [], []
    for how in ("full", "detached"):
        tiny.zero_grad()
        c = meta.Meta(algo="none", context_grad=how, joint=1.0)
        loss, numbers = meta.meta_loss(tiny, inner_of(tiny), c, tasks, order=1)
        loss.backward()
        losses.append(numbers["joint"])
        gradients.append(tiny.blocks[0].qkv.weight.grad.clone())
    close(*losses)
    assert (gradients[0] - gradients[1]).norm() > 1e-3 * gradients[0].norm()


@pytest.mark.parametrize("algo,order", [("maml", 2), ("fomaml", 1), ("anil", 2), ("none", 1)])
def test_the_meta_objective_is_the_mean_answer_loss_and_the_mean_in_context_loss(tiny, algo, order):
    """L_q(theta'), or L_q(theta) without an inner loop, + joint * L(theta)."""
    c, inner, tasks = meta.Meta(algo=algo, joint=0.7), inner_of(tiny, 2), some_tasks()
    loss, numbers = meta.meta_loss(tiny, inner, c, tasks, order=order)
    support, query = tensors(tasks)
    L_q = tiny.nll(query.ids, query.targets)
    if algo != "none":
        L_q = dual_loss(tiny, inner, tasks)
    L_q = L_q.sum() / (query.targets >= 0).sum()
    joint = tiny.nll(support.ids, support.joint).sum() / (support.joint >= 0).sum()
    close(numbers["L_q"], L_q.detach())
    close(numbers["joint"], joint.detach())
    close(loss, L_q + 0.7 * joint)


def test_answers_after_earlier_inner_steps_count_with_their_weight(tiny):
    """MAML++: those of every theta' on the way, and the last whole."""
    tasks, tokens = some_tasks(), sizes_of(some_tasks()).answer_tokens
    inner = inner_of(tiny, 3)
    loss, _ = meta.meta_loss(tiny, inner, meta.Meta(msl=0.4, joint=0.0), tasks)
    expected = 0
    for K, weight in ((1, 0.4), (2, 0.4), (3, 1.0)):
        fewer = meta.Inner(inner.names, K, tau=inner.tau).double()
        with torch.no_grad():
            fewer.log_alpha.copy_(inner.log_alpha[:, :K])
        expected = expected + weight * dual_loss(tiny, fewer, tasks).sum() / tokens
    close(loss, expected)


def summed(model, inner, c, parts, sizes):
    """The gradient that parts of a batch leave behind each other, and their numbers."""
    model.zero_grad()
    order, totals = 2 if c.algo == "maml" else 1, {"L_q": 0.0, "joint": 0.0}
    for part in parts:
        loss, numbers = meta.meta_loss(model, inner, c, part, order=order, sizes=sizes)
        loss.backward()
        for name in totals:
            totals[name] += float(numbers[name])
    return flat([p.grad for p in model.parameters()]), totals

@pytest.mark.parametrize("algo", ["maml", "reptile", "none"])
def test_parts_of_a_batch_add_up_to_it(tiny, algo):
    """What chunks and several processes rest on: means are taken over the whole batch."""
    c, inner, tasks = meta.Meta(algo=algo), inner_of(tiny), []
    for n in (2, 3, 4):
        (task,) = some_tasks(1, 1, n, operands=n)
        tasks.append(task._replace(whole=n > 2))
    sizes = sizes_of(tasks)
    whole, numbers = summed(tiny, inner, c, [tasks], sizes)
    parts, same = summed(tiny, inner, c, [tasks[:1], tasks[1:]], sizes)
    close(whole, parts)
    assert numbers == pytest.approx(same, abs=1e-12)


class Steps:
    """Stands for a run of some steps on a CPU."""
    device = torch.device("cpu")

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))

@pytest.mark.parametrize("algo,orders", [("maml", [1, 1, 2, 2]), ("anil", [1, 1, 2, 2]),
                                         ("fomaml", [1] * 4), ("reptile", [1] * 4),
                                         ("none", [1] * 4)])
def test_meta_steps_leave_clipped_gradients_of_the_order_that_is_due(tiny, monkeypatch, algo,
                                                                     orders):
    """First order throughout, or for a first share of the steps."""
    c = meta.Meta(algo=algo, first_order=0.5, steps=4, batch=3, chunks=2, clip=0.01)
    inner, seen, real = inner_of(tiny), [], meta.meta_loss
    learned = [] if algo in ("none", "reptile") else [inner.log_alpha]

    def meta_loss(model, inner, c, tasks, device, order, sizes):
        seen.append((order, len(tasks), sizes.questions))
        return real(model, inner, c, tasks, device, order, sizes)
    monkeypatch.setattr(meta, "meta_loss", meta_loss)
    for numbers in meta.meta_steps(c, tiny, inner, learned, Steps(4)):
        left = flat([p.grad for p in [*tiny.parameters(), *learned]])
        assert numbers["norm"] > 0.01
        assert float(left.norm()) == pytest.approx(0.01, rel=1e-3)
        tiny.zero_grad()
        inner.zero_grad()
    parts = [[(order, 2, 3), (order, 1, 3)] for order in orders]
    assert seen == sum(parts, [])


def test_tasks_are_a_function_of_seed_and_step_and_copying_solves_few():
    c = meta.Meta(batch=600, further=0.5, cut=0.9)
    assert tasks_at(3, c) == tasks_at(3, c) != tasks_at(4, c)
    tasks, copied = tasks_at(3, c), 0
    further = [task for task in tasks if task.solved != task.question]
    assert len(further) / 600 == pytest.approx(0.5, abs=0.06)
    for task in further:
        assert task.whole and task.solved == arithmetic.part(task.question)
    for task in tasks:
        for think in task.thinks:
            ends = bool(arithmetic.check(task.solved, think)[-1:] == [True])
            assert ends or not task.whole
            copied += think.endswith(f"={task.question.answer}")
    assert sum(not task.whole for task in tasks) / 600 == pytest.approx(0.45, abs=0.06)
    assert copied / 600 < 0.1


def test_a_task_of_another_question_is_read_behind_that_and_asked_as_itself(tiny):
    """Rows by hand: the support set knows nothing of what is asked, the query nothing of what is
    solved."""
    q, solved = arithmetic.parse("((3+5)*2)-4"), arithmetic.parse("(3+5)*2")
    support, query = tensors([Task(q, ["3+5=8;8*2=16"], solved=solved)])
    assert text.decode(support.ids[0].tolist()) == "<bos>(3+5)*2<think>3+5=8;8*2=16</think>16"
    assert text.decode(query.ids[0].tolist()) == "<bos>((3+5)*2)-4<think></think>12"
    learned = support.inner[0][support.inner[0] >= 0].tolist()
    assert text.decode(learned) == "3+5=8;8*2=16</think>"
    assert sizes_of([Task(q, ["3+5=8;8*2=16"], solved=solved)]) == (1, 3, len("3+5=8;8*2=16") + 4)


# -------------------------------------------------------------------------------------- meta-test

def greedy(model, weights, head):
    """Four tokens, or fewer before <eos>, of a model with these weights, without a cache."""
    ids = list(head)
    for _ in range(4):
        h = functional_call(model, weights, (torch.tensor([ids]),))
        new = int(model.logits(h[:, -1]).argmax())
        if new == text.EOS:
            break
        ids.append(new)
    return text.decode(ids[len(head):])

@pytest.mark.parametrize("mode", ("whole", "step"))
def test_answers_come_from_theta_from_theta_prime_or_from_the_context(tiny, mode):
    """Batched and cached, against one question at a time with its weights written out."""
    inner, tasks = inner_of(tiny, alpha=0.5), some_tasks(6)
    expected = {"theta": [], "theta_prime": [], "in_context": []}
    for task in tasks:
        support, _ = tensors([task])
        pairs, steps = [(support.ids, support.inner)], steps_of(support, inner, mode)
        moved, q = meta.theta_prime(tiny, inner, pairs, steps), task.question.text
        expected["theta"].append(greedy(tiny, {}, text.prompt(q, "")))
        expected["theta_prime"].append(greedy(tiny, moved, text.prompt(q, "")))
        expected["in_context"].append(greedy(tiny, {}, text.prompt(q, task.thinks[0])))
    questions = [task.question for task in tasks]
    for where, answers in expected.items():
        thinks = [task.thinks[0] if where == "in_context" else task.thinks for task in tasks]
        assert meta.answers(tiny, questions, thinks, inner, where, mode, size=4) == answers
    assert expected["theta"] != expected["theta_prime"] != expected["in_context"]


def test_trials_are_what_their_conditions_say():
    """-> the trajectory, the question that it solves, and the answer that it implies."""
    rng, questions = random.Random(0), [task.question for task in some_tasks(20)]
    for q in questions:
        less = arithmetic.part(q)
        shown = {condition: meta.trial(q, questions, condition, rng)
                 for condition in meta.CONDITIONS if condition != "own"}
        whole, solved, answer = shown["whole"]
        assert solved == q and answer is None and all(arithmetic.check(q, whole))
        for condition, missing in (("cut", 1), ("cut2", 2)):
            cut, _, answer = shown[condition]
            assert answer is None
            assert cut.endswith("=") and cut.count(";") == 3 - missing
            assert all(arithmetic.check(q, cut)[:-1])
        other, _, answer = shown["other"]
        assert answer != q.answer and other.endswith(f"={answer}")
        for condition, sound in (("corrupted_early", (0, 1)), ("corrupted_last", (2,))):
            wrong, _, answer = shown[condition]
            assert answer != q.answer and wrong.endswith(f"={answer}")
            assert sum(arithmetic.check(q, wrong)) in sound
        further, solved, answer = shown["further"]
        assert solved == less and answer == less.answer and all(arithmetic.check(less, further))
        other, solved, answer = shown["further_other"]
        assert solved.answer != less.answer and answer is None
        assert all(arithmetic.check(solved, other))
        wrong, solved, answer = shown["further_wrong"]
        assert solved == less and not arithmetic.check(less, wrong)[-1]
        result = int(wrong.rpartition("=")[2])
        assert int(answer) == result + q.state[-1] != int(q.answer)
    two = arithmetic.parse("3+4")
    assert meta.trial(two, questions, "corrupted_early", rng) is None
    assert meta.trial(two, questions, "cut2", rng) is None
    assert meta.trial(two, questions, "further", rng) is None
    q = arithmetic.parse("9-(2*(1+3))")
    assert arithmetic.onward(q, 5) == "4" and arithmetic.onward(q, 10) is None


def made_up(model, questions, thinks, inner, where, mode, solved):
    """In a model's place: theta knows nothing, theta' what it was told, the context the truth."""
    if where == "theta":
        return [""] * len(questions)
    if where == "theta_prime":
        return [think.rpartition("=")[2] for think in thinks]
    return [q.answer for q in questions]

def test_outcomes_are_right_answers_and_those_that_a_misleading_trajectory_implies(tiny,
                                                                                   monkeypatch):
    """Of eight questions; its own trajectories only where the model wrote some that can be read."""
    questions = [task.question for task in some_tasks(8)]
    monkeypatch.setattr(meta, "answers", made_up)
    yes, no, inner = [True] * 8, [False] * 8, inner_of(tiny)
    plain = {"theta": no, "theta_prime": yes, "in_context": yes}
    assert meta.outcomes(tiny, inner, questions, "whole") == plain
    known = {q: q.answer for q in questions}
    known = meta.outcomes(tiny, inner, questions, "whole", at_theta=known)
    assert known == plain | {"theta": yes}
    misled = {"theta": no, "theta_prime": no, "in_context": yes, "implied": yes,
              "implied_in_context": no}
    assert meta.outcomes(tiny, inner, questions, "further") == misled
    assert meta.outcomes(tiny, inner, questions, "further_wrong") == {**misled, "implied": no}
    assert meta.outcomes(tiny, inner, questions, "other") == misled
    assert meta.outcomes(tiny, inner, questions, "corrupted_last") == misled
    assert meta.outcomes(tiny, None, questions, "whole") == {"theta": no, "in_context": yes}
    written = ["1+1=2", "", "no</think>", *["3=3"] * 5]
    own = meta.outcomes(tiny, inner, questions, "own", written=written)
    assert own["theta"] == [False] * 6
    assert meta.outcomes(tiny, inner, questions, "own", written=[""] * 8) == {}


# ------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "ckpt.pt"
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=2, heads=2, width=16))
    save(path, model=model.state(), step=0, config={})
    return path


@pytest.mark.parametrize("args,word", [
    (["--K=0"], "--K"), (["--fast=9.up"], "9.up"), (["--support=99"], "distinct"),
    (["--algo=maml2"], "algo"), (["--algo=anil", "--fast=0.up"], "anil"),
    (["--operands=3,x"], "operands"), (["--operands=9"], "9"), (["--operands=3,,4"], "operands"),
    (["--init=/nowhere/ckpt.pt"], "nowhere"), (["--tau=0"], "--tau"),
    (["--operands=2"], "operation")])
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, tmp_path, args, word, refused):
    out = tmp_path / "run"
    init = [] if args[0].startswith("--init") else [f"--init={checkpoint}"]
    refused(meta, [f"--out={out}", *init, *SMALL, *args], [word])
    assert not out.exists()


def test_a_meta_checkpoint_holds_theta_and_its_rates(checkpoint, tmp_path, exits):
    out, args = tmp_path / "run", ["--steps=3", "--K=2", "--weigh", "--unclosed", *SMALL]
    meta.meta(*flags(meta.Meta, [f"--init={checkpoint}", f"--out={out}", *args]))
    model, inner, state = meta.load_meta(out / "ckpt.pt")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["model"]["weights"][name])
    assert torch.equal(inner.log_alpha, state["extra"]["log_alpha"])
    assert torch.equal(inner.weight, state["extra"]["weight"])
    assert (inner.log_alpha != 0).all()
    assert inner.K == 2 and inner.tau == 10
    exits(["not one of meta.py"], meta.load_meta, checkpoint)


def test_divergence_stops_a_run_and_keeps_the_last_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "wild"
    args = [f"--init={checkpoint}", f"--out={out}", "--steps=30", "--save_every=1", "--lr=1e9",
            "--lr_adam=1e9", *SMALL]
    with pytest.raises(SystemExit) as e:
        meta.meta(*flags(meta.Meta, args))
    err = capsys.readouterr().err
    assert e.value.code == 1
    for word in ("not finite", "step", "rate", str(out / "ckpt.pt")):
        assert word in err
    last = load(out / "ckpt.pt")
    assert last["step"] == len(read_log(out)) < 30
    for weight in last["model"]["weights"].values():
        assert weight.isfinite().all()
