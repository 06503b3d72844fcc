"""Superfluous components are merged, others stay, and the report says what happened."""

import math

import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_flowvi.models import VMoNF
from pyro_flowvi.models.mixture.merging import Step, annihilate
from pyro_flowvi.models.mixture.overlap import class_map_by_overlap, component_overlap

LOCS = [[-6.0, 0.0], [6.0, 0.0], [0.0, 8.0]]


def clusters(num=150):
    return torch.cat([loc + torch.randn(num, 2) for loc in torch.tensor(LOCS)])


def placed(locs, shares=None, **options):
    """A mixture of normals of unit scale at ``locs``, as flows."""
    locs = torch.as_tensor(locs, dtype=torch.get_default_dtype())
    model = VMoNF(len(locs), locs.shape[1], num_layers=2, hidden=(4,), **options)
    scales = torch.eye(locs.shape[1]).expand(len(locs), -1, -1)
    return model.place(locs, scales, None if shares is None else torch.tensor(shares))


FIVE = [[-6.5, 0.0], [6.0, 0.0], [-5.5, 0.5], [0.0, 8.0], [6.2, 0.3]]
QUICK = {"num_steps": 10, "refine_steps": 5}


class TestOverlap:
    def test_against_the_definition(self):
        model, x = placed([[-1.0, 0.0], [1.0, 0.0]], [0.3, 0.7]), torch.randn(200, 2)
        joint = torch.stack([-0.5 * (x - torch.tensor([m, 0.0])).square().sum(-1) for m in (-1.0, 1.0)], -1)
        r = (joint + torch.tensor([0.3, 0.7]).log()).softmax(-1)
        sums = r.mT @ r
        expected = sums[0, 1] / (sums[0, 0] * sums[1, 1]).sqrt()
        overlap = component_overlap(model, x, noise=0.0)
        torch.testing.assert_close(overlap, torch.tensor([[1.0, expected], [expected, 1.0]]))

    def test_equal_and_distant_components(self):
        overlap = component_overlap(placed([[-6.0, 0.0], [-6.0, 0.0], [6.0, 0.0]]), clusters()[:300])
        assert overlap[0, 1].item() == pytest.approx(1.0, abs=1e-6)
        assert overlap[0, 2] < 1e-6

    def test_a_component_without_rows(self):
        assert component_overlap(placed([[-6.0, 0.0], [999.0, 0.0]]), clusters()).isfinite().all()

    def test_pieces_of_a_curve_are_one_class(self):
        """A line of five pieces, each of which touches the next, and a piece elsewhere."""
        locs = [[4.0, 0.0], [0.0, 20.0], [0.0, 0.0], [8.0, 0.0], [2.0, 0.0], [6.0, 0.0]]
        x = torch.cat([loc + torch.randn(100, 2) for loc in torch.tensor(locs)])
        assert class_map_by_overlap(placed(locs), x, 2) == [0, 1, 0, 0, 0, 0]
        assert class_map_by_overlap(placed(locs), x, 1) == [0] * 6
        assert class_map_by_overlap(placed(locs), x, 6) == list(range(6))

    def test_one_component(self):
        assert class_map_by_overlap(placed([[0.0, 0.0]]), torch.randn(30, 2), 1) == [0]

    @pytest.mark.parametrize("num", [0, 4])
    def test_too_many_classes(self, num):
        with pytest.raises(ValueError, match=r"^num_classes: expected"):
            class_map_by_overlap(placed(LOCS), clusters(), num)


