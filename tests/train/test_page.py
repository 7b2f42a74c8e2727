"""The page of a report: nothing that is passed in becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from train.page import Section, figures, folded, heading, listing, page, paragraph, picture, table, text, tiles

HOSTILE = "</td></style><script>alert('x')</script><img src=http://x.invalid/a onerror=\"alert(1)\">"
PNG = b"\x89PNG\r\n\x1a\n"


class Reader(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize(
    "markup",
    [
        text(HOSTILE),
        paragraph(HOSTILE),
        heading(HOSTILE),
        tiles([(HOSTILE, HOSTILE)]),
        table([HOSTILE], [[HOSTILE]], numbers=[0], marked=[0]),
        listing(f"{HOSTILE}\n{HOSTILE}"),
        folded(HOSTILE, ""),
        picture(PNG, HOSTILE, caption=HOSTILE),
        page(HOSTILE, HOSTILE, [Section(HOSTILE, "")], HOSTILE),
    ],
)
def test_what_is_passed_in_stays_text(markup: str) -> None:
    read = Reader(markup)
    assert not {"script", "iframe"} & {tag for tag, _ in read.elements}
    assert all(name not in attributes for _, attributes in read.elements for name in ("onerror", "onload"))
    sources = [attributes["src"] for _, attributes in read.elements if "src" in attributes]
    assert all(source is not None and source.startswith("data:image/") for source in sources)
    assert "alert('x')" in read.words


def test_texts_are_one_line_of_bearable_length() -> None:
    assert text("a\nb\tc") == "a b c" and text(3.5) == "3.5" and len(text("x" * 10**6)) == 300
    assert text("\x00\u202e") == "\ufffd\ufffd"


def test_a_listing_keeps_its_columns_and_a_table_its_places() -> None:
    assert "a   b\nc\ufffdd" in listing("a   b\nc\x00d")
    read = Reader(table(["a", "b"], [[1, 2], [3, 4]], numbers=[1], marked=[1]))
    cells = [attributes.get("class") for tag, attributes in read.elements if tag == "td"]
    assert cells == [None, "number", None, "number"]
    assert [attributes.get("class") for tag, attributes in read.elements if tag == "tr"] == [None, None, "marked"]


def test_the_page_forbids_the_browser_what_it_does_not_need() -> None:
    read = Reader(
        page("a", "b", [Section("What next", figures([picture(PNG, "c")])), Section("Not", "", there=False)], "d")
    )
    metas = [attributes for tag, attributes in read.elements if tag == "meta"]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    links = [attributes["href"] for tag, attributes in read.elements if tag == "a"]
    assert links == ["#what-next"] and ("section", {"id": "what-next"}) in read.elements
