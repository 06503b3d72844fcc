"""Latents under a subsampled plate: densities, draws, gradients against closed forms and all data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flowvi import AutoPlanar, AutoRealNVP
from tests.rows import MODELS, alone, data, given, normals, table

NUM, SIZE = 40, 8
STILL = "shapes", "by_root"
"""What changes the form of the rows' density."""


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def made(model, *args, still=(), **kwargs):
    """A guide that is not as it starts: its numbers have moved, but some."""
    guide = AutoRealNVP(model).materialize(*args, **kwargs)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in guide.named_parameters():
            if not any(part in name for part in still):
                param += 0.1 * torch.randn_like(param)
    return guide


def showing(program, rows, num):
    """A program whose plate shows some rows."""
    plate = poutine.trace(lambda: pyro.plate("n", num, subsample=rows)).get_trace()
    return poutine.replay(program, trace=plate)


def traced(program, *args, seed=3):
    pyro.set_rng_seed(seed)
    return poutine.trace(program).get_trace(*args)


def by_columns(y, size):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z[..., None], 0.5).to_event(1), obs=y[rows])


class TestClosedForm:
    def log_q(self, guide, draws):
        """Of the rows given mu and tau: a Normal prior times a message of slope and weight at a centre."""
        tables = guide._flow.rows
        mu, tau = draws["mu"].unsqueeze(-1), draws["tau"].unsqueeze(-1)
        centre, slope = tables.block_centre.flatten(), tables.block_slope.flatten()
        weight = tables.block_log_weight.flatten().exp()
        precision = tau**-2 + weight
        mean = (mu * tau**-2 + weight * centre + slope) / precision
        return dist.Normal(mean, precision**-0.5).log_prob(draws["z"])

    def test_log_prob(self):
        y = data()
        guide = made(given(NUM), y[:SIZE], torch.arange(SIZE), still=STILL)
        draws = guide.sample_posterior(50)
        roots = torch.stack([draws["mu"], draws["tau"].log()], -1)
        expected = guide.get_posterior().log_prob(roots) - draws["tau"].log()
        expected = expected + self.log_q(guide, draws).sum(-1)
        assert torch.allclose(guide.log_prob(draws), expected, rtol=1e-10, atol=1e-10)

    def test_draws_of_rows_by_their_indices(self):
        guide = made(given(NUM), data()[:SIZE], torch.arange(SIZE))
        rows = [31, 2, 17]
        draws = guide.sample_posterior(20_000, rows=rows)
        all_rows = guide.sample_posterior(20_000)["z"][:, rows]
        se = all_rows.std(0) / 100.0
        assert (draws["z"].mean(0) - all_rows.mean(0)).abs().lt(5.0 * se).all()
        assert torch.allclose(draws["z"].std(0), all_rows.std(0), rtol=0.03)


@pytest.mark.parametrize("name", MODELS)
class TestOfEveryModel:
    def case(self, name):
        model, make = MODELS[name]
        return model, make()

    def test_shapes_and_summaries(self, name):
        """Of all rows, as of the model with the whole plate; medians are quantiles."""
        model, y = self.case(name)
        guide = made(model, y, SIZE)
        whole = poutine.trace(model).get_trace(y, len(y))
        draws = guide.sample_posterior((500, 4))
        for site, value in draws.items():
            assert value.shape == (500, 4, *whole.nodes[site]["value"].shape)
            assert value.dtype == torch.float64
        assert guide.log_prob(draws).shape == (500, 4)
        median, quantiles = guide.median(), guide.quantiles([0.1, 0.5])
        for site, value in median.items():
            assert value.shape == whole.nodes[site]["value"].shape
            assert torch.allclose(value, quantiles[site][1])
            if whole.nodes[site]["fn"].event_dim == 0:
                share = (draws[site] < value).double().mean((0, 1))
                assert (share - 0.5).abs().max() < 0.12
                below = (draws[site] < quantiles[site][0]).double().mean((0, 1))
                assert (below - 0.1).abs().max() < 0.08

    def test_pages_make_up_the_whole(self, name):
        """Traces of pages with the same roots: their rows scored together are scored by ``log_prob``."""
        model, y = self.case(name)
        guide = made(model, y, SIZE)
        parts, total, outside, elbos = [], 0.0, None, []
        order = torch.randperm(len(y))
        for rows in order.split(SIZE):
            fixed = showing(guide, rows, len(y))
            trace = traced(fixed, y, SIZE)
            trace.compute_log_prob()
            parts.append({s: v["value"] for s, v in trace.nodes.items() if s in guide._packing.latents})
            sites = {s: v for s, v in trace.nodes.items() if v["type"] == "sample" and s != "n"}
            inside = [s for s, v in sites.items() if any(f.name == "n" for f in v["cond_indep_stack"])]
            total = total + sum(sites[s]["unscaled_log_prob"].sum() for s in inside)
            outside = sum(sites[s]["log_prob_sum"] for s in sites if s not in inside)
            model_trace = poutine.trace(poutine.replay(model, trace=trace)).get_trace(y, SIZE)
            elbos.append((model_trace.log_prob_sum() - trace.log_prob_sum()).item())
        whole = {}
        for site, first in parts[0].items():
            if site in guide._rows.first_view().axis:
                axis = guide._rows.first_view().axis[site] - first.dim()
                joined = torch.cat([part[site] for part in parts], axis)
                whole[site] = joined.index_select(axis, order.argsort())
            else:
                assert all(torch.equal(part[site], first) for part in parts)
                whole[site] = first
        log_q = guide.log_prob(whole)
        assert torch.allclose(log_q, total + outside, rtol=1e-10, atol=1e-10)
        log_p = poutine.trace(poutine.condition(model, data=whole)).get_trace(y, len(y)).log_prob_sum()
        assert sum(elbos) / len(elbos) == pytest.approx((log_p - log_q).item(), rel=1e-10)

    def test_rows_that_are_not_shown_have_no_gradient(self, name):
        model, y = self.case(name)
        guide = made(model, y, SIZE)
        rows = torch.tensor([3, 5, 8, 13, 21, 34, 1, 0])
        fixed = showing(guide, rows, len(y))
        Trace_ELBO().differentiable_loss(model, fixed, y, SIZE).backward()
        shown = torch.zeros(len(y), dtype=torch.bool).index_fill(0, rows, True)
        moved = torch.zeros(len(y), dtype=torch.bool)
        for key, param in guide._flow.rows.named_parameters():
            if "shapes" in key or key in ("root_loc", "log_root_width") or param.grad is None:
                continue
            assert len(param) == len(y)
            assert not param.grad[~shown].any()
            moved |= param.grad.flatten(1).abs().sum(1) > 0
        assert torch.equal(moved, shown)


