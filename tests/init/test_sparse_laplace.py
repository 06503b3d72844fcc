"""Sparse Hessians and their factors, against autograd's and dense linear algebra."""

import numpy as np
import pytest
import torch

from pyro_flowvi.init import sparse_laplace
from pyro_flowvi.init.sparse_laplace import SparseHessian


def products_of(log_density):
    """Hessian-vector products of a log density of one point."""

    def products(points, directions):
        found = [
            torch.autograd.functional.hvp(log_density, z, v)[1]
            for z, v in zip(points, directions, strict=True)
        ]
        return torch.stack(found) if found else points

    return products


def batched_products(log_density):
    """The same of a log density ``(P, D) -> (P,)``, for thousands of latents."""

    def products(points, directions):
        with torch.enable_grad():
            at = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_density(at).sum(), at, create_graph=True)
            return torch.autograd.grad((gradient * directions).sum(), at)[0]

    return products


def diagonal(z):
    return -(z[1:].cosh() + z[0] * z[1:]).sum() - z[0] ** 4


def tree(z):
    """Two roots, three parents, each with two children."""
    mu, log_tau, parents, children = z[0], z[1], z[2:5], z[5:].reshape(3, 2)
    top = -0.5 * ((parents - mu) / log_tau.exp()).square().sum() - 3.0 * log_tau
    return top - (children - parents[:, None]).cosh().sum() - children.exp().sum()


def chain(z):
    steps = z[2:] - 0.9 * z[1:-1]
    return -steps.cosh().sum() - z[1:].exp().sum() - z[0].square() * z[1]


def dense(z):
    weights = torch.linspace(-1.0, 1.0, 5 * len(z), dtype=z.dtype).reshape(5, len(z)).cos()
    return -(weights @ z).exp().sum() - z.square().sum()


def crossed(z):
    rows, columns = z[1:5], z[5:]
    return -(rows[:, None] + columns).exp().sum() - z.square().sum() + z[0] * rows.sum()


DENSITIES = {
    "diagonal": (diagonal, 9, range(1, 9), 1),
    "tree": (tree, 11, range(2, 11), 3),
    "chain": (chain, 12, range(1, 12), 3),
    "dense": (dense, 6, range(6), 6),
    "crossed": (crossed, 8, range(1, 8), 7),
}


def setting(name):
    """The negative Hessian by autograd at some points, and the one in question."""
    log_density, dim, places, most_groups = DENSITIES[name]
    places = torch.tensor(places)
    start, points = torch.randn(dim), 0.7 * torch.randn(3, dim)
    hessian = SparseHessian(products_of(log_density), start, places, [len(places)])
    full = torch.stack([torch.autograd.functional.hessian(log_density, z) for z in points])
    return hessian, points, -full[:, places][:, :, places].numpy(), most_groups


def random_precision(size, links, rng):
    """A sparse positive definite matrix."""
    matrix = np.zeros((size, size))
    for i, j in links:
        matrix[i, j] = matrix[j, i] = rng.normal()
    return matrix + np.diag(np.abs(matrix).sum(0) + rng.uniform(0.1, 1.0, size))


def quadratic(matrix):
    known = torch.from_numpy(matrix)
    return SparseHessian(
        lambda z, v: -(v.double() @ known),
        torch.zeros(len(matrix)).double(),
        torch.arange(len(matrix)),
        [len(matrix)],
    )


def conditional(matrix, start, width):
    """The precision of some latents given all before them: what is after them integrated."""
    here, after = slice(start, start + width), slice(start + width, None)
    link = matrix[here, after]
    return matrix[here, here] - link @ np.linalg.solve(matrix[after, after], link.T)


@pytest.mark.parametrize("name", DENSITIES)
class TestMatrix:
    def test_equals_autograds(self, name):
        hessian, points, expected, _ = setting(name)
        assert hessian.usable
        for found, wanted in zip(hessian.at(points), expected, strict=True):
            np.testing.assert_allclose(found.toarray(), wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())

    def test_number_of_products(self, name):
        """Columns without a row in common are computed together."""
        hessian, _, _, most_groups = setting(name)
        assert len(hessian.groups) <= most_groups
        assert hessian.diagonal == (name == "diagonal")
        assert sorted(np.concatenate(hessian.groups)) == list(range(hessian.size))

    def test_newton_step(self, name):
        hessian, points, expected, _ = setting(name)
        for matrix, wanted in zip(hessian.at(points), expected, strict=True):
            factor = hessian.eliminate(matrix, np.full(hessian.size, 1e-8))
            if np.linalg.eigvalsh(wanted).min() > 1e-3:
                gradient = np.random.default_rng(0).normal(size=hessian.size)
                found = np.linalg.solve(wanted, gradient)
                np.testing.assert_allclose(factor.solve(gradient), found, rtol=1e-7, atol=1e-9)


