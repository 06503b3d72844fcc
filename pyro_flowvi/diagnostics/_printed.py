"""A diagnosis in words: lines for a prompt, a table for a notebook."""

import math
from typing import Any

from .. import _html

__all__ = ["as_html", "as_text", "number_text"]

MEANING = {
    "good": "use the draws",
    "usable": "use resampled draws",
    "poor": "do not use the draws",
}


def number_text(value: float) -> str:
    """A figure with two digits; a dash where it has no meaning."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def as_text(found: Any) -> str:
    """Verdict and figures in a line, then reasons and advice, one a line.

    :param found: a :class:`~pyro_flowvi.Diagnosis`.
    """
    figures = [
        f"ELBO {found.elbo:.2f} ± {found.elbo_se:.2f}",
        f"IW-ELBO {found.iw_elbo:.2f} (gap {found.gap:.2f})",
        f"ESS {found.ess:.0f} of {found.num_samples}",
        f"k-hat {number_text(found.khat)}",
    ]
    if not math.isnan(found.shift):
        figures.append(f"shift {found.shift:.2f} sd")
    if not math.isnan(found.predictive_shift):
        figures.append(f"predictive shift {found.predictive_shift:.2f} sd")
    lines = [f"{found.verdict}: {', '.join(figures)}"]
    lines += [f"  - {reason}" for reason in found.reasons]
    lines += [f"  try: {advice}" for advice in found.advice]
    return "\n".join(lines)


def as_html(found: Any) -> str:
    """The same for a notebook, with a word on each figure."""
    return _html.block(
        _html.paragraph(MEANING.get(found.verdict, ""), strong=f"verdict: {found.verdict}"),
        _html.table(("figure", "value", "what it says"), _rows(found)),
        _html.bullets(found.reasons),
        _html.bullets(f"try: {advice}" for advice in found.advice),
    )


def _rows(found: Any) -> list[tuple[str, str, str]]:
    share = 100.0 * found.ess / found.num_samples
    rows = [
        ("ELBO", f"{found.elbo:.2f} ± {found.elbo_se:.2f}", "lower bound on log p(data), nats"),
        ("IW-ELBO", f"{found.iw_elbo:.2f}", "a tighter one, by importance weights"),
        ("gap", f"{found.gap:.2f}", "between them: KL(q || p) is at least about that"),
        ("ESS", f"{found.ess:.0f} of {found.num_samples}", f"{share:.0f} % of the draws count"),
        ("k-hat", number_text(found.khat), _word_on_khat(found)),
        ("shift", f"{number_text(found.shift)} sd", "how far resampling moves a mean, at most"),
        ("scale shift", number_text(found.scale_shift), "logarithm of the factor on an sd, at most"),
        ("predictive shift", f"{number_text(found.predictive_shift)} sd", "how far it moves a prediction"),
        (
            "predictive coverage",
            number_text(found.predictive_coverage),
            "of 90 % intervals, where farthest off",
        ),
        ("shift from chains", f"{number_text(found.chains_shift)} sd", "of predictions, against the probes"),
        ("coverage by chains", number_text(found.chains_coverage), "of 90 % intervals, where farthest off"),
        ("draws without density", str(found.num_nonfinite), "they count for nothing"),
    ]
    always = {"ELBO", "IW-ELBO", "gap", "ESS", "k-hat"}
    return [row for row in rows if row[0] in always or row[1] not in ("- sd", "-", "0")]


def _word_on_khat(found: Any) -> str:
    if not math.isfinite(found.khat):
        return (
            "of no meaning: nearly equal weights have no tail"
            if found.khat < 0
            else "no tail could be fitted"
        )
    if found.khat <= 0.5:
        return "at most 0.5: the weights are reliable"
    if found.khat <= found.khat_threshold:
        return f"at most {found.khat_threshold:.2f}: resampled draws are reliable"
    return f"above {found.khat_threshold:.2f}: the weights are not reliable"
