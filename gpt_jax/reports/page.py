"""The HTML of a report: one file with everything in it, which asks nothing of any network.

Its policy lets it load nothing, and run only the scripts that are listed by their sha256: markup
in a run's name that slipped through would do nothing.
"""

import base64
import hashlib
import html
import importlib.util
import json
from typing import Any

from etils import epath

from gpt_jax.reports.figures import FEW_COLORS, Figure, plotly

_FOLDER = epath.Path(__file__).parent / "page"


def require_plotly() -> None:
    """Raises ValueError if plotly is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise ValueError("--out: needs plotly; pip install 'gpt-jax[report]'")


def page(title: str, body: str, figures: list[Figure]) -> str:
    """The whole page.

    Args:
      title: Text.
      body: Markup; of each figure it has the place (figure_html).
      figures: In the page, in any order.
    """
    script = (_FOLDER / "report.js").read_text()
    # "<" ends no script in JSON if it is written so.
    data = json.dumps([plotly(figure) for figure in figures], separators=(",", ":"))
    library = _plotly_js() if figures else ""
    scripts = [text for text in (library, script) if text]
    parts = {
        "policy": _policy(scripts),
        "title": text(title),
        "body": body,
        "figures": data.replace("<", "\\u003c"),
        "library": f"<script>{library}</script>" if library else "",
        "script": script,
    }
    # One pass over the shell, so that braces in what users wrote stay what they are.
    shell = (_FOLDER / "report.html").read_text()
    pieces = shell.split("{{")
    whole = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        whole += [parts[name], rest]
    return "".join(whole)


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _policy(scripts: list[str]) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)
    # plotly.js makes style elements, and pictures of a plot as data: or blob:.
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def text(value: Any) -> str:
    """A value of a user as text of the page, never markup."""
    return html.escape(str(value))


def section(title: str, *parts: str) -> str:
    """A heading and what is below it; "" if that is nothing."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{inside}\n</section>" if inside else ""


def heading(words: str) -> str:
    """A heading inside a section."""
    return f"<h3>{text(words)}</h3>"


def paragraph(words: str, soft: bool = False) -> str:
    """Text as a paragraph; soft: small and grey."""
    return f"<p{' class=soft' if soft else ''}>{text(words)}</p>"


def folded(summary: str, inside: str, is_open: bool = False) -> str:
    """Markup that is shown when its summary is clicked, or at once; "" if there is none."""
    return (
        f"<details{' open' * is_open}><summary>{text(summary)}</summary>{inside}</details>"
        if inside
        else ""
    )


def figure_html(figure: Figure) -> str:
    """The place of a figure in the page."""
    boxes = "".join(
        f'<label><input type="checkbox" data-axis="{axis}"> log {axis}</label>' for axis in "xy"
    )
    return (
        f'<figure><h3>{text(figure.title)}</h3><div class="axes">{boxes}</div>'
        f'<div class="plot" id="{text(figure.key)}" role="img" aria-label="{text(figure.title)}">'
        f"</div><figcaption>{text(figure.caption)}</figcaption></figure>"
    )


def picker(names: list[str], colors: dict[str, str]) -> str:
    """The list of runs to pick from; "" for one run."""
    if len(names) < 2:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" value="{text(name)}" checked> '
        f'<span class="swatch" style="background:{colors[name]}"></span>{text(name)}</label>'
        for name in names
    )
    many = len(set(colors.values())) > FEW_COLORS
    order = (
        paragraph("Colours go from dark to light as runs cost more FLOPs.", True) if many else ""
    )
    buttons = "".join(
        f'<button type="button" id="{key}">{word}</button>'
        for key, word in (("all", "show"), ("none", "hide"), ("only", "show these alone"))
    )
    return (
        '<div id="picker"><div class="row"><input type="search" id="find" '
        'aria-label="part of a run\'s name" placeholder="part of a name, e.g. n48k s0">'
        f'{buttons}<span class="soft" id="picked">{len(names)} of {len(names)}</span></div>'
        f'<div id="names">{boxes}</div>{order}</div>'
    )
