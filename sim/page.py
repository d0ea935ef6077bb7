"""A page that stands alone: escaped text, tables, pictures inside it, no script and nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

_CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #57606a; --line: #d8dee4; --wash: #f6f8fa; --warn: #fff4ce; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; } a { color: #0550ae; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.badge { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; font-size: .8rem; font-weight: 600;
  background: var(--wash); border: 1px solid var(--line); vertical-align: middle; }
.badge.warn, .note { background: var(--warn); border-color: #d4a72c; }
.note { border-left: 4px solid #d4a72c; padding: .6rem .9rem; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; font-weight: 600; color: var(--soft); border-color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
table.words td { text-align: left; white-space: normal; }
table.words td:first-child { width: 14rem; color: var(--soft); }
tr.best td { font-weight: 600; background: #ddf4e4; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; display: block; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: .3rem; padding: .7rem .9rem;
  overflow-x: auto; font-size: .85rem; }
ul { padding-left: 1.2rem; }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document of a title (text) and parts (HTML)."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_CSS}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def text(tag: str, content: str, css: str = "") -> str:
    """An element that holds plain text."""
    return f"<{tag}{_css(css)}>{escape(content)}</{tag}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], best: int = -1, css: str = "") -> str:
    """A table of texts; row number `best` is set off. Scrolls sideways where it does not fit."""
    lines = [f'<div class="wide"><table{_css(css)}>']
    if head:
        lines.append("<thead><tr>" + "".join(text("th", h) for h in head) + "</tr></thead>")
    lines.append("<tbody>")
    for i, row in enumerate(rows):
        lines.append(f"<tr{_css('best' if i == best else '')}>" + "".join(text("td", cell) for cell in row) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def picture(png: bytes, width_px: int, alt: str, caption: str) -> str:
    """A figure with the picture inside the page; alt says what a reader who cannot see it needs."""
    source = base64.b64encode(png).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" width="{width_px}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def links(files: Iterable[tuple[str, str]]) -> str:
    """A list of (file name, what it holds), linked relative to the page."""
    items = (f'<li><a href="{escape(name)}">{escape(name)}</a>: {escape(what)}</li>' for name, what in files)
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def _css(name: str) -> str:
    return f' class="{escape(name)}"' if name else ""
