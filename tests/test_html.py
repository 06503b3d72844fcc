"""HTML of results: escaped, closed, and without colours of its own."""

from pyro_flowvi import _html


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
