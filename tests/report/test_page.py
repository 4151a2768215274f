"""The page as HTML, without a browser: ids, headings, pictures, tables, and what it may load."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import comparison_page, report_page


class Page(HTMLParser):
    """The tags of a page, each with its attributes, and the texts of its headings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, *names: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module", params=[report_page, comparison_page])
def html(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = request.param(tmp_path_factory.mktemp("page"))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_tag_is_closed(page: Page, html: str) -> None:
    assert page.open == [] and html.startswith("<!DOCTYPE html>")
    assert page.named("html") == [{"lang": "en"}]


def test_ids_are_unique_and_every_link_has_its_place(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    links = [attributes["href"] for attributes in page.named("a")]
    assert links[0] == "#content" and len(links) > 4
    assert {link.removeprefix("#") for link in links} <= set(ids)
    described = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert described and set(described) <= set(ids)


def test_headings_are_in_order(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_every_picture_has_a_text_of_its_own(page: Page) -> None:
    texts = [attributes.get("alt", "") for attributes in page.named("img")]
    assert texts and all(len(text) > 3 for text in texts)
    assert len(set(texts)) == len(texts)


def test_every_table_and_figure_is_in_a_box_that_scrolls(page: Page) -> None:
    boxes = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    figures = [a for a in page.named("img") if a.get("class", "").startswith("plot")]
    assert len(boxes) == len(page.named("table")) + len(figures) > len(figures) > 0
    assert all(box["tabindex"] == "0" and box["role"] == "region" for box in boxes)
    names = [box["aria-label"] for box in boxes]
    assert all(names) and len(set(names)) == len(names)
    assert all(head.get("scope") for head in page.named("th"))


def test_nothing_is_loaded(page: Page, html: str) -> None:
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert addresses and all(a.startswith(("data:image/", "#")) for a in addresses)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|import\(", html)
    assert not page.named("link", "iframe", "object", "embed", "form")


def test_the_policy_of_the_page_allows_its_own_script_alone(page: Page, html: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for a in page.named("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert f"script-src 'sha256-{digest}';" in policy