class TestSizes:
    @pytest.mark.parametrize(("num", "size"), [(7, 1), (7, 6), (23, 5), (2, 1)])
    def test_pages_that_do_not_come_out_even(self, num, size):
        y = data(num)
        guide = made(normals, y, size=size)
        SVI(normals, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(y, size=size)
        draws = guide.sample_posterior(3)
        assert draws["z"].shape == (3, num)
        assert guide.log_prob(draws).isfinite().all()

    @pytest.mark.parametrize(("columns", "length"), [(1, 1000), (500, 200), (20_000, 10)])
    def test_pages_are_as_long_as_latents_and_data_let_them(self, columns, length):
        """Up to 10,000 latents and 100,000 numbers of data, but never shorter than the model's own."""
        y = table(1000, columns)
        guide = AutoRealNVP(by_columns).materialize(y, 10)
        sweep = guide.sweep(lambda _: [((y, 10), {})])
        assert {view.size for view in sweep.views()} == {length}

    def test_draws_and_densities_in_float32(self):
        torch.set_default_dtype(torch.float32)
        y = data()
        guide = AutoRealNVP(normals).materialize(y, size=SIZE)
        draws = guide.sample_posterior(5)
        assert all(value.dtype == torch.float32 for value in draws.values())
        single = guide.log_prob(draws)
        guide.double()
        wide = guide.log_prob({site: value.double() for site, value in draws.items()})
        assert wide.dtype == torch.float64
        assert torch.allclose(single.double(), wide, rtol=1e-3, atol=0.05)

    def test_outside_the_support(self):
        guide = AutoPlanar(normals).materialize(data(), size=SIZE)
        draws = guide.sample_posterior(2)
        draws["tau"] = torch.tensor([1.0, -1.0])
        assert guide.log_prob(draws).isfinite().tolist() == [True, False]

    @pytest.mark.parametrize("rows", [[-1], [NUM], [0.5], torch.ones(3, dtype=torch.bool), [[1]]])
    def test_rows_that_are_none(self, rows):
        guide = AutoRealNVP(normals).materialize(data(), size=SIZE)
        with pytest.raises(ValueError, match=r"rows: expected whole numbers from 0 to 39.*'n'"):
            guide.sample_posterior(2, rows=rows)

    def test_some_rows_and_sites(self):
        guide = AutoRealNVP(normals).materialize(data(), size=SIZE)
        assert guide.sample_posterior(2, rows=range(30, 40), sites="z")["z"].shape == (2, 10)
        assert guide.sample_posterior(2, rows=5)["z"].shape == (2, 1)
        assert list(guide.sample_posterior(2, sites=["tau"])) == ["tau"]
        assert guide.sample_posterior()["z"].shape == (NUM,)
        with pytest.raises(ValueError, match=r"sites: expected some of .*'z'.*got \['x'\]"):
            guide.sample_posterior(2, sites=["x"])
        with pytest.raises(ValueError, match=r"samples\['z'\]: expected shape \(\*, 40\), got \(2, 10\)"):
            guide.log_prob(guide.sample_posterior(2, rows=range(10)))

    def test_nothing_outside(self):
        y = data()
        guide = made(alone, y, SIZE, still=STILL)
        draws = guide.sample_posterior((2, 3))
        assert guide.log_prob(draws).shape == (2, 3)
        tables = guide._flow.rows
        precision = 1.0 + tables.block_log_weight.flatten().exp()
        mean = (
            tables.block_log_weight.flatten().exp() * tables.block_centre.flatten()
            + tables.block_slope.flatten()
        )
        expected = dist.Normal(mean / precision, precision**-0.5).log_prob(draws["z"]).sum(-1)
        assert torch.allclose(guide.log_prob(draws), expected, rtol=1e-10)
