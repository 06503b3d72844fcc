"""What single layers promise beyond the property checks."""

import functools
import math

import pytest
import torch

from pyro_flowvi import FLOWS
from pyro_flowvi.distributions import FlowDistribution
from pyro_flowvi.flows import DEFAULTS, FlowDefaults, _named, defaults_for, recipe_name
from pyro_flowvi.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineAutoregressive,
    AffineCoupling,
    Compose,
    Conditional,
    Coupling,
    ElementwiseAffine,
    HeavyTails,
    Householder,
    Inverse,
    LULinear,
    Partial,
    Planar,
    Sylvester,
    coupling_mask,
)
from pyro_flowvi.transforms.sylvester import orthonormal_frame
from pyro_flowvi.transforms.univariate import Affine
from tests.transforms.layers import randomized

NETWORKS = ("nice", "realnvp", "neural_spline", "neural_spline_ar", "iaf", "maf")


class TestCoupling:
    @pytest.mark.parametrize("mask", ["first", "second", "even", "odd", [True, True, False, True, False]])
    def test_what_passes_is_unchanged_and_moves_the_rest(self, mask):
        flow = randomized(AffineCoupling(5, mask=mask), 0.5)
        keep = coupling_mask(5, mask) if isinstance(mask, str) else torch.tensor(mask)
        x = torch.randn(5)
        y = flow(x)
        assert torch.equal(y[keep], x[keep])
        jacobian = torch.autograd.functional.jacobian(flow, x)
        assert (jacobian[~keep][:, keep] != 0).all()
        moved = jacobian[~keep][:, ~keep]
        assert torch.equal(moved, moved.diag().diag())

    def test_any_scale_can_be_learnt_but_the_input_contributes_a_bounded_part(self):
        flow = AffineCoupling(2, limit=2.0)
        with torch.no_grad():
            flow.conditioner.last.weight.fill_(1e6)
        log_det = flow.forward_and_log_det(torch.randn(100, 2))[1]
        assert log_det.abs().max() <= 2.0
        with torch.no_grad():
            flow.offset[0].fill_(-20.0)
        assert flow.forward_and_log_det(torch.randn(100, 2))[1].max() <= -18.0

    @pytest.mark.parametrize("value", [-1e4, 1e4])
    def test_any_raw_parameter_is_finite_in_float32(self, value):
        flow = AffineCoupling(2).to(torch.float32)
        with torch.no_grad():
            flow.offset.fill_(value)
        y, log_det = flow.forward_and_log_det(torch.randn(5, 2, dtype=torch.float32))
        assert y.isfinite().all()
        assert log_det.isfinite().all()

    def test_nice_preserves_volume(self):
        flow = randomized(AdditiveCoupling(6), 1.0)
        assert not flow.forward_and_log_det(torch.randn(10, 6))[1].any()
        jacobian = torch.autograd.functional.jacobian(flow, torch.randn(6))
        assert float(jacobian.det()) == pytest.approx(1.0)

    def test_takes_a_network_of_the_users(self):
        class Linear(torch.nn.Linear):
            def biases(self):
                return {}

            def forward(self, x, biases):
                return super().forward(x)

        flow = Coupling(3, Affine(1.0), conditioner=lambda a, b: Linear(a, b, bias=False))
        x = torch.randn(4, 3)
        torch.testing.assert_close(flow.inv(flow(x)), x)

    def test_no_network_with_one_coordinate(self):
        assert AffineCoupling(1).conditioner is None


