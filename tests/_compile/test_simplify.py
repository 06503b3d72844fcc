"""Simplified graphs against the functions that they are of, at other points than those of the recording."""

import time

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowvi._compile.run_by_operation import by_operation
from pyro_flowvi._compile.simplify import let_views_copy, simplify
from pyro_flowvi._compile.trace import trace
from tests._compile.recorded import check, count, size, with_gradient

aten = torch.ops.aten


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4, dtype=torch.float64)


def squeezed(memory, x):
    memory.view(1, 3, 4).squeeze().add_(x)


def unfolded(memory, x):
    memory[0].unfold(0, 2, 2)[1].add_(x[0, :2])


def strided(memory, x):
    memory.as_strided((3,), (4,)).mul_(x[:, 0])


def by_keyword(memory, x):
    torch.add(x, 1.0, out=memory)


def two_at_once(memory, x):
    torch._foreach_add_([memory[0], memory[1]], [x[0], x[1]])


def by_index(memory, x):
    memory[torch.tensor([2, 0])] = x[:2]
    memory[memory == 0.0] = 2.0


def turned(memory, x):
    memory.t()[1:, 2].copy_(x[0, 1:])
    memory.diagonal().fill_(3.0)


def indirectly(memory, x):
    memory.add_(x).mul_(2.0).clamp_(-1.0, 1.0)


WRITES = [squeezed, unfolded, strided, by_keyword, two_at_once, by_index, turned, indirectly]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("fresh", [True, False])
def test_memory_read_before_and_after_it_is_written(x, write, fresh):
    def function(x):
        memory = torch.zeros(3, 4, dtype=x.dtype) if fresh else x * 1.0
        view, before = memory[1:], memory.exp()
        write(memory, x + 1.0)
        return view * 1.0, before, memory.exp(), memory + 0.0, view.sum(0, keepdim=True)

    if fresh or write is not by_index:  # a mask of arguments has no static shape
        check(function, x)


@pytest.mark.parametrize("frozen", [True, False])
def test_constants_that_share_memory_with_one_that_changes(x, frozen):
    held = torch.zeros(3, 4, dtype=x.dtype)
    view = held[1]

    def function(x):
        view.copy_(x[0])
        return held.exp() * x, view * 2.0

    traced = trace(function, [], [x])
    kept = held.clone()
    run = by_operation(traced.graph, traced.constants, [x], frozen=len(traced.constants) if frozen else 0)
    assert torch.equal(held, kept), "simplifying runs the graph, but not on the program's own memory"
    found = [value.clone() for value in run(x + 1.0)]
    assert torch.equal(held[1], x[0] + 1.0)
    assert all(torch.equal(a, b) for a, b in zip(found, function(x + 1.0), strict=True))


def test_arguments_stay_as_they_are(x):
    def function(x):
        one, other, wide = x * 1.0, x.clone(), x[:1].expand(3, 4) * 1
        one.add_(1.0)
        other[0] = 2.0
        wide[1] = 3.0
        return one, other, wide, x

    check(function, x)


def test_results_of_operations_of_many_results(x):
    def function(x):
        values, order = (2.0 * x).sort(-1)
        values[0] = 1.0
        return values, order, *torch.max(x, 0), *torch.linalg.eigh(x @ x.mT + torch.eye(3, dtype=x.dtype))[:1]

    check(function, x)


class TestTypes:
    def test_powers_and_sums_that_change_them(self):
        whole, flags = torch.arange(4), torch.tensor([True, False])
        nodes = check(lambda x: (x**2.0, x**2, x * 1, x * 1.0, x / 1, x + 0, x + 0.0), whole, whole + 3)
        assert count(nodes, aten.mul.Tensor) == 1
        check(lambda x: (x.view(1, 2).sum(0), x.sum(0), x**2, x * True, x + False), flags, ~flags)
        check(
            lambda x: (x.int().view(1, 4).sum(0), x.view(1, 4).sum(0, dtype=torch.float32)), whole, whole + 1
        )

    def test_a_number_counts_less_than_an_array(self):
        number, short = torch.tensor(2.0, dtype=torch.float64), torch.randn(3)
        check(lambda x: (number.expand(3) * x, x + number, x * number.expand(1)), short, short + 1.0)
        check(lambda x: (x[0].double().expand(3) * x, x[0].double() * x), short, short + 1.0)
        check(lambda x: (number.expand(3).clone() * x.long(), x.long() * number), short, short + 3.0)

    def test_chains_of_flags_and_short_integers(self):
        x = torch.tensor([1.0, 5.0, 9.0])
        check(lambda x: (sum([x > i for i in range(1, 9)], x > 9.0),), x, x + 2.0)
        check(lambda x: (sum([x.int() * i for i in range(1, 12)], x.int()),), x, x + 2.0)

    def test_numbers_that_are_equal_in_python(self, x):
        whole = torch.arange(3)
        check(lambda x: (x.clamp(0, 1), x.clamp(0.0, 1.0), x + True, x + 1, x + 1.0), whole, whole - 1)
        check(lambda x: (x.sum(0, True), x.sum(0, False), x.std(0), x.std(0, correction=0)), x)
        check(lambda x: (torch.add(x, x, alpha=2), torch.add(x, x), torch.rsub(x, 1.0, alpha=2)), x)
        check(
            lambda x: (aten.add.Scalar(x, 2.0, 3), aten.sub.Scalar(x, 2.0, 3), aten.add.Scalar(x, 0.0, 3)), x
        )


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0, 2), (1, 1)])
def test_small_shapes(shape):
    x, held = torch.ones(shape, dtype=torch.float64), torch.full(shape, 2.0, dtype=torch.float64)

    def function(x):
        parts = [(x * i).exp() for i in range(9)]
        return (
            x.sum(-1),
            x.sum(),
            x.sum(-1, keepdim=True),
            x * held.exp() + held * 1.0,
            sum(parts),
            torch.stack(parts).sum(0),
            torch.cat([p.reshape(-1) for p in parts]),
            x * torch.ones(shape, dtype=x.dtype),
        )

    check(with_gradient(lambda x: sum(value.sum() for value in function(x))), x)
    check(function, x)


