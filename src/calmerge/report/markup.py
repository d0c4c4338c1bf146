"""HTML and SVG as strings, safe by construction: plain text is escaped, only what `el` made is taken as it is."""

import html
import math

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Html(str):
    """Markup that needs no escaping."""

    __slots__ = ()


def el(name: str, /, *children: str, **attributes: str | float | bool | None) -> Html:
    """An element with its children; in attributes a trailing `_` goes, another `_` is a hyphen, None and False omit.

    >>> el("p", "1 < 2 ", el("b", "bold"), class_="note", aria_label="a & b", hidden=False)
    '<p class="note" aria-label="a &amp; b">1 &lt; 2 <b>bold</b></p>'
    >>> el("rect", x=1.5, width=10.0, stroke_width=0.3333)
    '<rect x="1.5" width="10" stroke-width="0.33"></rect>'
    """
    shown = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    start = name + "".join(_attribute(key, value) for key, value in shown if value is not None and value is not False)
    if name in VOID:
        return Html(f"<{start}>")
    return Html(f"<{start}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Children one after the other, plain text escaped.

    >>> join("a < b", el("br"))
    'a &lt; b<br>'
    """
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def _attribute(key: str, value: str | float | bool) -> str:
    if value is True:
        return f" {key}"
    text = value if isinstance(value, str) else number(value)
    return f' {key}="{html.escape(text)}"'


def number(value: float) -> str:
    """A coordinate with at most two decimals.

    >>> number(12.0), number(0.126), number(-0.001)
    ('12', '0.13', '0')
    """
    if not math.isfinite(value):
        raise ValueError(f"a coordinate must be finite, got {value}")
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
