"""Learning rates against their closed form, plateaus against constructed gains."""

import math

import pytest
import torch

from pyro_flowvi.infer._schedule import PATIENCE, PLATEAU_GAIN, CosineSchedule, is_rising


class TestCosineSchedule:
    def test_closed_form(self):
        schedule = CosineSchedule(1000, warm_up=100, final_share=0.01)
        for step in (0, 1, 37, 99, 100, 101, 500, 731, 999, 1000):
            fall = 0.01 + 0.99 * math.cos(0.5 * math.pi * step / 1000) ** 2  # the half-angle formula
            expected = 0.3 * min(step + 1, 100) / 100 * fall
            assert schedule.rate(step, 0.3) == pytest.approx(expected, rel=1e-12)

    def test_without_warm_up_it_is_that_of_torch(self):
        optim = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 250, 0.01 * 0.02)
        schedule = CosineSchedule(250, final_share=0.01)
        for step in range(251):
            assert schedule.rate(step, 0.02) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
            optim.step()
            theirs.step()

    def test_ends(self):
        assert CosineSchedule(40).rate(0, 2.0) == 2.0
        assert CosineSchedule(40).rate(40, 2.0) == pytest.approx(0.0, abs=1e-12)
        flat = CosineSchedule(40, warm_up=20, final_share=1.0)
        assert [flat.rate(step, 1.0) for step in (0, 9, 19, 39)] == pytest.approx([0.05, 0.5, 1.0, 1.0])


class TestPlateau:
    def noise(self, scale):
        generator = torch.Generator().manual_seed(0)
        return [scale * torch.randn(256, generator=generator) for _ in range(PATIENCE + 1)]

    def test_a_rise_beyond_the_noise(self):
        assert is_rising([noise + 0.01 * i for i, noise in enumerate(self.noise(1e-3))])
        assert not is_rising([noise - 0.01 * i for i, noise in enumerate(self.noise(1e-3))])

    def test_a_gain_that_is_sure_but_too_small(self):
        gain = 0.9 * PLATEAU_GAIN
        recent = [torch.full((256,), gain if i >= PATIENCE // 2 else 0.0) for i in range(PATIENCE)]
        assert not is_rising(recent)

    def test_noise_in_which_a_plateau_cannot_be_told(self):
        level = [noise - noise.mean() for noise in self.noise(2.0)]
        assert is_rising(level)
        assert not is_rising(level, blurred=False)

    def test_a_draw_without_density(self):
        level = self.noise(1e-3)
        level[-1][0] = -math.inf
        assert is_rising(level)
