"""The training of mixtures: its gradient, its best state, and what it keeps."""

import numpy as np
import pytest
import torch

from pyro_flowvi.models import VMoNF
from pyro_flowvi.models.mixture._training import MixtureTrainer, TrainingRows, _Batches, _Order


def some_model(num=3):
    torch.manual_seed(0)
    model = VMoNF(num, 2, num_layers=2, hidden=(4,)).double()
    with torch.no_grad():
        for param in model.parameters():
            param += 0.3 * torch.randn_like(param)
    return model


def rows_with_labels():
    torch.manual_seed(1)
    x, y = 1.5 * torch.randn(40, 2, dtype=torch.float64), torch.full((40,), -1)
    y[:6] = torch.arange(6) % 3
    allowed = (y[:, None] < 0) | (y[:, None] == torch.arange(3))
    return TrainingRows(x, allowed, torch.arange(40) % 3), y


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_gradient_is_that_of_the_likelihood(weighted):
    """Labelled rows count with their component, the others with the mixture, each as often as it counts."""
    model, (rows, y) = some_model(), rows_with_labels()
    counts = torch.arange(40.0).remainder(4) + 1 if weighted else torch.ones(40)
    rows = TrainingRows(rows.x, rows.allowed, rows.parts, counts.double() if weighted else None)
    trainer = MixtureTrainer(model)
    own = model.joint_log_prob(rows.x).gather(1, y.clamp(min=0)[:, None])[:, 0]
    each = torch.where(y >= 0, own, model.log_prob(rows.x))
    expected = -(each * counts).sum() / counts.sum()
    grads = torch.cat([grad.flatten() for grad in torch.autograd.grad(expected, trainer.params)])
    generator = torch.Generator().manual_seed(0)
    batches = _Batches(rows, 3000, 10, (0.0, 0.0), generator)
    losses, found = [], []
    for step in range(100):
        if not batches.left:
            batches.refill(0.5, 1.0, trainer.responsibilities)
        args = batches.draw()
        loss, *parts = trainer._program(args, 1 if step < 5 else 10_000)(*args)
        losses.append(loss.item() - batches.entropy)
        found.append(torch.cat([part.flatten() for part in parts]))
    found = torch.stack(found)
    error = found.std(0) / 10
    assert (found.mean(0) - grads).abs().div(error + 1e-3).max() < 5
    assert np.mean(losses) == pytest.approx(expected.item(), abs=0.01)
    torch.testing.assert_close(trainer.nll(rows), expected.item())


def test_partition_is_learnt_first():
    """Before the likelihood counts, a component sees the rows of its own part alone."""
    rows, _ = rows_with_labels()
    batches = _Batches(rows, 30, 10, (0.0, 0.0), torch.Generator().manual_seed(0))
    batches.refill(0.0, 0.0, lambda x, allowed: pytest.fail("no responsibilities are needed"))
    drawn, shares = batches.draw()
    assert drawn.shape == (10, 3, 2)
    torch.testing.assert_close(shares, torch.tensor([14, 13, 13]).double() / 40)
    for k in range(3):
        own = rows.x[rows.parts == k]
        assert (drawn[:, k, None] == own).all(-1).any(-1).all()
    assert batches.entropy == 0.0


def test_component_without_rows_is_run_on_any_and_does_not_count():
    rows, _ = rows_with_labels()
    only = TrainingRows(rows.x, rows.allowed, torch.zeros(40, dtype=torch.long))
    batches = _Batches(only, 30, 10, (0.0, 0.0), torch.Generator().manual_seed(0))
    batches.refill(0.0, 0.0, lambda x, allowed: None)
    drawn, shares = batches.draw()
    assert drawn.isfinite().all()
    assert shares.tolist() == [1.0, 0.0, 0.0]


def test_rows_come_as_often_as_they_count():
    rows, _ = rows_with_labels()
    counted = TrainingRows(rows.x[:3], rows.allowed[:3], rows.parts[:3], torch.tensor([2.0, 0.0, 3.0]))
    order = _Order(counted, torch.Generator().manual_seed(0))
    assert order.count == 5
    assert np.bincount(order.next(10), minlength=3).tolist() == [4, 0, 6]


def test_best_state_is_a_copy_that_was_scored():
    x = torch.as_tensor(np.random.default_rng(0).standard_normal((120, 2)))
    torch.manual_seed(0)
    trainer = MixtureTrainer(VMoNF(2, 2, num_layers=2, hidden=(4,)), lr=0.1)
    free = torch.ones(60, 2, dtype=torch.bool)
    train, held_out = (TrainingRows(part, free, torch.arange(60) % 2) for part in (x[::2], x[1::2]))
    outcome = trainer.run(train, 60, held_out)
    assert outcome.nll == pytest.approx(min(outcome.checks))
    assert trainer.nll(held_out) == outcome.nll


def test_a_run_ends_where_it_is_told_to():
    x = torch.randn(60, 2)
    free = torch.ones(60, 2, dtype=torch.bool)
    rows = TrainingRows(x, free, torch.arange(60) % 2)
    model = VMoNF(2, 2, num_layers=2, hidden=(4,))
    seen = []
    outcome = MixtureTrainer(model).run(
        rows, 200, rows, stop=lambda done, check, best: seen.append((done, check, best)) or done > 0.4
    )
    assert len(outcome.losses) == 100
    assert [check for _, check, _ in seen] == [0, 1, 2, 3]
