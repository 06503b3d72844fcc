"""Image flows: layout, masks, exactness in both directions, and the way from integers to bits."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyro_flowvi.distributions import FlowDistribution
from pyro_flowvi.nn import ConvResNet
from pyro_flowvi.testing import check_transform
from pyro_flowvi.transforms import (
    Compose,
    Conditional,
    ConditionalCompose,
    Conv1x1,
    Coupling,
    ElementwiseAffine,
    Logit,
    LowerAffine,
    Partial,
    Squeeze2d,
    bits_per_dim,
    channel_mask,
    checkerboard_mask,
    dequantize,
    multiscale_realnvp,
)
from pyro_flowvi.transforms.univariate import Affine
from tests.transforms.layers import randomized

# Smooth: a finite difference across the kink of a ReLU is no derivative.
SMALL = {"num_layers": 1, "channels": 1, "num_blocks": 1, "activation": "tanh"}


def conv_coupling(shape, mask, activation="tanh", channels=2, num_blocks=1):
    options = {"channels": channels, "num_blocks": num_blocks, "activation": activation}
    return Coupling(
        math.prod(shape),
        Affine(limit=2.0),
        mask=mask,
        conditioner=lambda *_: ConvResNet(shape, mask, 2, **options),
    )


class TestSqueeze:
    @pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 6)])
    def test_layout(self, shape):
        """Channels of ``pixel_unshuffle`` are color first, offset second; here the offset comes first."""
        c, h, w = shape
        squeeze = Squeeze2d(shape)
        assert squeeze.out_shape == (4 * c, h // 2, w // 2)
        images = torch.randn(5, *shape)
        expected = F.pixel_unshuffle(images, 2).reshape(5, c, 4, h // 2, w // 2).transpose(1, 2)
        torch.testing.assert_close(squeeze(images.flatten(1)), expected.flatten(1))

    def test_properties(self):
        check_transform(Squeeze2d((2, 2, 4)), torch.randn(3, 16))

    @pytest.mark.parametrize("shape", [(1, 2, 2), (2, 2, 4), (3, 2, 2), (3, 6, 2)])
    def test_is_an_even_permutation(self, shape):
        dim = math.prod(shape)
        determinant = torch.linalg.det(Squeeze2d(shape)(torch.eye(dim)))
        assert determinant.round().item() == Squeeze2d(shape).sign

    @pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 3)])
    def test_refuses_odd_sides(self, shape):
        with pytest.raises(ValueError, match="shape: expected an even height and width, got"):
            Squeeze2d(shape)


class TestMasks:
    @pytest.mark.parametrize("shape", [(1, 3, 3), (2, 4, 5)])
    def test_checkerboard(self, shape):
        even = checkerboard_mask(shape, "even").reshape(shape)
        for c, h, w in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, 3).tolist():
            assert even[c, h, w] == ((h + w) % 2 == 0)
        assert torch.equal(checkerboard_mask(shape, "odd"), ~even.flatten())

    def test_channels(self):
        first = channel_mask((5, 2, 3), "first").reshape(5, 2, 3)
        assert first[:2].all()
        assert not first[2:].any()
        assert torch.equal(channel_mask((5, 2, 3), "second"), ~first.flatten())
        assert channel_mask((4, 1, 2), "even").tolist() == [True, True, False, False] * 2

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: checkerboard_mask((1, 2, 2), 0), "parity: expected 'even' or 'odd', got 0"),
            (lambda: checkerboard_mask((3, 1, 1), "even"), "shape: expected at least two pixels"),
            (lambda: channel_mask((2, 2, 2), "third"), "half: expected 'first', 'second', 'even' or 'odd'"),
            (lambda: channel_mask((1, 2, 2), "first"), "shape: expected at least two channels"),
            (lambda: channel_mask((2, 2), "first"), r"shape: expected \(channels, height, width\), got"),
            (lambda: channel_mask((2, 0, 2), "first"), "shape: expected a positive integer, got 0"),
        ],
    )
    def test_refuses(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class TestConv1x1:
    @pytest.mark.parametrize("scale", [0.0, 0.5])
    @pytest.mark.parametrize("shape", [(1, 2, 2), (3, 1, 2)])
    def test_properties(self, shape, scale):
        check_transform(randomized(Conv1x1(shape), scale), torch.randn(2, 3, math.prod(shape)))

    def test_conditional(self):
        flow = randomized(Conditional(Conv1x1((2, 1, 2)), 2, (3,)))
        check_transform(flow, torch.randn(4, 4), context=torch.randn(4, 2))

    def test_is_a_convolution_that_starts_as_the_identity(self):
        flow, x = Conv1x1((3, 2, 4)), torch.randn(5, 3, 2, 4)
        torch.testing.assert_close(flow(x.flatten(1)), x.flatten(1))
        lu = randomized(flow).lu.detach()
        weight = (torch.eye(3) + lu.tril(-1)) @ (lu.diag().exp().diag()) @ (torch.eye(3) + lu.triu(1))
        expected = F.conv2d(x, weight[:, :, None, None])
        y, log_det = flow.forward_and_log_det(x.flatten(1))
        torch.testing.assert_close(y, expected.flatten(1))
        torch.testing.assert_close(log_det, 8 * torch.linalg.slogdet(weight)[1].expand(5))

    def test_any_raw_parameter_is_valid(self):
        flow = Conv1x1((2, 1, 1))
        with torch.no_grad():
            flow.lu.copy_(torch.tensor([[-1e6, 2.0], [3.0, 1e6]]))
        assert flow.forward_and_log_det(torch.ones(2))[1].isfinite()


class TestPartial:
    def test_properties(self):
        check_transform(randomized(Partial(LowerAffine(3), [4, 0, 2], dim=5)), torch.randn(4, 5))

    def test_moves_its_places_in_their_order(self):
        layer = randomized(LowerAffine(2))
        x = torch.randn(3, 4)
        y, log_det = Partial(layer, [3, 1], dim=4).forward_and_log_det(x)
        torch.testing.assert_close(y[:, [3, 1]], layer(x[:, [3, 1]]))
        assert torch.equal(y[:, [0, 2]], x[:, [0, 2]])
        torch.testing.assert_close(log_det, layer.forward_and_log_det(x[:, [3, 1]])[1])

    @pytest.mark.parametrize("places", [[0], [0, 0], [0, 3], [-1, 0]])
    def test_refuses(self, places):
        with pytest.raises(ValueError, match="places: expected 2 different indices from 0 to 2, got"):
            Partial(ElementwiseAffine(2), places, dim=3)


class TestConvResNet:
    def test_sees_what_passes_in_its_place_and_answers_for_what_moves(self):
        """Against plain convolutions of the masked image and its mask."""
        shape, mask = (2, 3, 4), torch.rand(24) < 0.5
        net = randomized(ConvResNet(shape, mask, 3, channels=5, num_blocks=1))
        images = torch.randn(6, *shape)
        board = mask.reshape(shape).to(images)
        h = net.first
        value = F.conv2d(
            torch.cat([images * board, board.expand(6, -1, -1, -1)], 1), h.weight, h.bias, padding=1
        )
        first, second = net.hidden
        inner = F.conv2d(value.relu(), first.weight, first.bias, padding=1)
        value = value + F.conv2d(inner.relu(), second.weight, second.bias, padding=1)
        out = F.conv2d(value.relu(), net.last.weight, padding=1).reshape(6, 3, 24)
        expected = torch.stack([row[:, ~mask].flatten() for row in out])
        torch.testing.assert_close(net(images.flatten(1)[:, mask]), expected)

    def test_biases_with_a_batch_are_row_by_row(self):
        net = randomized(
            ConvResNet((1, 2, 3), checkerboard_mask((1, 2, 3), "even"), 2, channels=3, num_blocks=1)
        )
        biases = {name: torch.randn(5, *b.shape) for name, b in net.biases().items()}
        x = torch.randn(7, 5, 3)
        out = net(x, biases)
        assert out.shape == (7, 5, 6)
        for i in range(5):
            row = net(x[:, i], {name: b[i] for name, b in biases.items()})
            torch.testing.assert_close(out[:, i], row)
        torch.testing.assert_close(
            net(x[0, 0], biases)[2], net(x[0, 0], {n: b[2] for n, b in biases.items()})
        )
        assert net(x[:0], biases).shape == (0, 5, 6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_starts_at_zero_in_any_dtype(self, dtype):
        net = ConvResNet((1, 2, 2), [True, False, False, True], 2).to(dtype)
        assert torch.equal(net(torch.randn(3, 2, dtype=dtype)), torch.zeros(3, 4, dtype=dtype))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((1, 2, 2), [True, False], 2), "mask: expected 4 booleans, got"),
            (((1, 2, 2), [1, 0, 0, 1], 2), "mask: expected 4 booleans, got"),
            (((1, 2), [True, False], 2), r"shape: expected \(channels, height, width\), got \(1, 2\)"),
            (((1, 1, 2), [True, False], 0), "num_params: expected a positive integer, got 0"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ConvResNet(*arguments)


class TestConvolutionalCoupling:
    @pytest.mark.parametrize(
        ("shape", "make_mask", "kind"),
        [((1, 4, 4), checkerboard_mask, "even"), ((2, 2, 3), channel_mask, "second")],
    )
    def test_properties(self, shape, make_mask, kind):
        layer = randomized(conv_coupling(shape, make_mask(shape, kind)))
        check_transform(layer, torch.randn(2, 2, math.prod(shape)))

    def test_conditional(self):
        shape = (1, 3, 3)
        layer = Conditional(conv_coupling(shape, checkerboard_mask(shape, "odd"), channels=1), 2, (2,))
        check_transform(randomized(layer), torch.randn(3, 9), context=torch.randn(3, 2))


class TestMultiscale:
    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ((1, 4, 4), {"num_scales": 2}),
            ((2, 4, 4), {"num_scales": 2, "conv1x1": True}),
            ((1, 2, 6), {"num_scales": 2}),
            ((1, 3, 3), {}),
        ],
    )
    def test_properties(self, shape, options):
        flow = randomized(multiscale_realnvp(shape, **SMALL, **options))
        check_transform(flow, torch.randn(3, math.prod(shape)))

    @pytest.mark.parametrize(("shape", "num_scales"), [((1, 3, 3), 1), ((1, 2, 6), 2)])
    def test_conditional(self, shape, num_scales):
        flow = multiscale_realnvp(shape, num_scales=num_scales, context_dim=2, hidden=(1,), **SMALL)
        assert isinstance(flow, ConditionalCompose)
        check_transform(randomized(flow), torch.randn(2, math.prod(shape)), context=torch.randn(2, 2))

    @pytest.mark.parametrize(
        "shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (1, 7, 7), (1, 4, 8), (2, 1, 1), (1, 1, 1)]
    )
    @pytest.mark.parametrize("context_dim", [None, 3])
    def test_starts_as_the_identity(self, shape, context_dim):
        flow = multiscale_realnvp(shape, num_layers=1, channels=4, num_blocks=1, context_dim=context_dim)
        x = torch.randn(2, math.prod(shape))
        transform = flow if context_dim is None else flow.condition(torch.randn(2, 3))
        y, log_det = transform.forward_and_log_det(x)
        assert torch.equal(y, x)
        assert torch.equal(log_det, torch.zeros(2))

    @pytest.mark.parametrize(
        ("shape", "nets"),
        [
            ((1, 7, 7), [(1, 7, 7)]),
            ((1, 8, 8), [(2, 4, 4), (4, 4, 4), (1, 8, 8)]),
            (
                (1, 28, 28),
                [(4, 7, 7), (8, 7, 7), (2, 14, 14), (4, 14, 14), (1, 28, 28)],
            ),
        ],
    )
    def test_architecture(self, shape, nets):
        flow = multiscale_realnvp(shape, channels=1, num_blocks=1)
        shapes = [m.shape for m in flow.modules() if isinstance(m, ConvResNet)]
        assert shapes == [nets[0]] * 4 + [net for net in nets[1:] for _ in range(3)]

    def test_is_the_composition_that_the_paper_draws(self):
        """Pixels to noise by hand: checkerboard, squeeze, channels, split, checkerboards, pixels' order."""
        shape = (1, 4, 4)
        flow = randomized(multiscale_realnvp(shape, num_scales=2, **SMALL))
        *last, channels, board = [m for m in flow.modules() if isinstance(m, Coupling)]
        images, squeeze = torch.randn(5, 16), Squeeze2d(shape)
        value, log_det = board.inverse_and_log_det(images)
        value, more = channels.inverse_and_log_det(squeeze(value))
        log_det = log_det + more
        kept, noise = value.chunk(2, -1)
        for layer in reversed(last):
            kept, more = layer.inverse_and_log_det(kept)
            log_det = log_det + more
        expected = squeeze.inv(torch.cat([kept, noise], -1))
        actual, total = flow.inverse_and_log_det(images)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(total, log_det)

    def test_inverts_in_float32(self):
        flow = randomized(multiscale_realnvp((1, 8, 8), channels=8), 0.05).float()
        x = torch.randn(50, 64, dtype=torch.float32)
        y, log_det = flow.forward_and_log_det(x)
        back, back_det = flow.inverse_and_log_det(y)
        assert (y - x).abs().max() > 0.1
        torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(back_det, -log_det, atol=1e-3, rtol=1e-4)

    def test_default_activation_trains(self):
        """The kinks of the ReLU keep it from ``gradcheck``; the loss goes down all the same."""
        flow = multiscale_realnvp((1, 4, 4), num_scales=2, num_layers=2, channels=4, num_blocks=1)
        data = torch.randn(64, 16) * 0.2 + torch.linspace(-1, 1, 16)
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
        losses = []
        for _ in range(60):
            loss = -FlowDistribution(None, flow).log_prob(data).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(param.grad is not None and (param.grad != 0).any() for param in flow.parameters())
        # The entropy of the data's own law, which no density beats in expectation.
        entropy = 16 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.2))
        assert losses[0] > 16
        assert losses[-1] < entropy + 6

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_scales": 3, "shape": (1, 2, 6)}, "num_scales: expected at most 2 for sides 2 x 6, got 3"),
            ({"num_scales": 2, "shape": (1, 7, 8)}, "num_scales: expected at most 1 for sides 7 x 8, got 2"),
            ({"num_scales": 0}, "num_scales: expected a positive integer, got 0"),
            ({"num_layers": 0}, "num_layers: expected a positive integer, got 0"),
            ({"channels": 0}, "channels: expected a positive integer, got 0"),
            ({"num_blocks": 1.5}, "num_blocks: expected a positive integer, got 1.5"),
            ({"limit": -1.0}, "limit: expected a positive number, got -1.0"),
            ({"activation": "sine"}, "activation: expected one of"),
            ({"context_dim": 0}, "context_dim: expected a positive integer, got 0"),
            ({"shape": (8, 8)}, r"shape: expected \(channels, height, width\), got \(8, 8\)"),
        ],
    )
    def test_refuses(self, options, message):
        with pytest.raises(ValueError, match=message):
            multiscale_realnvp(**{"shape": (1, 4, 4), **options})