PATTERNS = {
    "diagonal": (8, []),
    "chain": (9, [(i, i + 1) for i in range(8)]),
    "second-order chain": (9, [(i, i + k) for k in (1, 2) for i in range(9 - k)]),
    "star": (9, [(0, i) for i in range(1, 9)]),
    "star, its centre last": (9, [(8, i) for i in range(8)]),
    "crossed": (9, [(i, j) for i in range(4) for j in range(4, 9)]),
    "blocks": (9, [(i, j) for b in (0, 3, 6) for i in range(b, b + 3) for j in range(b, i)]),
    "dense": (7, [(i, j) for i in range(7) for j in range(i)]),
}


@pytest.mark.parametrize("name", PATTERNS)
class TestElimination:
    @staticmethod
    def factor(name):
        rng = np.random.default_rng(7)
        matrix = random_precision(*PATTERNS[name], rng)
        hessian = quadratic(matrix)
        (own,) = hessian.at(torch.zeros(1, len(matrix)).double())
        return matrix, hessian.eliminate(own, np.full(len(matrix), 1e-8)), rng

    def test_pivots_are_conditional_precisions(self, name):
        matrix, factor, _ = self.factor(name)
        expected = [conditional(matrix, i, 1).item() for i in range(len(matrix))]
        np.testing.assert_allclose(factor.pivots, expected, rtol=1e-9)

    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_blocks_are_conditional_precisions(self, name, width):
        matrix, factor, _ = self.factor(name)
        for start in range(0, len(matrix) - width + 1):
            found, expected = factor.block(start, width), conditional(matrix, start, width)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)

    def test_solve(self, name):
        matrix, factor, rng = self.factor(name)
        gradient = rng.normal(size=len(matrix))
        np.testing.assert_allclose(factor.solve(gradient), np.linalg.solve(matrix, gradient), rtol=1e-9)

    def test_determinant(self, name):
        matrix, factor, _ = self.factor(name)
        assert np.log(factor.pivots).sum() == pytest.approx(np.linalg.slogdet(matrix)[1])


class TestNotPositive:
    """Away from a mode the matrix may have any sign: a step must still go up."""

    @pytest.mark.parametrize("name", PATTERNS)
    def test_is_raised(self, name):
        rng = np.random.default_rng(3)
        size, links = PATTERNS[name]
        matrix = random_precision(size, links, rng) - 1.5 * np.eye(size)
        matrix[2, 2] = -4.0
        hessian = quadratic(matrix)
        (own,) = hessian.at(torch.zeros(1, size).double())
        prior = np.full(size, 0.5)
        factor = hessian.eliminate(own, prior)
        assert factor is not None
        assert (factor.pivots > 0.05 * prior - 1e-12).all()
        gradient = rng.normal(size=size)
        assert gradient @ factor.solve(gradient) > 0

    def test_flat_directions_have_the_priors_scale(self):
        hessian = quadratic(np.zeros((3, 3)))
        (own,) = hessian.at(torch.zeros(1, 3).double())
        factor = hessian.eliminate(own, np.full(3, 2.0))
        assert (factor.pivots >= 0.1).all()
        assert np.isfinite(factor.solve(np.ones(3))).all()

    def test_a_positive_matrix_is_left_as_it_is(self):
        rng = np.random.default_rng(0)
        matrix = random_precision(6, [(0, 3), (1, 2), (4, 5)], rng)
        hessian = quadratic(matrix)
        (own,) = hessian.at(torch.zeros(1, 6).double())
        before = own.toarray().copy()
        factor = hessian.eliminate(own, np.diag(matrix) / 10.0)
        np.testing.assert_array_equal(own.toarray(), before)
        np.testing.assert_allclose(np.linalg.inv(matrix) @ np.ones(6), factor.solve(np.ones(6)))


