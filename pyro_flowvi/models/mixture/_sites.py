"""The sites of a mixture of flows in a Pyro program: the component of each row, its label, and the row."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..._checks import check_positive_int
from ..._program.param_store import NamedModel
from ...distributions import MixtureOfFlows
from ...nn import MLP
from ...transforms.compose import Chain
from ._parts import Weights, check_logits, check_rows, known_rows

__all__ = ["ComponentSites"]


class ComponentSites(NamedModel):
    """What model and guide of a :class:`VMoNF` sample, for programs of its own and for larger ones.

    Example::

        >>> issubclass(pyro_flowvi.VMoNF, ComponentSites)
        True
    """

    temperature: Tensor
    classes: Tensor
    dim: int
    num_classes: int
    inference: str
    weights_kind: str
    concentration: float
    supervised_weight: float
    classifier_weight: float
    consistency: float
    consistency_noise: float
    consistency_ramp: int
    flow: Chain
    weights: Weights
    weights_posterior: Weights
    classifier: MLP

    @property
    def num_components(self) -> int:
        """The number K of components."""
        return len(self.classes)

    # -- programs of rows alone ---------------------------------------------------------------------

    def model(
        self, x: Tensor, y: Tensor | None = None, *, size: int | None = None, step: Tensor | int | None = None
    ) -> None:
        """The generative model of a batch: sites "component", "label" and "x" in the plate "data".

        :param x: rows of data, shape ``(N, D)``.
        :param y: labels, integers of shape ``(N,)``, from 0 to C - 1, or -1 for a row without one.
        :param size: the number of rows of the whole data, if the batch is a part of it: its log densities are
            scaled by ``size / N``.
        :param step: the number of the step, for the consistency loss to rise with.
        :raises ValueError: if an argument is not of the described kind; values are looked at while Pyro's
            validation is on.
        """
        check_rows(x, y, self.dim, self.num_classes)
        logits = self._sampled_logits(x) if self.weights_kind == "dirichlet" else None
        with self._plate(x, size):
            self.sample_component(x, y, logits=logits, step=step)

    def guide(
        self, x: Tensor, y: Tensor | None = None, *, size: int | None = None, step: Tensor | int | None = None
    ) -> None:
        """The guide of a batch: with exact inference of the weights' posterior alone, if they have one.

        The arguments are those of :meth:`model`.
        """
        if self.weights_kind == "dirichlet":
            self.announce("weights_posterior")
            pyro.sample("weights", self._dirichlet())
        if self.inference == "amortized":
            with self._plate(x, size):
                self.guide_component(x, y)

    # -- sites of a larger program ------------------------------------------------------------------

    def sample_component(
        self,
        x: Tensor | None,
        y: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        mask: Tensor | None = None,
        step: Tensor | int | None = None,
    ) -> Tensor:
        """Samples the component of each row in a model of yours, within its plate of rows.

        The sites are "component", which Pyro enumerates, "x" and, with ``y``, "label"; the parameters are in
        the param store under :attr:`name`.  A subsampled plate scales them.  What further depends on the
        component takes it as an index: ``Vindex(alpha)[..., component]``.

        :param x: rows of data, shape ``(*, D)``, whose other dimensions are those of the plates around; None
            to draw them at the site "x".
        :param y: labels, integers of shape ``(*,)``, from 0 to C - 1, or -1 for a row without one.
        :param logits: log weights of the components in place of the mixture's own, up to a constant, shape
            ``(*, K)``: of a site of yours, or other ones for each row.  Needed with Dirichlet weights, whose
            site does not stand in the plate.
        :param mask: which rows of ``x`` are known, booleans of shape ``(*,)``; the others count with what
            else depends on their component.
        :param step: the number of the step, for the consistency loss to rise with.
        :return: the components, integers that broadcast with ``(*,)``.
        :raises ValueError: if an argument is not of the described kind; values are looked at while Pyro's
            validation is on.

        Example::

            >>> def model(x, y, outcome):
            ...     level = pyro.sample("level", dist.Normal(torch.zeros(2), 5.0).to_event(1))
            ...     with pyro.plate("rows", len(x)):
            ...         component = vmonf.sample_component(x, y)
            ...         loc = pyro.ops.indexing.Vindex(level)[..., component]
            ...         pyro.sample("outcome", dist.Normal(loc, 1.0), obs=outcome)
            >>> vmonf = pyro_flowvi.VMoNF(2, 2, num_layers=2, hidden=(8,))
            >>> data = torch.randn(6, 2), torch.tensor([0, 1, -1, -1, -1, -1]), torch.randn(6)
            >>> guide = pyro.infer.autoguide.AutoNormal(pyro.poutine.block(model, hide=["component"]))
            >>> elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
            >>> elbo.compute_marginals(model, guide, *data)["component"].probs.shape
            torch.Size([6, 2])
        """
        if x is not None:
            x = known_rows(x, mask)
            check_rows(x, y, self.dim, self.num_classes, matrix=False)
        mixture = self._announced(logits)
        component: Tensor = pyro.sample(
            "component", dist.Categorical(logits=mixture.logits), infer={"enumerate": "parallel"}
        )
        rows: Any = mixture.given(component)
        pyro.sample("x", rows if mask is None else rows.mask(mask), obs=x)
        if y is not None:
            # The class is a function of the component: the others' probability is zero.
            seen = dist.Categorical(logits=self._class_logits(mixture.logits)[component])
            labelled = y != -1
            pyro.sample("label", seen.mask(labelled), obs=torch.where(labelled, y, 0))
        if x is not None and y is not None:
            self._weigh_labels(mixture, x, y, mask)
        if x is not None and self.consistency:
            agreement = self._ramp(step) * self._agreement(mixture, x)
            pyro.factor("consistency", agreement if mask is None else torch.where(mask, agreement, 0.0))
        return component

    def guide_component(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Samples the component of each row in a guide of yours, within its plate, by q(c | x).

        With amortized inference; with exact inference a guide leaves the component out.  The classifier sees
        the row alone: where more depends on the component, the bound is looser, and one of your own that
        sees it all is better.

        :param x: rows of data, shape ``(*, D)``.
        :param y: labels as of :meth:`sample_component`; rows with one have components of that class alone.
        :return: the components, integers that broadcast with ``(*,)``.
        :raises ValueError: with exact inference, or if an argument is not of the described kind.
        """
        self._check_amortized()
        check_rows(x, y, self.dim, self.num_classes, matrix=False)
        self.announce("classifier")
        logits = self._classifier_logits(x)
        if y is not None:
            allowed = (y.unsqueeze(-1) == self.classes) | (y == -1).unsqueeze(-1)
            logits = torch.where(allowed, logits, -torch.inf)
        component: Tensor = pyro.sample(
            "component", dist.Categorical(logits=logits), infer={"enumerate": "parallel"}
        )
        return component

    # -- what they are made of ----------------------------------------------------------------------

    def _mixture(self, logits: Tensor) -> MixtureOfFlows:
        raise NotImplementedError

    def _announced(self, logits: Tensor | None) -> MixtureOfFlows:
        """The mixture, with its parameters shown to Pyro."""
        if logits is not None:
            check_logits(logits, self.num_components)
            self.announce("flow")
            return self._mixture(logits)
        if self.weights_kind == "dirichlet":
            raise ValueError(
                "logits: expected the logarithms of weights that were drawn outside of the plate, since this "
                f"{type(self).__name__} has weights='dirichlet', got None"
            )
        self.announce("flow", "weights")
        return self._mixture(self.weights.logits)

    def _plate(self, x: Tensor, size: int | None) -> Any:
        if size is None:
            return pyro.plate("data", len(x), dim=-1)
        if check_positive_int("size", size) < len(x):
            raise ValueError(f"size: expected at least the {len(x)} rows of the batch, got {size}")
        return pyro.plate("data", size, subsample=torch.arange(len(x), device=x.device), dim=-1)

    def _sampled_logits(self, like: Tensor) -> Tensor:
        prior = dist.Dirichlet(like.new_full((self.num_components,), self.concentration))
        weights: Tensor = pyro.sample("weights", prior)
        return weights.clamp_min(torch.finfo(weights.dtype).tiny).log()

    def _dirichlet(self) -> dist.Dirichlet:
        return dist.Dirichlet(self.weights_posterior.logits.exp())

    def _class_logits(self, like: Tensor) -> Tensor:
        mine = self.classes.unsqueeze(-1) == torch.arange(self.num_classes, device=like.device)
        return torch.where(mine, like.new_zeros(()), -torch.inf)

    def _check_amortized(self) -> None:
        if self.inference == "exact":
            raise ValueError("inference: expected 'amortized', got 'exact'; see responsibilities")

    def _classifier_logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x) / self.temperature
        return logits

    def _weigh_labels(self, mixture: MixtureOfFlows, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """What rows with a label count for beyond their likelihood."""
        allowed, labelled = y.unsqueeze(-1) == self.classes, y != -1
        if self.supervised_weight != 1.0:
            each = mixture.component_log_prob(x)
            joint = mixture.logits + (each if mask is None else torch.where(mask.unsqueeze(-1), each, 0.0))
            joint = torch.where(allowed, joint, -torch.inf).logsumexp(-1)
            more = torch.where(labelled, (self.supervised_weight - 1.0) * joint, 0.0)
            pyro.factor("supervised", more)
        if self.classifier_weight:
            self.announce("classifier")
            log_q = self._classifier_logits(x).log_softmax(-1)
            log_q = torch.where(allowed, log_q, -torch.inf).logsumexp(-1)
            shown = labelled if mask is None else labelled & mask
            pyro.factor("classified", torch.where(shown, self.classifier_weight * log_q, 0.0))

    def _ramp(self, step: Tensor | int | None) -> Any:
        if step is None or not self.consistency_ramp:
            return self.consistency
        return self.consistency * torch.as_tensor(step / self.consistency_ramp).clamp(0.0, 1.0)

    def _agreement(self, mixture: MixtureOfFlows, x: Tensor) -> Tensor:
        noise = self.consistency_noise * torch.randn((2,) + x.shape, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            guess = mixture.joint_log_prob(x + noise[0]).argmax(-1)
        return mixture.given(guess).log_prob(x + noise[1])
