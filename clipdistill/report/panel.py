"""One panel of a figure as SVG text: the style, the colours as CSS variables, and the writing of it without pyplot."""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

# Matplotlib knows no CSS variables: it draws in these colours, which stand for the variables and are replaced after.
_COLOURS: Mapping[str, str] = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--teacher)",
    "#050505": "var(--student)",
    "#060606": "var(--loss)",
    **{f"#0707{number:02d}": f"var(--c{number})" for number in range(1, 7)},
}
INK, SOFT, RULE, TEACHER, STUDENT, LOST = list(_COLOURS)[:6]
CYCLE = list(_COLOURS)[6:]
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipdistill",
    "text.parse_math": False,  # a set's name may hold a dollar sign
    "font.size": 11.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.color": RULE,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.labelcolor": INK,
}
_PAD = 0.04
# Who made it and when; a style sheet, which would hold for the whole page; fonts other than the page's own.
_DROPPED = r"<metadata>.*?</metadata>\s*|<style.*?</style>|<!--.*?-->|font-family: [^;\"]*; "


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure.

    Attributes:
        title: What it shows, as a heading.
        svg: The SVG element, to stand inline in HTML.
        text: The same in words, for those who cannot see it.
    """

    title: str
    svg: str
    text: str


@contextmanager
def panel(width: float, height: float, **edges: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, in inches of 72 units, in this module's style whatever the user's own says."""
    with style.context(["default", dict(_STYLE)]):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        figure.subplots_adjust(**edges)
        yield figure, figure.add_subplot()


def drawing(figure: Figure, title: str, text: str) -> Drawing:
    """Write a figure as an SVG element without names of its own, links, dates or XML headers.

    Its width is kept, so that letters are as large in one panel as in the next; its height follows what is in it.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Letters are only measured here, and drawn by the reader's browser, which has fonts for more scripts.
        warnings.filterwarnings("ignore", message="Glyph")
        content = figure.get_tightbbox()
        box = Bbox([[0, content.y0 - _PAD], [figure.get_figwidth(), content.y1 + _PAD]])
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches=box, metadata={"Date": None})
    return Drawing(title, _inline(buffer.getvalue(), title, text), text)


def _inline(svg: str, title: str, text: str) -> str:
    body = svg[svg.index("<svg") :].rstrip()
    box = re.search(r'viewBox="([^"]*)"', body)
    body = re.sub(_DROPPED, "", body[body.index(">") + 1 :], flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    for drawn, variable in _COLOURS.items():
        body = body.replace(drawn, variable)
    body = _own_names(body)
    label = html.escape(f"{title}: {text}", quote=True)
    joins = "stroke-linejoin: round; stroke-linecap: butt"
    return f'<svg viewBox="{box.group(1) if box else ""}" style="{joins}" role="img" aria-label="{label}">{body}'


def _own_names(body: str) -> str:
    """Drop the names that nothing refers to, and make the others this figure's own: a page holds several figures."""
    prefix = f"f{hashlib.sha256(body.encode('utf-8', 'replace')).hexdigest()[:8]}"
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", body)
    return re.sub(r'(id="|href="#|url\(#)', rf"\1{prefix}-", body)
