"""What loops do again and again, done at once, against the loops."""

import time

import pytest
import torch

from pyro_flowvi._compile.simplify import simplify
from pyro_flowvi._compile.trace import trace
from tests._compile.recorded import check, count, size, with_gradient

aten = torch.ops.aten
STEPS = 9


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(9, 5, dtype=torch.float64)


class TestTypes:
    """Of a stack of numbers the dtype counts more than of each."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
    @pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.int64, torch.bool])
    def test_numbers_beside_arrays(self, dtype, other):
        held = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0, 0.5, 4.0, 1.0, 2.0]).to(other)
        shared, x = torch.tensor(2.0).to(other), torch.linspace(-2.0, 3.0, 9).to(dtype)

        def function(x):
            products = [(x * held[i]) * 2 for i in range(STEPS)]
            numbers = [(x[i] * shared) + held[i] * True for i in range(STEPS)]
            larger = [torch.where(x > held[i], x, shared) for i in range(STEPS)]
            return torch.stack(products), torch.stack(numbers), torch.stack(larger), products[2], numbers[3]

        check(function, x, x.flip(0))

    def test_comparisons(self, x):
        def function(x):
            flags = [(x[i] > 0.0) & (x[i] <= 1) | ~(x[i] >= x[0]) for i in range(STEPS)]
            return (
                torch.stack(flags),
                sum(flag.to(torch.float32) for flag in flags),
                torch.stack([x[i] * flag for i, flag in enumerate(flags)]),
            )

        check(function, x)

    def test_indices(self, x):
        index = torch.arange(9)
        check(
            lambda x: (
                torch.stack([x[index[i]] * (index[i] * 2) for i in range(STEPS)]),
                torch.stack([index[i] * 2 + 1 for i in range(STEPS)]),
                torch.stack([x[:, index[:3] + i - 4].exp() for i in range(4)]),
                torch.stack([x.gather(0, index[None, :5] * 0 + i) * 2.0 for i in range(4)]),
            ),
            x,
        )


class TestShapes:
    def test_arguments_of_lower_rank(self, x):
        wide, column, mask = (
            torch.rand(9, 6, 5).double(),
            torch.rand(6, 1).double(),
            torch.rand(9, 6, 1) > 0.5,
        )

        def function(x):
            rows = [wide[i] * x[i] + column for i in range(STEPS)]
            numbers = [torch.where(mask[i], row, x[i, 0]) * x[0, 1] for i, row in enumerate(rows)]
            return torch.stack(rows), torch.stack(numbers, 1), numbers[-1], sum(n.sum() for n in numbers)

        check(function, x)
        check(with_gradient(lambda x: sum(value.sum() for value in function(x))), x)

    def test_reshapes(self, x):
        def function(x):
            parts = [
                x[i].expand(1, 3, -1)[:, 1:].squeeze(0) * x[i : i + 1].unsqueeze(-1).squeeze(-1)
                + x[i].unsqueeze(-2).view(1, 5).expand(2, -1)
                for i in range(STEPS)
            ]
            return torch.stack(parts), torch.cat(parts, -1).reshape(-1), torch.stack(parts, -1).sum(-1)

        check(function, x)

    def test_one_tensor_reshaped_in_many_words(self, x):
        def function(x):
            y = x.exp()
            ways = [y.view(45, 1), y.view(-1, 1), y.view(45, -1), y.reshape(45).unsqueeze(1)]
            return torch.cat([(way * i).tanh() for i, way in enumerate(ways)]), ways[0]

        check(function, x)

    def test_lists_with_something_empty(self, x):
        empty = torch.zeros(0, dtype=x.dtype)
        check(lambda x: (torch.cat([empty] + [(x[i : i + 2] * 2.0).exp() for i in range(7)], 1),), x)

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_views_of_what_is_put_together(self, x, dim):
        nodes = check(lambda x: (torch.stack([(x[i] * 2.0).exp() for i in range(9)], dim).view(-1) * 2.0,), x)
        assert count(nodes, aten.exp.default) == 1

    def test_reductions_are_not_joined_wrongly(self, x):
        def function(x):
            tops = [x[i].softmax(-1) * x[i].logsumexp(0) + x[i].cumsum(0) * x[i].max() for i in range(STEPS)]
            return torch.stack(tops), sum(t.prod() for t in tops)

        check(with_gradient(lambda x: sum(value.sum() for value in function(x))), x)


class TestOrders:
    @pytest.mark.parametrize(
        "order", [range(9), range(8, -1, -1), [0, 2, 4, 6, 8], [3, 3, 1, 1, 0, 0], [4, 5, 6, 7]]
    )
    def test_members_in_other_orders(self, x, order):
        def function(x):
            first = [(x[i] * 2.0).exp() for i in range(STEPS)]
            second = [first[i] + 1.0 for i in order]
            return (
                torch.stack([first[i] for i in order]),
                torch.cat(second),
                sum(second),
                torch.cat([first[i] for i in order] + [x[0]] + second, -1),
            )

        check(function, x)

    def test_members_that_feed_one_another(self, x):
        def function(x):
            state, states, gaps = x[0], [], []
            for i in range(1, STEPS):
                gaps.append((x[i] - 0.5 * x[i - 1]) ** 2)
                state = (state * 0.5 + x[i]).tanh()
                states.append(state)
            return torch.stack(states), sum(states), sum(gaps)

        nodes = check(function, x)
        assert count(nodes, aten.tanh.default) == STEPS - 1
        assert count(nodes, aten.square.default) == 1
        check(with_gradient(lambda x: sum(value.sum() for value in function(x))), x)

    def test_loops_around_memory(self, x):
        def function(x):
            memory, parts = torch.zeros(10, 5, dtype=x.dtype), []
            memory[0] = 1.0
            for i in range(1, 10):
                parts.append((x[i - 1] * 0.1).exp())
                memory[i] = parts[-1] * memory[i - 1]
                parts.append((memory[i] * 0.1).exp())
            stacked = torch.stack(parts[::2])
            stacked.add_(1.0)
            return memory, stacked, torch.stack(parts), parts[0], sum(parts)

        check(function, x)

    def test_random_draws_keep_their_order(self, x):
        def function(x):
            return torch.stack(
                [(x[i] * torch.randn(5, dtype=x.dtype)).exp() for i in range(STEPS)]
            ), torch.rand(3)

        traced = trace(function, [], [x])
        nodes, held = simplify(traced.graph, [*traced.constants, x], lambda i: False)
        run = torch.fx.GraphModule(torch.nn.Module(), nodes)
        torch.manual_seed(1)
        found = run(*traced.constants, x, *held)
        torch.manual_seed(1)
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, function(x), strict=True))


def test_gradients_of_neighbouring_parts(x):
    """Some of a tensor's parts, twice the same part, parts from the end."""

    def function(x):
        parts = [(x[i] * x[i + 1]).sin() + x[:, 2].sum() + x[-1] for i in range(1, 8)]
        return sum(parts) + x[3] * x[3]

    check(with_gradient(function), x)


@pytest.mark.parametrize("summed", [True, pytest.param(False, marks=pytest.mark.long)])
def test_ten_thousand_operations_take_seconds(summed):
    x = torch.randn(3, 1200, dtype=torch.float64)

    def function(x):
        scale, parts = x[:, 0].exp(), []
        for z in x.unbind(1):
            parts.append(-0.5 * ((z - 1.0) / scale) ** 2 - scale.log())
        return sum(parts) if summed else torch.stack(parts[::-1]).sum(0)

    traced = trace(with_gradient(function), [], [x])
    start = time.perf_counter()
    nodes, _ = simplify(traced.graph, [*traced.constants, x], lambda i: i < len(traced.constants))
    assert time.perf_counter() - start < 20.0
    assert size(nodes) < 60 < 8000 < traced.size
