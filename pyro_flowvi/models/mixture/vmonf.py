"""VMoNF: a mixture of normalizing flows as a Pyro model, its component enumerated."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..._checks import check_count, check_positive, check_positive_int, check_widths
from ...distributions import MixtureOfFlows
from ...flows import check_layer_flow
from ...nn import MLP
from ...transforms import Compose, Stacked
from ._parts import Flow, Weights, check_weight, class_map, component_flows, moved
from ._printed import mixture_html, mixture_line
from ._sites import ComponentSites

__all__ = ["VMoNF"]

INFERENCES = ("exact", "amortized")
WEIGHTS = ("learned", "fixed", "dirichlet")


class VMoNF(ComponentSites):
    r"""A variational mixture of normalizing flows: clusters and a density, with any labels that there are.

    The model is :math:`c \sim \mathrm{Categorical}(\pi)`, :math:`x \mid c \sim \mathrm{flow}_c`.
    :meth:`model` and :meth:`guide` are an ordinary Pyro pair for ``SVI`` and
    :class:`~pyro_flowvi.infer.CompiledSVI` with ``TraceEnum_ELBO(max_plate_nesting=1)``, which sums the site
    "component" out:

    - ``inference="exact"``: the guide leaves the component out, and the objective is log p(x): maximum
      likelihood, whose gradient is that of EM.
    - ``inference="amortized"``: the guide has q(c | x) = softmax(f(x) / T), a network, and the objective is
      the ELBO, log p(x) - KL(q(c | x) ‖ p(c | x)).  It is never above the exact one: q serves as a fast
      classifier and as a bias of the partition.

    Of the four mixtures of flows, :class:`~pyro_flowvi.AutoFlowMixture` is the guide, over the latents of a
    model; :class:`~pyro_flowvi.VMoNF` a Pyro model of rows of data; :class:`~pyro_flowvi.models.FlowMixture`
    the scikit-learn estimator that trains one; and :class:`~pyro_flowvi.distributions.MixtureOfFlows` the
    distribution that all are made of.

    :meth:`sample_component` puts the component into a larger model, with outcomes that depend on it:
    :doc:`Put a mixture inside a larger model </how-to/mixtures-inside-a-model>`.

    Labels are observations of the component.  Rows of a batch with and without a label are exact together:
    a row without one (-1) counts with log p(x), one with a label with log π_y + log p(x | y).

    Pires and Figueiredo, *Variational Mixture of Normalizing Flows*, 2020; of its training with labels the
    published code has the sign of the cross-entropy wrong, which this does not.  Consistency: Izmailov,
    Kirichenko, Finzi and Wilson, *Semi-Supervised Learning with Normalizing Flows*, 2020.

    :param num_components: the number K of flows.
    :param dim: the length D of a row of data, which should be standardised: the components start at draws
        from N(0, I), with unit scale.
    :param flow: a key of :data:`pyro_flowvi.FLOWS`, or a callable from D to a transform of vectors; each
        component has one, followed by a location and a triangular scale.
    :param inference: "exact" or "amortized", as above.
    :param weights: "learned", "fixed" (equal), or "dirichlet": a site "weights" with prior
        Dirichlet(``concentration``, ...) and a Dirichlet guide; a ``concentration`` below 1 empties
        components.
    :param shared_layers: the number of layers next to the data that all components share.
    :param temperature: T, a positive number; the buffer ``temperature`` may be filled anew between steps.
    :param num_layers: layers of a named flow; by default of :data:`pyro_flowvi.flows.DEFAULTS`.
    :param hidden: widths of the networks of a named flow, likewise.
    :param index_dim: the length of each layer's index; above 0 the components are continuously-indexed flows,
        which can be a ring, or several pieces, where others remain one piece.  Their density is estimated on
        average from below, and so is the objective.
    :param num_index_samples: the number of index draws for that estimate; more are tighter.
    :param base: a distribution over vectors of length D that the flows transform; the standard normal if
        None.
    :param classifier: widths of the hidden layers of f, for amortized inference.
    :param classes: the class of each component, K integers from 0; by default each component is a class of
        its own.  With more components than classes a label says which components may have made a row.
    :param concentration: of the Dirichlet prior.
    :param supervised_weight: λ, what a row with a label counts for.
    :param classifier_weight: α, the weight of log q(y | x) of rows with a label, which trains the classifier
        on labels; for amortized inference.
    :param consistency: w, the weight of a consistency loss: -log p(x' | ŷ) with ŷ the most probable component
        of x'', where x' and x'' are x with independent noise.
    :param consistency_noise: the standard deviation of that noise.
    :param consistency_ramp: the number of steps over which w rises from 0, if ``step`` is given.
    :param name: prefix of the parameters in the param store, taken over from a live model or guide of it;
        by default the class name, made unique.
    :raises ValueError: if an argument is not of the described kind.

    Example::

        >>> x = torch.cat([torch.randn(100, 2) - 3, torch.randn(100, 2) + 3])
        >>> vmonf = VMoNF(2, 2, num_layers=2, hidden=(8,))
        >>> elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
        >>> svi = pyro.infer.SVI(vmonf.model, vmonf.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        >>> loss = svi.step(x)
        >>> vmonf.responsibilities(x).shape, vmonf.sample(5).shape
        (torch.Size([200, 2]), torch.Size([5, 2]))
    """

    temperature: Tensor

    def __init__(
        self,
        num_components: int,
        dim: int,
        flow: Flow = "realnvp",
        inference: Literal["exact", "amortized"] = "exact",
        weights: Literal["learned", "fixed", "dirichlet"] = "learned",
        shared_layers: int = 0,
        temperature: float = 1.0,
        *,
        num_layers: int | None = None,
        hidden: Sequence[int] | None = None,
        index_dim: int = 0,
        num_index_samples: int = 1,
        base: Distribution | None = None,
        classifier: Sequence[int] = (32, 32),
        classes: Sequence[int] | None = None,
        concentration: float = 1.0,
        supervised_weight: float = 1.0,
        classifier_weight: float = 0.0,
        consistency: float = 0.0,
        consistency_noise: float = 0.1,
        consistency_ramp: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        num = check_positive_int("num_components", num_components)
        self.dim = check_positive_int("dim", dim)
        check_layer_flow(flow, hidden)
        for key, value, known in (("inference", inference, INFERENCES), ("weights", weights, WEIGHTS)):
            if value not in known:
                raise ValueError(f"{key}: expected one of {list(known)}, got {value!r}")
        self.flow_name: str = (
            flow if isinstance(flow, str) else getattr(flow, "__name__", type(flow).__name__)
        )
        self.inference = inference
        self.weights_kind = weights
        self.concentration = check_positive("concentration", concentration)
        self.supervised_weight = check_weight("supervised_weight", supervised_weight)
        self.classifier_weight = check_weight("classifier_weight", classifier_weight)
        if self.classifier_weight and inference == "exact":
            raise ValueError("classifier_weight: expected 0 with exact inference, which has no classifier")
        self.consistency = check_weight("consistency", consistency)
        self.consistency_noise = check_positive("consistency_noise", consistency_noise)
        self.consistency_ramp = check_count("consistency_ramp", consistency_ramp)
        self.base = base
        sizes = {"num_layers": num_layers, "hidden": hidden}
        self.flow = component_flows(
            num, self.dim, flow, shared_layers, check_count("index_dim", index_dim), sizes
        )
        self.index_dim = self.flow.dim - self.dim
        """The number of noise coordinates of all indices."""
        self.num_index_samples = check_positive_int("num_index_samples", num_index_samples)
        self.weights = Weights(num, trained=weights == "learned")
        if weights == "dirichlet":
            self.weights_posterior = Weights(num)
        if inference == "amortized":
            self.classifier = MLP(self.dim, check_widths("classifier", classifier), num)
        self.register_buffer("temperature", torch.tensor(check_positive("temperature", temperature)))
        self.classes: Tensor
        self.register_buffer("classes", class_map(classes, num))
        self.num_classes = int(self.classes.max()) + 1
        """The number C of classes, K unless ``classes`` maps several components to one."""
        self.take_name(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Takes the base along to another dtype or device, of which torch's modules know nothing."""
        if self.base is not None:
            self.base = moved(self.base, fn)
        super()._apply(fn, recurse)
        return self

    # -- what was learnt ----------------------------------------------------------------------------

    def mixture(self) -> MixtureOfFlows:
        """The mixture at the present parameters; Dirichlet weights at their posterior mean."""
        logits = self.weights.logits
        if self.weights_kind == "dirichlet":
            logits = self._dirichlet().mean.log()
        return self._mixture(logits)

    def _mixture(self, logits: Tensor) -> MixtureOfFlows:
        return MixtureOfFlows(
            self.base,
            self.flow,
            logits,
            index_dim=self.index_dim,
            num_index_samples=self.num_index_samples,
        )

    def joint_log_prob(self, x: Tensor) -> Tensor:
        """log π_k + log p(x | k), shape ``(*, K)``, at ``x`` of shape ``(*, D)``."""
        return self.mixture().joint_log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), shape ``(*,)``, at ``x`` of shape ``(*, D)``."""
        return self.mixture().log_prob(x)

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(c | x), shape ``(*, K)``, at ``x`` of shape ``(*, D)``."""
        return self.mixture().responsibilities(x)

    def classify(self, x: Tensor) -> Tensor:
        """q(c | x) of the classifier, shape ``(*, K)``, at ``x`` of shape ``(*, D)``.

        :raises ValueError: with exact inference, which has no classifier.
        """
        self._check_amortized()
        return self._classifier_logits(x).softmax(-1)

    def by_class(self, of_components: Tensor) -> Tensor:
        """Probabilities of components, ``(*, K)``, summed over those of each class: shape ``(*, C)``."""
        return of_components.new_zeros(of_components.shape[:-1] + (self.num_classes,)).index_add(
            -1, self.classes, of_components
        )

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draws of x, shape ``(num_samples, D)``."""
        return self.mixture().sample((check_count("num_samples", num_samples),))

    # -- components ---------------------------------------------------------------------------------

    @torch.no_grad()
    def place(self, loc: Tensor, scale_tril: Tensor, weights: Tensor | None = None) -> Self:
        """Sets each component's location and scale, and the weights; returns this model.

        Components whose flows have not been trained, which are the identity then, become those normals.

        :param loc: locations, shape ``(K, D)``.
        :param scale_tril: lower triangular with a positive diagonal, shape ``(K, D, D)``.
        :param weights: positive, shape ``(K,)``; left as they are if None.
        :raises ValueError: if an argument is not of that kind.
        """
        num, dim = self.num_components, self.dim
        given = {"loc": (loc, (num, dim)), "scale_tril": (scale_tril, (num, dim, dim))}
        if weights is not None:
            given["weights"] = (weights, (num,))
        for key, (value, shape) in given.items():
            if value.shape != shape or not bool(value.isfinite().all()):
                raise ValueError(f"{key}: expected finite values of shape {shape}, got {tuple(value.shape)}")
        diagonal = scale_tril.diagonal(dim1=-2, dim2=-1)
        if not bool((diagonal > 0).all()) or (weights is not None and not bool((weights > 0).all())):
            raise ValueError("scale_tril, weights: expected a positive diagonal and positive weights")
        affine = self.components.each[-1]
        affine.loc.copy_(loc)
        affine.log_scale.copy_(diagonal.log())
        if dim > 1:
            affine.lower.copy_((scale_tril / diagonal.unsqueeze(-1)).tril(-1))
        if weights is not None and self.weights_kind == "learned":
            self.weights.logits.copy_(weights.log())
        return self

    @property
    def components(self) -> Stacked:
        """The flows of the components, without what they share."""
        flows: Stacked = self.flow[0]
        return flows

    def select(self, indices: Sequence[int]) -> "VMoNF":
        """A model of those components alone, with copies of their parameters and a name of its own.

        :raises ValueError: if there is no index.
        :raises IndexError: if there is no component of an index.
        """
        kept = list(indices)
        if not kept:
            raise ValueError("indices: expected at least one component, got none")
        new = copy.deepcopy(self)
        new.flow = Compose([self.components.select(kept), *list(new.flow)[1:]])
        rows: list[tuple[nn.Module, str]] = [(new.weights, "logits")]
        if self.weights_kind == "dirichlet":
            rows.append((new.weights_posterior, "logits"))
        if self.inference == "amortized":
            rows += [(new.classifier.last, "weight"), (new.classifier.last, "bias")]
        for module, key in rows:
            value: Tensor = getattr(module, key)
            row = value.detach()[kept].clone()
            setattr(module, key, nn.Parameter(row) if isinstance(value, nn.Parameter) else row)
        if self.inference == "amortized":
            new.classifier.last.out_features = len(kept)
        new.register_buffer("classes", self.classes[kept])
        return new

    def __repr__(self) -> str:
        return mixture_line(self)

    def _repr_html_(self) -> str:
        return mixture_html(self)