def test_what_is_not_a_number_and_signs_of_zero():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, -float("inf")], dtype=torch.float64)

    def function(x):
        return x * 0.0, 0.0 * x + 1.0, x - x, x * odd, odd * 0.0 + x, x / 1.0, x - 0.0, (x * 1.0).reciprocal()

    check(function, x, odd)


def test_results_that_are_arguments_constants_or_one_another(x):
    held = torch.ones(3, dtype=x.dtype)
    check(lambda x: (x, x, held, held.exp(), held.expand(2, 3), x.detach(), x * 1.0, x.view(3, 4)), x)


@pytest.mark.parametrize(
    "fold", [torch.exp, lambda held: held.exp().expand(2, 3), lambda held: held.exp()[1:]]
)
def test_folded_results_are_the_callers_own(x, fold):
    """Changed by a caller, they are whole again at the next call."""
    held = torch.ones(3, dtype=x.dtype)
    traced = trace(lambda x: (fold(held), x + 1.0), [], [x])
    run = by_operation(traced.graph, traced.constants, [x], frozen=len(traced.constants))
    run(x)[0].zero_()
    assert torch.equal(run(x)[0], fold(held))


def test_checks_stay_but_for_those_of_constants():
    held, x = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    nodes = check(lambda x: (torch.linalg.cholesky(x), torch.linalg.cholesky(held) + x), x, 2.0 * x)
    assert count(nodes, aten.linalg_cholesky_ex.default) == 1
    traced = trace(lambda x: (torch.linalg.cholesky(x),), [], [x])
    run = by_operation(traced.graph, traced.constants, [x])
    with pytest.raises(torch.linalg.LinAlgError):
        run(-x)


def test_what_is_not_the_same_is_not_taken_for_it(x):
    """Arguments in another order, other keywords, other types."""
    nodes = check(
        lambda x: (
            torch.where(x > 0, x, 0.0),
            torch.where(x > 0, 0.0, x),
            x.std(0, correction=0),
            x.std(0, correction=1),
            x.to(torch.float32),
            x.to(torch.float16).float(),
            x - x.exp(),
            x.exp() - x,
        ),
        x,
    )
    assert count(nodes, aten.exp.default) == count(nodes, aten.gt.Scalar) == 1


@pytest.mark.parametrize(
    "kind",
    [
        "chain",
        pytest.param("rows", marks=pytest.mark.long),
        pytest.param("recurrence", marks=pytest.mark.long),
    ],
)
def test_long_programs_take_seconds(kind):
    def function(x):
        memory, state = torch.zeros(2500, 4, dtype=x.dtype), x[0]
        for t in range(2500):
            if kind == "rows":
                memory[t] = x[0] * (t + 1.0)
            elif kind == "chain":
                memory.add_(x[0])
            else:
                state = (0.9 * state + x[t % 3]).tanh() - 0.1 * state
        return (memory.sum(0) + state,)

    x = torch.ones(3, 4, dtype=torch.float64)
    traced = trace(function, [], [x])
    start = time.perf_counter()
    nodes, _ = simplify(traced.graph, [*traced.constants, x], lambda i: i < len(traced.constants))
    assert size(nodes) > 2500
    assert time.perf_counter() - start < 15.0


def test_views_may_copy_where_nothing_is_written():
    def function(x, y):
        kept, changed = x.exp().view(6), y.sin()
        changed.view(6).add_(1.0)
        return kept, changed

    graph = make_fx(function)(torch.randn(2, 3), torch.randn(2, 3))
    let_views_copy(graph.graph)
    graph.recompile()
    kinds = [
        str(node.target)
        for node in graph.graph.nodes
        if "view" in str(node.target) or "reshape" in str(node.target)
    ]
    assert kinds == ["aten.reshape.default", "aten.view.default"]
    x, y = torch.randn(3, 2).T, torch.randn(2, 3)  # of which the exponential function has no such view
    kept, changed = graph(x, y)
    assert torch.equal(kept, x.exp().reshape(6))
    assert torch.equal(changed, y.sin() + 1)
