"""HTML of results: escaped, closed, and without colours of its own."""

import xml.etree.ElementTree as ET

import pytest

from pyro_flowvi import _html


def alignments(markup, kind):
    """Of the cells of a table: right or left."""
    return [
        cell.get("style").split(";")[0].removeprefix("text-align:")
        for cell in ET.fromstring(markup).iter(kind)
    ]


def test_columns_of_numbers_are_at_the_right():
    rows = [
        ("1", "-3.20 ± 0.01", "3500 (4000)", "-", "good", "95 % of the draws"),
        ("b", " 1.0e-07", "NaN", "0.25 sd", "poor", "no tail"),
    ]
    told = _html.table(["guide", "ELBO", "ESS", "k-hat", "verdict", "word"], rows)
    expected = ["left", "right", "right", "right", "left", "left"]
    assert alignments(told, "th") == expected
    assert alignments(told, "td") == expected * 2
    assert told.count("padding") == 18
    assert "color" not in told


@pytest.mark.parametrize("text", ["-5", "+.5", "...", "-inf", "1,234", "< 0.01"])
def test_what_counts_as_a_number(text):
    assert alignments(_html.table((), [("a", text)]), "td") == ["left", "right"]


@pytest.mark.parametrize("text", ["a1", "nancy", "", "-x"])
def test_what_does_not(text):
    assert alignments(_html.table((), [("a", text)]), "td") == ["left", "left"]


def test_everything_is_escaped():
    evil = "<script>alert('x')</script> & \"y\""
    parts = (
        _html.paragraph(evil, strong=evil),
        _html.bullets([evil]),
        _html.table([evil], [[evil]], titles=[evil]),
    )
    for part in parts:
        assert "<script" not in part
        assert "&lt;script&gt;" in part
    assert '"y"' not in parts[2]


def test_nothing_to_say():
    assert _html.paragraph() == _html.bullets([]) == ""
    assert _html.table((), []) == "<table><tbody></tbody></table>"
    assert _html.block(_html.paragraph(), "") == "<div></div>"