class TestAnnihilate:
    def test_down_to_the_clusters(self):
        x, model = clusters(), placed(FIVE)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = annihilate(model, x, **QUICK)
        assert result.model.num_components == 3
        assert sorted(result.groups) == [(0, 2), (1, 4), (3,)]
        new = dict(enumerate(result.classes))
        assert new[0] == new[2] != new[1] == new[4] != new[3]
        assert result.nll_after < result.nll_before + 0.1
        parts = result.model.responsibilities(x).argmax(-1).reshape(3, -1)
        assert all((row == row[0]).all() for row in parts)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_weights_are_added(self):
        model = placed(FIVE, [0.1, 0.2, 0.3, 0.25, 0.15])
        result = annihilate(model, clusters(), **{**QUICK, "refine_steps": 0})
        expected = torch.tensor(
            [sum((0.1, 0.2, 0.3, 0.25, 0.15)[k] for k in group) for group in result.groups]
        )
        torch.testing.assert_close(result.model.mixture().weights, expected)

    def test_the_report(self):
        result = annihilate(placed(FIVE), clusters(), **QUICK)
        assert [step.num_components for step in result.steps if step.accepted] == [5, 4]
        for step in result.steps:
            assert step.accepted == (step.hurt <= 2 * step.standard_error)
            assert 0.01 < step.overlap <= 1
        lines = str(result).splitlines()
        assert lines[0].startswith("5 -> 3 components, held-out NLL")
        assert lines[1].startswith("5 -> 4: ")
        assert str(Step(4, ((1,), (0, 2)), 0.1, 0.3, 0.1, False)).startswith("4 -> 4: (1) and (0, 2) are two")

    def test_overlapping_clusters_that_are_two_stay_two(self):
        """Two thin lines that cross: a flow with two layers cannot be both."""
        x = torch.randn(600, 2) * torch.tensor([3.0, 0.05])
        x[300:] = x[300:].flip(-1)
        model = placed([[0.0, 0.0], [0.0, 0.0]])
        model.place(torch.zeros(2, 2), torch.diag_embed(torch.tensor([[3.0, 0.05], [0.05, 3.0]])))
        result = annihilate(model, x, **QUICK)
        assert result.groups == ((0,), (1,))
        (step,) = result.steps
        assert not step.accepted
        assert step.hurt > 2 * step.standard_error
        assert step.overlap > 0.01

    def test_components_without_rows_go(self):
        result = annihilate(placed([*LOCS, [500.0, 0.0], [0.0, -700.0]]), clusters(), **QUICK)
        assert result.groups == ((0,), (1,), (2,))
        assert result.classes == [0, 1, 2, -1, -1]
        assert [len(step.merged) for step in result.steps] == [1, 1]
        assert "has no rows" in str(result)

    def test_no_further_than_asked(self):
        assert annihilate(placed(FIVE), clusters(), min_components=4, **QUICK).model.num_components == 4

    def test_classes_are_not_mixed(self):
        model = placed(FIVE, classes=[0, 0, 1, 1, 0])
        result = annihilate(model, clusters(), **QUICK)
        assert sorted(result.groups) == [(0,), (1, 4), (2,), (3,)]
        assert result.model.classes.tolist() == [0, 0, 1, 1]
        assert result.model.num_classes == 2

    @pytest.mark.parametrize(
        "options",
        [
            {"weights": "dirichlet"},
            *(
                pytest.param(options, marks=pytest.mark.long)
                for options in ({"inference": "amortized"}, {"shared_layers": 1}, {"index_dim": 1})
            ),
        ],
        ids=str,
    )
    def test_every_kind_of_mixture(self, options):
        result = annihilate(placed(FIVE, **options), clusters(), **QUICK)
        assert result.model.num_components < 5
        assert all(param.requires_grad for param in result.model.parameters())
        assert result.model.mixture().weights.sum().item() == pytest.approx(1.0)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        assert math.isfinite(elbo.loss(result.model.model, result.model.guide, clusters(20)))

    @pytest.mark.long
    def test_the_seed_decides(self):
        model, x = placed(FIVE), clusters()
        first, again = (annihilate(model, x, seed=3, **QUICK) for _ in range(2))
        assert first.steps == again.steps
        assert first.nll_after == again.nll_after

    def test_held_out_rows_of_their_own(self):
        x, judge = clusters(), clusters(50)
        result = annihilate(placed(FIVE), x, validation=judge, **QUICK)
        assert result.nll_after == pytest.approx(-result.model.log_prob(judge).mean().item())

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"x": torch.zeros(100, 3)}, "x"),
            ({"x": torch.zeros(10, 2)}, "x"),
            ({"min_components": 0}, "min_components"),
            ({"tolerance": 0.0}, "tolerance"),
            ({"num_steps": 0}, "num_steps"),
            ({"refine_steps": -1}, "refine_steps"),
            ({"lr": 0.0}, "lr"),
            ({"batch_size": 0}, "batch_size"),
            ({"validation": 1.0}, "validation"),
            ({"validation": torch.zeros(5, 3)}, "validation"),
        ],
        ids=str,
    )
    def test_bad_arguments_are_named(self, change, name):
        arguments = {"model": placed(LOCS), "x": clusters(20), **change}
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            annihilate(**arguments)

    def test_fixed_weights_are_refused(self):
        with pytest.raises(ValueError, match="model: expected learned or Dirichlet weights, got fixed ones"):
            annihilate(placed(LOCS, weights="fixed"), clusters(20))
