"""How mixtures print, and what the estimator tells of its fit."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from pyro_flowvi.models import FlowMixture, VMoNF
from pyro_flowvi.models.mixture._printed import MixtureSummary
from pyro_flowvi.transforms import Planar


def text_of(markup):
    return [part.strip() for part in ET.fromstring(markup).itertext() if part.strip()]


class TestVMoNF:
    def test_line(self):
        mixture = VMoNF(2, 3, num_layers=2, hidden=(4,))
        count = sum(param.numel() for param in mixture.parameters())
        assert repr(mixture) == (
            "VMoNF(components: 2, dim: 3, flow: realnvp, weights: learned (0.50, 0.50), inference: exact, "
            f"parameters: {count:,})"
        )
        assert "0.50, 0.50" in mixture._repr_html_()
        text = text_of(mixture._repr_html_())
        assert text[0] == "VMoNF"
        assert text[-2:] == ["parameters", f"{count:,}"]

    def test_other_kinds(self):
        sizes = {"num_layers": 1, "hidden": (4,)}
        assert "weights: dirichlet" in repr(VMoNF(2, 2, weights="dirichlet", **sizes))
        assert "inference: amortized" in repr(VMoNF(2, 2, inference="amortized", **sizes))
        assert "classes: 2" in repr(VMoNF(3, 2, classes=[0, 1, 1], **sizes))
        assert "flow: realnvp with a continuous index" in repr(VMoNF(2, 2, index_dim=1, **sizes))
        assert "flow: Planar" in repr(VMoNF(2, 2, Planar))
        many = repr(VMoNF(9, 2, weights="fixed", **sizes))
        assert "weights: fixed (0.11, 0.11, 0.11, 0.11, ..., 0.11)" in many

    def test_of_what_was_selected(self):
        mixture = VMoNF(3, 2, num_layers=1, hidden=(4,))
        assert repr(mixture.select([0, 2])).startswith("VMoNF(components: 2, dim: 2, flow: realnvp")
        assert "VMoNF(components: 3" in repr(torch.nn.Sequential(mixture))


class TestFlowMixture:
    def test_prints_parameters_as_other_estimators_do(self):
        mixture = FlowMixture(2, flow="realnvp")
        assert repr(mixture) == "FlowMixture(flow='realnvp', n_components=2)"
        with pytest.raises(NotFittedError):
            mixture.summary()

    def test_summary(self):
        x = np.random.default_rng(0).standard_normal((120, 2))
        x[60:] += 6.0
        y = np.where(np.arange(120) % 60 == 0, np.arange(120) // 60 + 7, -1)
        mixture = FlowMixture(
            2, flow="realnvp", init="kmeans", num_layers=2, hidden=(4,), max_iter=30, random_state=0
        ).fit(x, y)
        told = mixture.summary()
        lines = str(told).splitlines()
        assert lines[:3] == ["model: FlowMixture", "columns: 2, of which 2 vary", "flow: realnvp"]
        assert f"held-out NLL, nats a row: {mixture.held_out_nll_:.4f}" in lines
        head = lines.index("component  label  weight")
        assert [line.split() for line in lines[head + 1 : head + 3]] == [
            [str(i), str(label), f"{weight:.3f}"]
            for i, (label, weight) in enumerate(zip(mixture.component_labels_, mixture.weights_, strict=True))
        ]
        assert repr(told) == str(told)
        assert "component" in told._repr_html_()
        assert repr(clone(mixture)) == repr(mixture)  # what is fitted is no part of it

    def test_html_is_escaped(self):
        told = MixtureSummary((("flow", "<lambda>"),), (("<b>", "1.000"),), ())
        assert "&lt;lambda&gt;" in told._repr_html_()
        assert "<b>" not in told._repr_html_()
