"""Random programs against their recorded graphs: recurrences, views, memory written in place."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_flowvi._compile.run_by_operation import by_operation
from pyro_flowvi._compile.trace import trace

ROWS, COLUMNS = 4, 10
UNARY = {
    "exp": lambda z: (0.1 * z).exp(),
    "tanh": torch.tanh,
    "square": lambda z: z**2 / (1.0 + z**2),
    "root": lambda z: (1.0 + z.abs()).sqrt(),
    "negative": lambda z: 1.5 - z,
    "nothing": lambda z: 1.0 * z + 0.0,
    "narrow": lambda z: z.float().tanh().double(),
    "flags": lambda z: (z > 0.1).double() - (z <= 0) * 0.5,
    "where": lambda z: torch.where(z > 0.0, z, 0.25),
    "turned": lambda z: z.flip(-1) if z.dim() else z,
    "summed": lambda z: z + z.sum(-1, keepdim=True),
    "column": lambda z: (z.unsqueeze(-1).expand(-1, 3) if z.dim() == 1 else z).sum(-1).reshape(-1)[:1] + z,
    "running": lambda z: z.reshape(-1).cumsum(0).view(z.shape),
    "power": lambda z: z.pow(1) * z.pow(2.0) / (1.0 + z * z),
    "logsumexp": lambda z: torch.stack([z, 2.0 * z, z]).logsumexp(0),
    "squeezed": lambda z: (
        z.unsqueeze(0).unsqueeze(-1).squeeze(-1).squeeze()
        if 1 not in z.shape
        else z.unsqueeze(-2).squeeze(-2)
    ),
}
BINARY = {
    "plus": torch.add,
    "minus": lambda a, b: torch.sub(a, b, alpha=0.5),
    "times": lambda a, b: a * b * 0.5,
    "by": lambda a, b: a / (1.0 + b.abs()),
    "larger": torch.maximum,
    "chosen": lambda a, b: torch.where(a > b, a, b.mean()),
    "addcmul": lambda a, b: torch.addcmul(a, b, b, value=0.1),
    "add_in_place": lambda a, b: a.clone().add_(b),
    "compared": lambda a, b: (a >= b).to(a.dtype) * b,
}
WRITES = ["row", "all", "strided", "view", "out", "scaled"]


@st.composite
def programs(draw):
    """Instructions for every round of a loop: a kind, its operation, and the places that it reads."""
    where = st.integers(0, 5)
    unary = st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), where, where)
    binary = st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), where, where)
    writes = st.tuples(st.just("write"), st.sampled_from(WRITES), where, where)
    body = draw(st.lists(st.one_of(unary, binary, writes), min_size=1, max_size=6))
    return {
        "body": body,
        "rounds": draw(st.integers(3, 8)),
        "joined": draw(st.sampled_from(["stack", "stack_last", "cat", "sum", "cat_turned", "numbers"])),
        "sliced": draw(st.sampled_from(["split", "select", "unbind", "slice", "number"])),
        "single": draw(st.booleans()),
    }


def write(kind, memory, z, t):
    """Puts a value into memory in one of many ways."""
    value = (z.reshape(-1)[:1] if z.dim() == 0 else z)[..., :ROWS]
    if kind == "row":
        memory[t % 3] = value
    elif kind == "all":
        memory += value.mean()
    elif kind == "strided":
        memory[:, ::2].mul_(1.0 + 0.1 * value.detach().tanh().mean())
    elif kind == "view":
        view = memory.t()[1]
        view.add_(value.sum())
    elif kind == "out":
        with torch.no_grad():
            torch.cumsum(value.detach().expand(3, ROWS), 0, out=memory.data)
    else:
        memory.view(-1).mul_(0.9).squeeze().add_(0.1)


def loop(program, x, constants):
    """Runs a program."""
    kind = program["sliced"]
    if kind == "split":
        columns = [part.squeeze(-1) for part in x.split([1] * COLUMNS, -1)]
    elif kind == "unbind":
        columns = list(x.unbind(1))
    elif kind == "slice":
        columns = [x[:, i : i + 1].squeeze(1) for i in range(COLUMNS)]
    elif kind == "select":
        columns = [x[:, i] for i in range(COLUMNS)]
    else:
        columns = [x[0, i] for i in range(COLUMNS)]
    carry, shared, parts = columns[0] * 0.5, x[:, -1].tanh(), []
    memory = torch.zeros(3, ROWS, dtype=x.dtype)
    for t in range(program["rounds"]):
        z = columns[t + 1] + 0.0
        single = constants[t].float() if program["single"] else constants[t]
        for operation, name, one, _ in program["body"]:
            row = (memory[t % 3] if z.dim() else memory[t % 3, 0]).clone()
            places = [z, carry, shared, single, columns[t], row]
            if operation == "unary":
                z = UNARY[name](z)
            elif operation == "binary":
                z = BINARY[name](z, places[one].to(z.dtype) if name == "larger" else places[one])
            else:
                write(name, memory, z, t)
        if one % 2:
            carry = (0.3 * carry + z).tanh()
        parts.append(z)
    shape = torch.broadcast_shapes(*(z.shape for z in parts))
    parts = [z.expand(shape).to(x.dtype) for z in parts]
    how = program["joined"]
    if how == "sum":
        total = sum(parts)
    elif how == "numbers":
        total = torch.stack([z.sum() for z in parts]).sum() * shared
    elif how in ("cat", "cat_turned"):
        total = torch.cat([z.reshape(-1) for z in (parts if how == "cat" else parts[::-1])])
    else:
        total = torch.stack(parts, 0 if how == "stack" else -1).contiguous().view(-1)
    return total, carry, memory + 0.0


def with_gradient(program, constants):
    def run(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            results = loop(program, x, constants)
            gradient = torch.autograd.grad(sum(r.sum() for r in results), x)[0]
        return (*(r.detach() for r in results), gradient)

    return run


@given(programs())
def test_a_graph_gives_what_its_program_gives(program):
    torch.manual_seed(0)
    x, other = torch.randn(2, ROWS, COLUMNS, dtype=torch.float64)
    constants = torch.rand(COLUMNS, dtype=torch.float64)
    function = with_gradient(program, constants)
    expected = function(other)
    traced = trace(function, [], [x])
    run = by_operation(traced.graph, traced.constants, [x], frozen=len(traced.constants))
    with torch.no_grad():
        for _ in range(2):  # a graph keeps nothing from one call to the next
            for found, value in zip(run(other), expected, strict=True):
                assert found.dtype == value.dtype
                assert found.shape == value.shape
                assert torch.allclose(found, value, rtol=1e-6, atol=1e-7, equal_nan=True)