class TestLogit:
    @pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.05, 0.4])
    def test_properties(self, alpha):
        check_transform(Logit(3, alpha), torch.randn(4, 3))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_at_the_ends(self, dtype):
        """Closed forms at 0 and 1: ± logit(alpha), and a slope that is the same by symmetry."""
        alpha = 1e-6
        y = torch.tensor([[0.0], [1.0]], dtype=dtype)
        x, log_det = Logit(1, alpha).inverse_and_log_det(y)
        end = math.log(alpha) - math.log1p(-alpha)
        slope = math.log(1 - 2 * alpha) - math.log(alpha) - math.log1p(-alpha)
        torch.testing.assert_close(x[:, 0], torch.tensor([end, -end], dtype=dtype))
        torch.testing.assert_close(log_det, torch.tensor([slope, slope], dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_finite_everywhere(self, dtype):
        x = torch.tensor([[-1e4], [-90.0], [0.0], [90.0], [1e4]], dtype=dtype, requires_grad=True)
        for alpha in (0.0, 0.05):
            flow = Logit(1, alpha)
            for run in (flow.forward_and_log_det, flow.inverse_and_log_det):
                value, log_det = run(x)
                gradient = torch.autograd.grad((value.squeeze(-1) + log_det).sum(), x)[0]
                assert value.isfinite().all()
                assert log_det.isfinite().all()
                assert gradient.isfinite().all()

    def test_codomain(self):
        flow = Logit(2, alpha=0.05)
        assert flow.codomain.check(flow(2 * torch.randn(1000, 2))).all()
        assert flow.codomain.check(torch.tensor([[0.0, 1.0]])).all()
        assert not flow.codomain.check(torch.tensor([[0.5, 1.06]])).any()

    @pytest.mark.parametrize("alpha", [-0.1, 0.5, "0.1", math.nan, True])
    def test_refuses(self, alpha):
        with pytest.raises(ValueError, match=r"alpha: expected a number from 0 to below 0\.5, got"):
            Logit(2, alpha)


class TestDequantize:
    def test_fills_the_cells_evenly(self):
        images = torch.arange(17).repeat(20_000, 1)
        y = dequantize(images, 17, torch.Generator().manual_seed(0))
        assert torch.equal((17 * y).floor().long(), images)
        inside = 17 * y - images
        assert (inside.mean(0) - 0.5).abs().max() < 4 / math.sqrt(12 * 20_000)
        assert (inside.var(0) - 1 / 12).abs().max() < 0.002

    def test_stays_below_one_in_float32(self, monkeypatch):
        monkeypatch.setattr(
            torch, "rand", lambda shape, **_: torch.full(shape, 1 - 2.0**-24, dtype=torch.float32)
        )
        assert (dequantize(torch.full((3,), 255), 256) < 1).all()

    def test_generator(self):
        images = torch.randint(0, 5, (4, 3), dtype=torch.uint8)
        first, second = (dequantize(images, 5, torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first, second)
        assert first.dtype == torch.get_default_dtype()
        assert dequantize(images[:0], 5).shape == (0, 3)

    @pytest.mark.parametrize(
        ("images", "num_levels", "message"),
        [
            (torch.tensor([0.5]), 2, "images: expected integers, got torch.float"),
            (torch.tensor([True]), 2, "images: expected integers, got torch.bool"),
            (torch.tensor([0, 17]), 17, "images: expected values from 0 to 16, got 0 to 17"),
            (torch.tensor([-1, 3]), 17, "images: expected values from 0 to 16, got -1 to 3"),
            (torch.tensor([0]), 0, "num_levels: expected a positive integer, got 0"),
        ],
    )
    def test_refuses(self, images, num_levels, message):
        with pytest.raises(ValueError, match=message):
            dequantize(images, num_levels)


class TestBitsPerDim:
    PROBABILITIES = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def expected_log_density(self, log_density):
        """E log p((x + u) / 4) for x from the probabilities, by the midpoint rule in u."""
        u = (torch.arange(2000) + 0.5) / 2000
        cells = (torch.arange(4).unsqueeze(-1) + u) / 4
        return (self.PROBABILITIES * log_density(cells).mean(-1)).sum()

    def entropy_bits(self):
        return -(self.PROBABILITIES * self.PROBABILITIES.log2()).sum()

    def test_uniform_density_costs_all_bits(self):
        assert bits_per_dim(torch.zeros(()), (3, 2, 2), 256).item() == 8.0
        torch.testing.assert_close(bits_per_dim(torch.zeros(5), 7, 17), torch.full((5,), math.log2(17)))

    def test_equals_the_entropy_for_a_piecewise_constant_density(self):
        log_prob = self.expected_log_density(lambda y: (4 * self.PROBABILITIES).log()[(4 * y).long()])
        torch.testing.assert_close(bits_per_dim(log_prob, 1, 4), self.entropy_bits())

    def test_is_a_bound_on_the_bits_of_the_cells(self):
        """A smooth density, 2 y: its cells have closed-form masses, and its bound lies above them."""
        bound = bits_per_dim(self.expected_log_density(lambda y: (2 * y).log()), 1, 4)
        edges = torch.arange(5) / 4
        masses = edges[1:] ** 2 - edges[:-1] ** 2
        own = -(self.PROBABILITIES * masses.log2()).sum()
        assert self.entropy_bits() < own < bound

    def test_adds_over_dimensions(self):
        log_prob = torch.randn(6)
        one = bits_per_dim(log_prob, 1, 17)
        torch.testing.assert_close(bits_per_dim(3 * log_prob, 3, 17), one)

    def test_of_a_flow_on_intensities(self):
        """Logit and flow in one: the density on the cube is normalised, so its bits are a bound."""
        flow = Compose([LowerAffine(2), Logit(2, alpha=0.05)])
        grid = (torch.arange(400) + 0.5) / 400
        points = torch.cartesian_prod(grid, grid)
        inside = FlowDistribution(None, flow).log_prob(points).exp().mean()
        end = torch.special.logit(torch.tensor(0.05))
        expected = (1 - 2 * torch.special.ndtr(end)) ** 2
        torch.testing.assert_close(inside, expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("shape", [0, (1, 0, 8), 2.5])
    def test_refuses(self, shape):
        with pytest.raises(ValueError, match="shape: expected a"):
            bits_per_dim(torch.zeros(()), shape, 2)


class TestDigits:
    def test_split(self):
        pytest.importorskip("sklearn")
        from pyro_flowvi.datasets import digits

        parts = digits()
        assert [part.images.shape for part in parts] == [(1297, 1, 8, 8), (100, 1, 8, 8), (400, 1, 8, 8)]
        assert [part.labels.shape for part in parts] == [(1297,), (100,), (400,)]
        assert all(part.num_levels == 17 for part in parts)
        assert min(part.images.min() for part in parts) == 0
        assert max(part.images.max() for part in parts) == 16
        dequantize(torch.from_numpy(parts[0].images), 17)

    def test_is_the_whole_set_in_an_order_that_the_seed_gives(self):
        sklearn = pytest.importorskip("sklearn.datasets")
        from pyro_flowvi.datasets import digits

        whole = sklearn.load_digits()
        parts = digits(seed=1)
        rows = sorted(
            (*image.flatten().tolist(), label)
            for part in parts
            for image, label in zip(part.images, part.labels, strict=True)
        )
        expected = sorted(
            (*map(int, image), label) for image, label in zip(whole.data, whole.target, strict=True)
        )
        assert rows == expected
        assert (digits(seed=1)[2].images == parts[2].images).all()
        assert (digits(seed=0)[2].images != parts[2].images).any()

    def test_says_what_to_install(self, monkeypatch):
        from pyro_flowvi.datasets import digits

        monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match="install pyro-flowvi with the extra 'sklearn'"):
            digits()
