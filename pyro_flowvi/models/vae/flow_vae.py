"""FlowVAE: a variational autoencoder whose posterior is a normalizing flow."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import check_dtype, check_positive_int
from ..._program.param_store import NamedModel
from ...autoguide._latent_site import CallPosterior
from ...autoguide.continuously_indexed import IndexedCallPosterior
from ...distributions import FlowDistribution, IndexedFlow
from ...distributions.flow import standard_normal_log_prob
from ...distributions.indexed_flow import log_mean_exp
from ...transforms import Conditional, ConditionalCompose, ElementwiseAffine, IndexedCompose, IndexedLayer
from ...transforms.compose import Chain
from ._posterior_layers import AMORTIZATIONS, posterior_parts, told_dim, told_latent_dim

__all__ = ["FlowVAE"]

_MAX_ELEMENTS: Final = 2**23
"""Pixels of all draws that are decoded at once where no graph is kept."""


class FlowVAE(NamedModel):
    r"""A variational autoencoder for binary images, with any flow of this package as its posterior.

    The model is z ~ N(0, I), pixels ~ Bernoulli(decoder(z)).  The posterior is

    .. math:: z = f(\mu(h) + \sigma(h) \odot \epsilon), \quad h = \mathrm{encoder}(x), \quad
        \epsilon \sim N(0, I),

    with μ and log σ linear in the features h, and a flow f that is the same for all images ("base"), or one
    whose parameters depend on h, each layer's through a network of its own ("context") or linearly, as if
    they were further outputs of the encoder ("hypernetwork", as Rezende and Mohamed do).  The log likelihood
    is summed over the pixels, and the ELBO over the images of a batch.

    :meth:`model` and :meth:`guide` are an ordinary Pyro pair, for ``SVI``, :func:`pyro_flowvi.fit` and every
    objective.  Encoder and decoder are trained with the flow, but for parameters that need no gradient.

    Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014; Rezende and Mohamed, *Variational Inference
    with Normalizing Flows*, 2015, section 4; Caterini, Cornish, Sejdinovic and Doucet, *Variational Inference
    with Continuously-Indexed Normalizing Flows*, 2020.

    :param encoder: images ``(B, ...)`` -> features ``(B, feature_dim)``.
    :param decoder: latents ``(B, D)`` -> logits of the pixels, ``(B, ...)``.
    :param flow: None for a diagonal normal, a key of :data:`pyro_flowvi.FLOWS`, a callable from D to a
        transform of vectors, a transform, a conditional one, an
        :class:`~pyro_flowvi.distributions.IndexedFlow`, or a list of layers of an
        :class:`~pyro_flowvi.transforms.IndexedCompose`; conditional layers are given the features.
    :param latent_dim: D; by default what the posterior or the decoder tells.
    :param feature_dim: the number of features; by default what the encoder tells.
    :param num_layers: layers of a named flow, by default of :data:`pyro_flowvi.flows.DEFAULTS`.
    :param hidden: widths of the networks of a named flow, likewise.
    :param amortize: "base", "context" or "hypernetwork", as above.
    :param num_extra: index draws beside its own in the bound of an indexed posterior's draw, as in
        :class:`~pyro_flowvi.distributions.IndexedFlow`.
    :param name: prefix of the parameters in the param store, taken over from a live model or guide of it;
        by default the class name, made unique.
    :raises ValueError: if an argument is not of the described kind, or a length cannot be told.

    Example::

        >>> from pyro_flowvi.models import MLPDecoder, MLPEncoder, Minibatches
        >>> encoder, decoder = MLPEncoder((1, 4, 4), (16,)), MLPDecoder(2, (1, 4, 4), (16,))
        >>> vae = FlowVAE(encoder, decoder, "planar", num_layers=2, amortize="hypernetwork")
        >>> batches = Minibatches(torch.rand(100, 1, 4, 4), 20)
        >>> result = pyro_flowvi.fit(
        ...     vae.model, vae.guide, batches=batches, num_steps=20, num_particles=1, lr=1e-2, progress=False
        ... )
        >>> vae.log_prob(batches(0), 10).shape, vae.sample(3).shape
        (torch.Size([20]), torch.Size([3, 1, 4, 4]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        flow: Any = None,
        *,
        latent_dim: int | None = None,
        feature_dim: int | None = None,
        num_layers: int | None = None,
        hidden: Sequence[int] | None = None,
        amortize: Literal["base", "context", "hypernetwork"] = "base",
        num_extra: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        for key, value in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(value, nn.Module):
                raise ValueError(f"{key}: expected a torch module, got {value!r}")
        if amortize not in AMORTIZATIONS:
            raise ValueError(f"amortize: expected one of {list(AMORTIZATIONS)}, got {amortize!r}")
        if isinstance(flow, IndexedFlow):
            if flow.extended.base is not None:
                raise ValueError("flow: expected an IndexedFlow of a standard normal base, got another")
            num_extra = num_extra or flow.num_extra
            flow = flow.extended.transform
        self.num_extra = 0 if num_extra == 0 else check_positive_int("num_extra", num_extra)
        if latent_dim is None:
            latent_dim = told_latent_dim(flow, decoder)
        if feature_dim is None:
            feature_dim = told_dim(encoder, "feature_dim", "out_features", last=True)
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.feature_dim = check_positive_int("feature_dim", feature_dim)
        self.amortize = amortize
        self.encoder = encoder
        self.decoder = decoder
        parts = posterior_parts(flow, self.latent_dim, self.feature_dim, num_layers, hidden, amortize)
        parts = [Conditional(ElementwiseAffine(self.latent_dim), self.feature_dim, ()), *parts]
        self.indexed = any(isinstance(part, IndexedLayer) for part in parts)
        """Whether the posterior is continuously indexed, so that its density is bounded and not known."""
        if self.num_extra and not self.indexed:
            raise ValueError(f"num_extra: expected 0 with a posterior of known density, got {num_extra}")
        self.flow = IndexedCompose(parts, self.latent_dim) if self.indexed else ConditionalCompose(parts)
        self.take_name(name)

    # -- the Pyro pair ------------------------------------------------------------------------------

    def model(self, x: Tensor) -> None:
        """The generative model of a batch: sites "z" and "x" in the plate "images".

        :param x: images of zeros and ones, floating point, shape ``(B, ...)``.
        :raises ValueError: if ``x`` is no such tensor, or the decoder's output does not fit.
        """
        _check_images(x)
        self.announce("decoder")
        with pyro.plate("images", len(x), dim=-1):
            loc = x.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            logits = self.decode(z, x.shape[1:])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(x.dim() - 1), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """The posterior of a batch; indices of an indexed flow are part of an auxiliary site.

        :param x: as for :meth:`model`.
        :return: the draw of z, shape ``(B, D)``.
        """
        self.announce("encoder", "flow")
        flow = self._conditioned(x)
        with pyro.plate("images", len(x), dim=-1):
            if not self.indexed:
                z: Tensor = pyro.sample("z", CallPosterior(None, flow))
                return z
            site = IndexedCallPosterior(flow, num_extra=self.num_extra)
            extended = pyro.sample("_z_indexed", site, infer={"is_auxiliary": True})
            z = pyro.sample("z", dist.Delta(extended[..., : self.latent_dim], event_dim=1))
            return z

    def encode(self, x: Tensor) -> Tensor:
        """The features of images, shape ``(B, feature_dim)``.

        :raises ValueError: if ``x`` is no batch of images, or the encoder's output has another shape.
        """
        features: Tensor = self.encoder(_check_images(x))
        if features.shape != (len(x), self.feature_dim):
            raise ValueError(
                f"encoder: expected shape {(len(x), self.feature_dim)}, got {tuple(features.shape)}"
            )
        return features

    def decode(self, z: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Logits of the pixels.

        :param z: shape ``(*, D)``.
        :param shape: of an image; by default the decoder's.
        :return: shape ``(*, ...)``.
        :raises ValueError: if the decoder's output has another number of pixels.
        """
        logits: Tensor = self.decoder(z.reshape(-1, self.latent_dim))
        own = logits.shape[1:]
        if shape is not None and own.numel() != math.prod(shape):
            raise ValueError(f"decoder: expected logits of shape {tuple(shape)}, got {tuple(own)}")
        return logits.reshape(z.shape[:-1] + tuple(own if shape is None else shape))

    def _conditioned(self, x: Tensor) -> Chain:
        flow: Chain = self.flow.condition(self.encode(x))
        return flow

    def posterior(self, x: Tensor) -> FlowDistribution | IndexedFlow:
        """q(z | x), with batch shape ``(B,)``: its ``log_prob`` is exact, or with indices an estimate."""
        return self._distribution(self._conditioned(x))

    def _distribution(self, flow: Chain) -> FlowDistribution | IndexedFlow:
        if self.indexed:
            return IndexedFlow(None, flow, num_extra=self.num_extra)
        return FlowDistribution(None, flow)

    # -- bounds -------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_weights(self, x: Tensor, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z | x) of draws from the posterior; with indices, in the extended space.

        :param x: images of zeros and ones, shape ``(B, ...)``.
        :param num_samples: draws S for each image.
        :return: shape ``(S, B)``; the mean of their exponential is an unbiased estimate of p(x).
        :raises ValueError: if an argument is not of the described kind.
        """
        count = check_positive_int("num_samples", num_samples)
        _check_binary(x)
        columns = []
        rows = max(1, _MAX_ELEMENTS // max(1, x[0].numel() * count)) if len(x) else 1
        for images in x.split(rows):
            q = self._distribution(self._conditioned(images))
            at_once = max(1, _MAX_ELEMENTS // max(1, images.numel()))
            parts = [self._weigh(images, *q.rsample_and_log_prob((size,))) for size in _sizes(count, at_once)]
            columns.append(torch.cat(parts))
        return torch.cat(columns, -1)

    def _weigh(self, x: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
        logits = self.decode(z, x.shape[1:])
        log_p = -F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none")
        return log_p.flatten(z.dim() - 1).sum(-1) + standard_normal_log_prob(z) - log_q

    def elbo(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """The evidence lower bound of every image, nats; no graph.

        :param x: images of zeros and ones, shape ``(B, ...)``.
        :param num_samples: draws for each image, over which it is averaged.
        :return: shape ``(B,)``.
        :raises ValueError: if an argument is not of the described kind.
        """
        return self.log_weights(x, num_samples).mean(0)

    def log_prob(self, x: Tensor, num_samples: int = 100) -> Tensor:
        """The log of the mean of importance weights, nats; no graph.

        On average a lower bound on log p(x), the tighter the more draws (Burda, Grosse and Salakhutdinov
        2016, equation 8); with 100 of them the test log-likelihood of the published tables.

        :param x: images of zeros and ones, shape ``(B, ...)``.
        :param num_samples: draws for each image.
        :return: shape ``(B,)``.
        :raises ValueError: if an argument is not of the described kind.
        """
        return log_mean_exp(self.log_weights(x, num_samples))

    # -- images -------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Pixel means of images from the model, shape ``(num_samples, ...)``."""
        like = next(self.decoder.parameters(), torch.zeros(()))
        count = check_positive_int("num_samples", num_samples)
        z = torch.randn(count, self.latent_dim, dtype=like.dtype, device=like.device)
        return self.decode(z).sigmoid()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Pixel means of images given the posterior of each, averaged over draws; the shape of ``x``.

        :param x: images of zeros and ones, shape ``(B, ...)``.
        :param num_samples: draws of the posterior for each image.
        """
        _check_binary(x)
        z = self.posterior(x).rsample_and_log_prob((check_positive_int("num_samples", num_samples),))[0]
        return self.decode(z, x.shape[1:]).sigmoid().mean(0)

    def plot_samples(self, num_samples: int = 40, columns: int = 10, *, ax: Any = None) -> Any:
        """Draws images of the model.

        :param ax: matplotlib Axes, or a Figure or SubFigure to make them in; None for a new figure.
        :return: the Axes.
        :raises ImportError: without matplotlib.
        """
        from ...plotting import plot_images

        return plot_images(self.sample(num_samples), columns=columns, ax=ax)

    def plot_reconstructions(self, x: Tensor, *, ax: Any = None) -> Any:
        """Draws images above their reconstructions.

        :param x: images of zeros and ones, shape ``(B, ...)``.
        :param ax: matplotlib Axes, or a Figure or SubFigure to make them in; None for a new figure.
        :return: the Axes.
        :raises ImportError: without matplotlib.
        """
        from ...plotting import plot_images

        page = torch.cat([x, self.reconstruct(x)])
        return plot_images(page, columns=len(x), labels=["data", "decoded"], ax=ax)

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, feature_dim={self.feature_dim}, amortize={self.amortize!r}"


def _check_images(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor of images, got {type(x).__name__}")
    check_dtype("x", x.dtype)
    if x.dim() < 2:
        raise ValueError(f"x: expected images of shape (B, ...), got shape {tuple(x.shape)}")
    return x


def _check_binary(x: Any) -> Tensor:
    if not bool(((_check_images(x) == 0.0) | (x == 1.0)).all()):
        raise ValueError("x: expected pixels of zeros and ones, got others; see pyro_flowvi.models.binarize")
    return x  # type: ignore[no-any-return]


def _sizes(count: int, at_once: int) -> Iterator[int]:
    for start in range(0, count, at_once):
        yield min(at_once, count - start)
