"""The HTML of a report: one file that needs nothing else, no script, no font, no request.

Every function takes plain text, of whomever, and returns markup: nothing that is passed in can become markup, but for
what is said to be. The page forbids the browser everything but its own styles and pictures, should that fail.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from train.pictures import printable, shortened

_MOST_LETTERS = 300  # of a text; more is an attack or a mistake
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --page: #f6f7f9; --card: #fff;
  --accent: #1f6feb; --mark: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #333b47; --page: #14181e;
  --card: #1c222b; --accent: #6aa5ff; --mark: #3d3420; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 20px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 10px; }
h3 { font-size: 1rem; margin: 18px 0 8px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 12px 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin: 0 0 16px; }
.soft, footer { color: var(--soft); font-size: 0.87rem; }
footer { padding-bottom: 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 0; }
.tiles div { border: 1px solid var(--line); border-radius: 6px; padding: 8px 10px; }
.tiles dt { color: var(--soft); font-size: 0.8rem; }
.tiles dd { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 14px; }
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.whole img { margin: 0 auto; }
figcaption { font-size: 0.87rem; margin: 0 0 4px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.87rem; }
th, td { text-align: left; vertical-align: top; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 32em; overflow-wrap: break-word; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.marked td { background: var(--mark); }
pre { margin: 0; padding: 10px; font: 0.82rem/1.45 ui-monospace, monospace; background: var(--page);
  border-radius: 6px; width: max-content; min-width: 100%; }
pre.wrapped { width: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 8px 0; }
@media (max-width: 600px) { th, td { padding-right: 9px; } td { min-width: 7em; overflow-wrap: anywhere; }
  td.number { min-width: 0; } section { padding: 12px; } }
"""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    """Plain text."""
    body: str
    """Markup."""
    there: bool = True
    """False: it only says why it is missing."""

    @property
    def anchor(self) -> str:
        """Where the table of contents leads."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


def page(title: str, subtitle: str, sections: Sequence[Section], foot: str) -> str:
    """The whole document."""
    contents = "".join(
        f'<a href="#{section.anchor}">{text(section.title)}</a>' for section in sections if section.there
    )
    parts = "".join(
        f'<section id="{section.anchor}"><h2>{text(section.title)}</h2>{section.body}</section>\n'
        for section in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{_STYLE}</style></head>\n'
        f'<body><header><h1>{text(title)}</h1><p class="soft">{text(subtitle)}</p><nav>{contents}</nav></header>\n'
        f"<main>{parts}</main><footer><p>{text(foot)}</p></footer></body></html>\n"
    )


def text(value: object) -> str:
    """Any value as one line of text."""
    return html.escape(shortened(str(value), _MOST_LETTERS))


def paragraph(words: object, *, soft: bool = False) -> str:
    """One line of prose."""
    return f"<p{' class=soft' * soft}>{text(words)}</p>"


def heading(words: str) -> str:
    """A title within a section."""
    return f"<h3>{text(words)}</h3>"


def tiles(entries: Iterable[tuple[str, str]]) -> str:
    """Numbers that one looks for first, each with its name."""
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in entries)
        + "</dl>"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = (), marked: Sequence[int] = ()
) -> str:
    """Rows in a box that scrolls by itself; the columns `numbers` stand to the right, the rows `marked` in colour."""

    def cells(kind: str, row: Sequence[object]) -> str:
        of_number = dict.fromkeys(numbers, ' class="number"')
        return "".join(f"<{kind}{of_number.get(i, '')}>{text(cell)}</{kind}>" for i, cell in enumerate(row))

    body = "".join(
        f"<tr{' class=marked' * (number in marked)}>{cells('td', row)}</tr>" for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def listing(lines: str, *, wrapped: bool = False) -> str:
    """Lines as they stand, in a box that scrolls by itself, or, to be copied, `wrapped` at its edge."""
    shown = "\n".join(html.escape("".join(map(_kept, line))) for line in lines.splitlines())
    return f'<div class="scroll"><pre{" class=wrapped" * wrapped}>{shown}</pre></div>'


def _kept(letter: str) -> str:
    return letter if letter == " " else printable(letter)


def folded(summary: str, body: str) -> str:
    """Markup that is seen after a click."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def picture(data: bytes, described: str, *, width: int | None = None, caption: str = "") -> str:
    """A PNG or JPEG, shown at most `width` pixels wide, with words above it."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    sized = "" if width is None else f' width="{width}"'
    above = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure>{above}<img src="{source}" alt="{text(described)}"{sized}></figure>'


def figures(pictures: Iterable[str], *, whole: bool = False) -> str:
    """Pictures (markup) side by side where there is room; `whole`: one below the other."""
    return f'<div class="{"whole" if whole else "figures"}">{"".join(pictures)}</div>'
