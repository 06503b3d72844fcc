"""How diagnoses, comparisons and calibrations print, at a prompt and in a notebook."""

import math
import xml.etree.ElementTree as ET

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi import Diagnosis, compare, diagnose
from pyro_flowvi.diagnostics import comparison
from pyro_flowvi.diagnostics.calibration import Calibration
from pyro_flowvi.diagnostics.comparison import Comparison

FIGURES = (-3.2, 0.01, -3.1, 3500.0, 0.2, 4000)


def found(verdict="good", reasons=("k-hat 0.20 is low",), advice=(), **more):
    return Diagnosis(*FIGURES, verdict, reasons, advice, **more)


def text_of(markup):
    """The text of HTML that is well formed."""
    return [part.strip() for part in ET.fromstring(markup).itertext() if part.strip()]


class TestDiagnosis:
    def test_a_prompt_shows_what_print_shows(self):
        each = found("poor", ("k-hat < 1 & more", "second"), ("train longer",), shift=0.25)
        assert repr(each) == str(each)
        assert str(each).splitlines() == [
            "poor: ELBO -3.20 ± 0.01, IW-ELBO -3.10 (gap 0.10), ESS 3500 of 4000, k-hat 0.20, shift 0.25 sd",
            "  - k-hat < 1 & more",
            "  - second",
            "  try: train longer",
        ]

    def test_what_is_not_known_is_left_out(self):
        each = Diagnosis(*FIGURES[:4], -math.inf, 4000, "good", ())
        assert str(each).endswith("ESS 3500 of 4000, k-hat -")
        assert "nan" not in str(each) + each._repr_html_()
        predicted = found(predictive_shift=0.03, predictive_coverage=0.91)
        assert "predictive shift 0.03 sd" in str(predicted)
        assert "0.91" in text_of(predicted._repr_html_())

    def test_html(self):
        each = found("poor", ("k-hat < 1 & more", "second"), ("train longer",), shift=0.25, num_nonfinite=7)
        text = text_of(each._repr_html_())
        for part in ("verdict: poor", "do not use the draws", "-3.20 ± 0.01", "3500 of 4000", "0.25 sd", "7"):
            assert part in text
        assert text[-3:] == ["k-hat < 1 & more", "second", "try: train longer"]
        assert "at most 0.5: the weights are reliable" in text
        assert "color" not in each._repr_html_()
        assert "background" not in each._repr_html_()

    @pytest.mark.parametrize(
        ("khat", "word"),
        [
            (0.3, "at most 0.5"),
            (0.6, "at most 0.70"),
            (0.9, "above 0.70"),
            (math.inf, "no tail could be fitted"),
            (-math.inf, "have no tail"),
        ],
    )
    def test_a_word_on_khat(self, khat, word):
        each = Diagnosis(*FIGURES[:4], khat, 4000, "usable", ())
        assert any(word in part for part in text_of(each._repr_html_()))

    def test_of_a_fit_without_density(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("none", -math.inf * (x > -9.0))

        each = diagnose(model, lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), seed=0)
        assert str(each).startswith("poor: ELBO -inf")
        assert "verdict: poor" in text_of(each._repr_html_())


class TestComparison:
    def test_the_verdict_ranks_before_the_elbo(self):
        """A guide of one of two modes has the higher ELBO."""
        places, weights = torch.tensor([-6.0, 6.0]), torch.tensor([0.2, 0.8])

        def modes(scale):
            parts = dist.Normal(places, scale)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(probs=weights), parts))

        def model():
            modes(1.0)

        def one():
            pyro.sample("x", dist.Normal(6.0, 1.0))

        def wide():
            modes(1.9)

        table = compare(model, {"one": one, "wide": wide, "exact": model}, seed=0)
        assert [name for name, _ in table] == ["exact", "wide", "one"]
        assert [each.verdict for _, each in table] == ["good", "usable", "poor"]
        assert table["wide"].elbo < table["one"].elbo

    def test_order_by_hand(self, monkeypatch):
        told = {
            "a": Diagnosis(-1.0, *FIGURES[1:], "poor", ()),
            "b": Diagnosis(-9.0, *FIGURES[1:], "good", ()),
            "c": Diagnosis(-2.0, *FIGURES[1:], "usable", ()),
            "d": Diagnosis(-8.0, *FIGURES[1:], "good", ()),
        }

        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        guides = {name: (lambda: model()) for name in told}
        names = {guide: name for name, guide in guides.items()}
        monkeypatch.setattr(comparison, "diagnose", lambda model, guide, **options: told[names[guide]])
        assert [name for name, _ in compare(model, guides)] == ["d", "b", "c", "a"]

    def test_html_is_escaped(self):
        table = Comparison((("<b>", found("poor", ('"quoted" & <i>',))),))
        assert "<b>" in text_of(table._repr_html_())
        (cell,) = [cell for cell in ET.fromstring(table._repr_html_()).iter("td") if cell.get("title")]
        assert cell.get("title") == '"quoted" & <i>'
        assert cell.text == "poor"


class TestCalibration:
    def test_html_says_what_the_text_says(self):
        ranks = np.random.default_rng(0).integers(0, 101, (200, 7))
        narrow = np.where(ranks[:, 0] < 50, 5, 95)
        each = Calibration({"x": ranks, "<n>": narrow}, 100, 204, failures=((3, "lost"),), notes={"slow": 2})
        assert repr(each) == str(each)
        text = text_of(each._repr_html_())
        assert text[0] == "not calibrated:"
        assert "<n>" in text
        for part in (
            "and 4 with larger p",
            "1 of 204 fits failed, the first at 3: lost",
            "2 fits warned: slow",
        ):
            assert part in text
            assert part in str(each)
        assert "interrupted with 3 fits to go" in text
