"""Recorded graphs, simplified and with what repeats done at once, against the functions that they are of."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from pyro_flowvi._compile.errors import CannotCompile
from pyro_flowvi._compile.run_by_operation import by_operation
from pyro_flowvi._compile.trace import trace
from tests._compile.recorded import check, count, with_gradient

aten = torch.ops.aten


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 20, dtype=torch.float64)


class TestSimplify:
    def test_constants_are_folded_and_no_ops_left_out(self, x):
        scale = torch.rand(20, dtype=torch.float64)

        def function(x):
            return ((x * 1.0 + 0.0) * scale.exp().log1p() + scale.exp().log1p().sum(),)

        nodes = check(function, x)
        assert count(nodes, aten.exp.default, aten.log1p.default, aten.sum.default) == 0
        assert count(nodes, aten.mul.Tensor, aten.add.Tensor) == 2

    def test_repetitions_are_done_once(self, x):
        nodes = check(lambda x: (x.exp().sum(-1) + x.exp().sum(-1), x.exp()), x)
        assert count(nodes, aten.exp.default) == count(nodes, aten.sum.dim_IntList) == 1

    def test_numbers_of_other_kinds_are_not_the_same(self):
        whole = torch.arange(4)
        check(
            lambda x: (x + 1, x + 1.0, x * True, x.clamp(min=1), torch.add(x, x, alpha=2)), whole, whole + 1
        )

    def test_what_is_changed_in_place_stays(self, x):
        def function(x):
            buffer = torch.zeros(6, dtype=x.dtype)
            first = buffer + 1.0
            for i in range(3):
                buffer += x[:, i]
                buffer[i] = x[i, 0]
            view = buffer[2:]
            view.mul_(2.0)
            return buffer, buffer + 1.0, first

        check(function, x)

    def test_a_constant_that_the_program_changes(self, x):
        held = torch.zeros(6, dtype=x.dtype)

        def function(x):
            held.add_(x[:, 0])
            return held * 1.0, held + 0.0

        traced = trace(function, [], [x])
        run = by_operation(traced.graph, traced.constants, [x])
        with torch.no_grad():
            before = held.clone()
            found = run(x)[0].clone()
        assert torch.allclose(found, before + x[:, 0])

    def test_strides(self, x):
        def function(x):
            turned = x.t() * 1.0
            wide = x[:, :1].expand(6, 5) + torch.zeros(6, 5, dtype=x.dtype)
            return (
                turned.reshape(-1),
                wide.reshape(30),
                (x[:, ::2] + 0.0).reshape(-1),
                x.mT.sum(0, keepdim=True),
            )

        check(function, x)

    def test_what_is_not_a_number(self, x):
        bad = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1.0], dtype=x.dtype)
        check(lambda x: (x[:, :5] * bad, bad * 0.0 + x[:, :5], (x[:, :5] - bad).nan_to_num(), bad * 1.0), x)

    def test_random_numbers_are_drawn_anew(self, x):
        def function(x):
            return x + torch.randn_like(x), x + torch.randn_like(x)

        traced = trace(function, [], [x])
        run = by_operation(traced.graph, traced.constants, [x], frozen=len(traced.constants))
        torch.manual_seed(1)
        one, other = run(x)
        torch.manual_seed(1)
        assert torch.equal(one, x + torch.randn_like(x))
        assert not torch.equal(one, other)

    def test_outputs_that_are_arguments_constants_or_one_another(self, x):
        held = torch.ones(3, dtype=x.dtype)
        check(lambda x: (x, x, held, held.exp(), x.detach(), x.view(6, 20)), x)


class TestVectorize:
    def test_a_loop_is_a_few_operations(self, x):
        y = torch.randn(20, dtype=torch.float64)

        def function(x):
            scale = x[:, 0].exp()
            parts = []
            for t, z in enumerate(x.split([1] * 20, -1)):
                gap = (y[t] - z.squeeze(-1)) / scale
                parts.append(-0.5 * gap**2 - scale.log())
            return torch.stack(parts).sum(0)

        nodes = check(with_gradient(function), x)
        assert sum(node.op == "call_function" for node in nodes.nodes) < 60

    def test_a_recurrence_is_not_joined(self, x):
        def function(x):
            state = x[:, 0]
            for t in range(1, 20):
                state = torch.tanh(0.9 * state + x[:, t])
            return state

        nodes = check(with_gradient(function), x)
        assert count(nodes, aten.tanh.default) == 19

    @pytest.mark.parametrize("dim", [0, 1, -1, 2])
    def test_stacks_and_lists_along_any_dimension(self, x, dim):
        def function(x):
            parts = [x[:, i : i + 3].exp() * (1.0 + x[:, :3]) for i in range(8)]
            return (
                torch.stack(parts, dim),
                torch.cat(parts[::-1], min(dim, 1)),
                torch.cat([x, *parts[2:7]], -1),
            )

        check(function, x)

    def test_arguments_of_lower_rank(self, x):
        def function(x):
            columns = [x[:, i : i + 1] for i in range(6)]
            wide = [column * x[:, :5] for column in columns]
            rows = [x[:, :5] + x[i, :5] for i in range(6)]
            mask = [row > 0.1 * wide[i] for i, row in enumerate(rows)]
            return [torch.where(m, row, 2.0).sum(-1) for m, row in zip(mask, rows, strict=True)]

        check(lambda x: tuple(function(x)), x)

    def test_members_that_are_results_or_read_alone(self, x):
        def function(x):
            parts = [(x[:, i] * 2.0).exp() for i in range(9)]
            return parts[3], parts[0] + parts[8], torch.stack(parts[::2]), torch.stack(parts), parts[5][2]

        check(function, x)

    def test_long_chains_of_additions(self, x):
        def function(x):
            shared = x[:, 0] * x[:, 1]
            total = torch.zeros(6, dtype=x.dtype)
            for i in range(2, 20):
                total = total + (shared - x[:, i]) ** 2
            return total

        nodes = check(with_gradient(function), x)
        assert count(nodes, aten.add.Tensor) < 6

    def test_types_mixed(self, x):
        index = torch.arange(20)

        def function(x):
            picked = [x[:, index[i]] for i in range(6)]
            flags = [p > 0.0 for p in picked]
            return torch.stack(
                [f.double() * p for f, p in zip(flags, picked, strict=True)]
            ).float(), torch.stack(flags)

        check(function, x)

    def test_graphs_of_ten_thousand_operations_take_seconds(self):
        x = torch.randn(2, 1000, dtype=torch.float64)

        def function(x):
            scale = x[:, 0].exp()
            parts = [
                -0.5 * ((z.squeeze(-1) - 1.0) / scale) ** 2 - scale.log() for z in x.split([1] * 1000, -1)
            ]
            return torch.stack(parts).sum(0)

        nodes = check(with_gradient(function), x)
        assert sum(node.op == "call_function" for node in nodes.nodes) < 100


@st.composite
def programs(draw):
    """A random program of a loop, as instructions."""
    steps = draw(st.integers(3, 9))
    kinds = st.sampled_from(
        ["mul", "add", "sub", "exp", "square", "shared", "carry", "where", "slice", "buffer", "cat"]
    )
    return steps, draw(st.lists(kinds, min_size=1, max_size=6)), draw(st.booleans()), draw(st.booleans())


def interpret(program, x, constants):
    steps, kinds, stacked, split = program
    columns = x.split([1] * x.shape[-1], -1) if split else [x[:, i : i + 1] for i in range(x.shape[-1])]
    shared, carry, parts = x[:, -1].tanh(), x[:, 0] * 0.5, []
    buffer = torch.zeros(steps, x.shape[0], dtype=x.dtype)
    for t in range(steps):
        z = columns[t].squeeze(-1)
        for kind in kinds:
            if kind == "mul":
                z = z * constants[t]
            elif kind == "add":
                z = z + shared
            elif kind == "sub":
                z = 2.0 - z
            elif kind == "exp":
                z = (0.1 * z).exp()
            elif kind == "square":
                z = z**2 / (1.0 + z**2)
            elif kind == "shared":
                z = z / (1.0 + shared**2)
            elif kind == "carry":
                carry = (0.3 * carry + z).tanh()
                z = z + carry
            elif kind == "where":
                z = torch.where(z > constants[t], z, shared)
            elif kind == "slice":
                z = z + columns[(t + 1) % steps][:, 0]
            elif kind == "buffer":
                buffer[t] = z
                z = buffer[t] * 2.0
            else:
                z = torch.cat([z.unsqueeze(-1), columns[t]], -1).sum(-1)
        parts.append(z)
    return torch.stack(parts).sum(0) if stacked else sum(parts)


@given(programs())
def test_random_programs(program):
    torch.manual_seed(0)
    x, constants = torch.randn(4, 10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    check(with_gradient(lambda x: interpret(program, x, constants)), x)


class TestTrace:
    def test_parameters_by_another_reference(self):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))

        def function(x):
            return x * weight, x * weight.data, x * weight.detach()

        traced = trace(function, [weight], [torch.ones(2)])
        with torch.no_grad():
            weight.mul_(3.0)
        assert not traced.constants
        assert all(torch.equal(value, weight) for value in traced.graph(weight.detach(), torch.ones(2)))

    @pytest.mark.parametrize(
        ("read", "said"),
        [
            (lambda x: x.sum().item(), "item"),
            (lambda x: float(x[0]), "item"),
            (lambda x: bool((x > 0).any()), "if"),
        ],
    )
    def test_values_of_parameters_are_not_read(self, read, said):
        weight = torch.nn.Parameter(torch.ones(2))

        def function(x):
            return (x * read(weight.detach()),)

        with pytest.raises(CannotCompile, match=said) as told:
            trace(function, [weight], [torch.ones(2)])
        assert "test_graph_passes.py" in str(told.value)

    def test_values_of_constants_are_pinned(self):
        data = torch.tensor([1.0, -1.0, 2.0])

        def function(x):
            return (x[data > 0.0] * data.sum().item(),)

        traced = trace(function, [], [torch.ones(3)])
        assert [value is data for value, _ in traced.pinned] == [True]
        assert not traced.pinned_args
        assert torch.equal(traced.graph(*traced.constants, torch.ones(3))[0], torch.full((2,), 2.0))

    def test_a_graph_is_a_graph(self):
        assert isinstance(trace(lambda x: (x + 1.0,), [], [torch.ones(1)]).graph, fx.GraphModule)


def test_a_fit_imports_no_compiler():
    """Neither torch._dynamo nor sympy, each of which takes a second."""
    program = """
import sys, pyro, torch, pyro.distributions as dist
from pyro_flowvi import AutoRealNVP, fit
group, y = torch.tensor([0, 1, 1, 0]), torch.randn(4)
def model():
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 2):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(a[group], 1.0), obs=y)
fit(model, AutoRealNVP(model), num_steps=60, progress=False)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