class TestManyLatents:
    """More than are looked at one by one: the pattern of a large site comes from sums of columns."""

    num = 1100

    def check(self, log_density, dim, sizes, columns, seed=0):
        generator = torch.Generator().manual_seed(seed)
        start = 0.3 * torch.randn(dim, generator=generator)
        products, places = batched_products(log_density), torch.arange(dim - sum(sizes), dim)
        hessian = SparseHessian(products, start, places, sizes)
        assert hessian.usable
        point = 0.5 * torch.randn(1, dim, generator=generator)
        (found,) = hessian.at(point)
        chosen = [c % hessian.size for c in columns]
        directions = torch.zeros(len(chosen), dim)
        directions[range(len(chosen)), places[chosen]] = 1.0
        expected = -products(point.expand(len(chosen), -1), directions)[:, places].numpy()
        np.testing.assert_allclose(found[chosen].toarray(), expected, rtol=1e-8, atol=1e-8)
        return hessian, found

    def test_groups(self):
        def log_density(z):
            return -(z[:, 1:] - z[:, :1]).cosh().sum(-1) - z[:, 1:].exp().sum(-1)

        hessian, _ = self.check(log_density, self.num + 1, [self.num], [0, 1, 500, -1])
        assert hessian.diagonal
        assert len(hessian.groups) == 1

    def test_two_sites_of_each_group(self):
        def log_density(z):
            a, b = z[:, 1 : self.num + 1], z[:, self.num + 1 :]
            return -((a + b).exp() + a.square() + b.square() + z[:, :1] * a).sum(-1)

        hessian, _ = self.check(log_density, 2 * self.num + 1, [self.num] * 2, [0, 7, self.num + 7, -1])
        assert len(hessian.groups) == 2
        assert not hessian.diagonal

    @pytest.mark.parametrize("order", ["in order", "shuffled", "uneven"])
    def test_children_of_parents(self, order):
        parents = 300
        generator = torch.Generator().manual_seed(1)
        index = torch.arange(self.num) % parents
        if order == "shuffled":
            index = index[torch.randperm(self.num, generator=generator)]
        elif order == "uneven":
            index = (torch.rand(self.num, generator=generator) ** 3 * parents).long()

        def log_density(z):
            a, c = z[:, 1 : parents + 1], z[:, parents + 1 :]
            return -((c - a[:, index]).cosh() + c.exp()).sum(-1) - (a - z[:, :1]).cosh().sum(-1)

        columns = [0, 1, parents - 1, parents, parents + 400, -1]
        hessian, found = self.check(log_density, 1 + parents + self.num, [parents, self.num], columns)
        factor = hessian.eliminate(found, np.full(hessian.size, 1e-8))
        gradient = np.random.default_rng(0).normal(size=hessian.size)
        np.testing.assert_allclose(found @ factor.solve(gradient), gradient, rtol=1e-7, atol=1e-9)
        # Each parent with its children is a tree: its pivot is its own entry, less what each child explains.
        matrix = found.tocsr()
        link = matrix[:parents, parents:].power(2) @ (1.0 / matrix.diagonal()[parents:])
        np.testing.assert_allclose(factor.pivots[:parents], matrix.diagonal()[:parents] - link, rtol=1e-7)

    def test_small_sites_beside_a_large_one(self):
        """A regression's weights are coupled with each other and with every group."""

        def log_density(z):
            w, a = z[:, :4], z[:, 4:]
            design = torch.linspace(-1.0, 1.0, 4 * self.num, dtype=z.dtype).reshape(4, -1).cos()
            return -(w @ design + a).cosh().sum(-1) - a.square().sum(-1) - w.exp().sum(-1)

        self.check(log_density, 4 + self.num, [4, self.num], [0, 3, 4, 600, -1])

    def test_numbers_of_one_site_that_are_coupled(self):
        def log_density(z):
            return -(z[:, 1:] - z[:, :-1]).cosh().sum(-1) - z.square().sum(-1)

        start = 0.3 * torch.randn(self.num)
        hessian = SparseHessian(batched_products(log_density), start, torch.arange(self.num), [self.num])
        assert not hessian.usable

    def test_a_chain_of_many_sites(self):
        """Every site is small, and there are more than a thousand: no pattern is looked for."""

        def log_density(z):
            return -(z[:, 1:] - z[:, :-1]).cosh().sum(-1) - z.square().sum(-1)

        start = 0.3 * torch.randn(self.num)
        hessian = SparseHessian(batched_products(log_density), start, torch.arange(self.num), [1] * self.num)
        assert not hessian.usable

    def test_independent_of_the_way(self, monkeypatch):
        """By site and column by column."""
        index = torch.arange(40) % 8

        def log_density(z):
            a, c = z[:, 1:9], z[:, 9:]
            return -((c - a[:, index]).cosh() + c.exp()).sum(-1) - (a - z[:, :1]).cosh().sum(-1)

        start, point = torch.randn(49), torch.randn(1, 49)
        places = torch.arange(1, 49)
        (expected,) = SparseHessian(batched_products(log_density), start, places, [8, 40]).at(point)
        monkeypatch.setattr(sparse_laplace, "MAX_PROBED", 10)
        monkeypatch.setattr(sparse_laplace, "SMALL_SITE", 9)
        (found,) = SparseHessian(batched_products(log_density), start, places, [8, 40]).at(point)
        np.testing.assert_allclose(found.toarray(), expected.toarray(), rtol=1e-9, atol=1e-12)


def test_a_density_in_float32():
    hessian, points, expected, _ = setting("tree")
    single = SparseHessian(
        lambda z, v: products_of(tree)(z, v), torch.randn(11, dtype=torch.float32), hessian.places, [9]
    )
    (found,) = single.at(points[:1].float())
    np.testing.assert_allclose(found.toarray(), expected[0], rtol=1e-4, atol=1e-4 * np.abs(expected[0]).max())