class TestLinear:
    def test_lu_is_a_matrix(self):
        flow = randomized(LULinear(4), 0.5)
        matrix = (flow(torch.eye(4)) - flow(torch.zeros(4))).detach()
        x = torch.randn(7, 4)
        torch.testing.assert_close(flow(x), x @ matrix + flow(torch.zeros(4)))
        torch.testing.assert_close(flow(x[:1])[0], flow(x)[0])
        assert float(matrix.det()) > 0

    def test_householder_rotates(self):
        flow = randomized(Householder(5), 1.0)
        matrix = flow(torch.eye(5)).detach()
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(5))
        assert float(matrix.det()) == pytest.approx(1.0)
        with pytest.raises(ValueError, match="num_reflections: expected an even number, got 3"):
            Householder(5, num_reflections=3)

    @pytest.mark.parametrize("length", [0.0, 1e-300, 1e-15, 1e15])
    def test_reflections_are_orthogonal_for_vectors_of_any_length(self, length):
        flow = Householder(3, num_reflections=2)
        with torch.no_grad():
            flow.vectors.mul_(length)
        matrix = flow(torch.eye(3)).detach()
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(3))

    def test_frame_is_orthonormal_and_any(self):
        """M reflections reach every frame of M rows, up to sign."""
        frame = orthonormal_frame(torch.randn(3, 6))
        torch.testing.assert_close(frame @ frame.T, torch.eye(3))

    def test_act_norm_starts_from_data(self):
        y = torch.tensor([3.0, -5.0]) + torch.tensor([10.0, 0.1]) * torch.randn(500, 2)
        flow = ActNorm(2)
        flow.initialize(y.reshape(5, 100, 2))
        x = flow.inv(y)
        torch.testing.assert_close(x.mean(0), torch.zeros(2), rtol=0, atol=1e-10)
        torch.testing.assert_close(x.std(0, correction=0), torch.ones(2))
        for bad in (y[:1], torch.ones(5, 2), y * math.nan):
            with pytest.raises(ValueError, match="y: expected at least 2 vectors that differ"):
                flow.initialize(bad)

    def test_inverse_owns_its_parameters(self):
        affine = ElementwiseAffine(2, scale=3.0)
        flow = Inverse(affine)
        assert list(flow.parameters()) == list(affine.parameters())
        assert flow(torch.ones(2)).tolist() == pytest.approx([1 / 3] * 2)
        whole = Inverse(Compose([affine, LULinear(2)]))
        assert len(list(whole.parameters())) == 4
        with pytest.raises(ValueError, match="transform: expected a FlowTransform with an exact inverse"):
            Inverse(torch.distributions.transforms.ExpTransform())


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: AffineCoupling(3, mask=None), "mask: expected 3 booleans or a name, got None"),
            (lambda: Affine(0.0), "limit: expected a positive number, got 0.0"),
            (lambda: Conditional(Compose([LULinear(2)]), 3), "layer: expected a ParametricTransform"),
            (lambda: Partial(Compose([LULinear(2)]), [0, 1], 3), "layer: expected a ParametricTransform"),
            (lambda: ActNorm(3).initialize(torch.randn(6, 2)), r"y: expected shape \(\*, 3\), got \(6, 2\)"),
        ],
    )
    def test_arguments(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize("make", [FLOWS["maf"], lambda dim: Partial(ElementwiseAffine(1), [2], dim)])
    def test_wrong_dtype_reaches_no_layer(self, make):
        with pytest.raises(ValueError, match=r"x: expected torch.float64 on cpu, as the parameters of"):
            make(3)(torch.zeros(4, 3, dtype=torch.float32))


def test_inverse_keeps_the_batch_of_the_context():
    flow = Inverse(Conditional(Planar(2), 3).condition(torch.zeros(5, 3)))
    assert flow.batch_shape == (5,)
    assert (FlowDistribution(None, flow).sample().std(0) > 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_gradients_of_an_autoregressive_inverse_with_extreme_scales(scale):
    flow = randomized(AffineAutoregressive(3), 1.0).to(torch.float32)
    with torch.no_grad():
        flow.offset.fill_(-1e4)
    y = scale * torch.randn(4, 3, dtype=torch.float32)
    x, log_det = flow.inverse_and_log_det(y)
    (x.sum() + log_det.sum()).backward()
    assert all(param.grad.isfinite().all() for param in flow.parameters())


def test_sylvester_bounds():
    with pytest.raises(ValueError, match="num_units: expected at most dim = 2, got 3"):
        Sylvester(2, num_units=3)
    assert Sylvester(1000).num_units == 8


class TestHeavyTails:
    def test_density_has_no_jump_where_the_tangent_begins(self):
        flow = HeavyTails(1)
        with torch.no_grad():
            flow.tails.fill_(0.2)
        x = 8.0 + torch.tensor([[-1e-9], [1e-9]])
        y, log_det = flow.forward_and_log_det(x)
        assert float((log_det[1] - log_det[0]).detach().abs()) <= 1e-7
        assert float((flow.inverse_and_log_det(y)[1] + log_det).detach().abs().max()) <= 1e-9

    @pytest.mark.parametrize("raw", [-1e20, -1e4, -3.0, 0.0, 1.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_round_trip_and_gradients_everywhere(self, dtype, raw):
        flow = HeavyTails(1).to(dtype)
        with torch.no_grad():
            flow.tails.fill_(raw)
        x = torch.linspace(-12, 12, 2001, dtype=dtype).unsqueeze(-1).requires_grad_()
        y, log_det = flow.forward_and_log_det(x)
        back, back_det = flow.inverse_and_log_det(y)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(back, x, rtol=10 * tolerance, atol=tolerance)
        for value in (y, log_det, back, back_det):
            assert value.isfinite().all()
        grads = torch.autograd.grad(back.sum() + back_det.sum(), [x, flow.tails])
        assert all(grad.isfinite().all() for grad in grads)
        y0 = torch.zeros(1, dtype=dtype, requires_grad=True)
        assert float(torch.autograd.grad(flow.inv(y0).sum(), y0)[0]) == pytest.approx(1.0)

    def test_tail_index(self):
        """P(|Y| > y) falls as y^(-1/h), up to the logarithm."""
        flow = HeavyTails(1)
        with torch.no_grad():
            flow.tails.fill_(2.0 / 3.0)  # h = 0.4: 2.5 degrees of freedom
        x = torch.tensor([[5.0], [6.0]])
        y = flow(x).flatten().detach()
        tail = torch.log(torch.erfc(x.flatten() / math.sqrt(2)))
        index = -(tail[1] - tail[0]) / (y[1].log() - y[0].log())
        assert float(index) == pytest.approx(2.5, rel=0.1)


class TestDefaults:
    def test_every_flow_has_its_row(self):
        for row in DEFAULTS:
            assert row.flows.keys() == FLOWS.keys()
        dims = [row.max_dim for row in DEFAULTS]
        assert dims == sorted(dims)
        assert dims[-1] == math.inf

    @pytest.mark.parametrize(("name", "count"), [("planar", 1), ("new", 2), ("new", 0)])
    def test_a_flow_is_entered_whole_or_not_at_all(self, name, count):
        with pytest.raises(
            ValueError, match=f"{name}: expected a new name with 1 or 3 defaults, got {count}"
        ):
            _named(name, *[FlowDefaults(1, 1, 1e-2)] * count)
        assert "new" not in FLOWS

    @pytest.mark.parametrize("name", NETWORKS)
    def test_layers_and_widths_are_the_builders(self, name):
        few, many = (
            sum(p.numel() for p in FLOWS[name](6, **options).parameters())
            for options in ({"num_layers": 1, "hidden": (3,)}, {})
        )
        assert few < many
        row = defaults_for(6)
        explicit = FLOWS[name](6, num_layers=row.flows[name].num_layers, hidden=row.hidden)
        assert sum(p.numel() for p in explicit.parameters()) == many

    def test_recipe_name(self):
        assert recipe_name(FLOWS["iaf"]) == "iaf"
        assert recipe_name(functools.partial(functools.partial(FLOWS["maf"]), num_layers=1)) == "maf"
        assert recipe_name(AffineCoupling) is None

    @pytest.mark.parametrize("name", FLOWS)
    def test_bad_arguments(self, name):
        for options, message in (
            ({"num_layers": 0}, "num_layers: expected a positive integer, got 0"),
            ({"hidden": (2, -1)}, "hidden: expected a positive integer, got -1"),
            ({"context_dim": 0}, "context_dim: expected a positive integer, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                FLOWS[name](3, **options)
        with pytest.raises(ValueError, match="dim: expected a positive integer, got 0"):
            FLOWS[name](0)
