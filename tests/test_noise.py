"""Random numbers apart from the user's."""

import torch

from pyro_flowvi._noise import own_noise


class TestOwnNoise:
    def test_a_seed_gives_the_numbers_of_torchs_and_leaves_the_stream(self):
        torch.manual_seed(3)
        with own_noise(torch.device("cpu"), seed=7):
            drawn = torch.randn(4)
        after = torch.randn(4)
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.randn(4))
        torch.manual_seed(3)
        assert torch.equal(after, torch.randn(4))

    def test_on_the_cpu_no_gpu_is_seeded(self, monkeypatch):
        seeded = []
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
        with own_noise(torch.device("cpu"), seed=7):
            pass
        assert seeded == []
