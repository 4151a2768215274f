"""The pages in headless Chromium: what it says, what it draws and loads, sorting, phones, and paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NAMES, Browser, find
from pages import comparison_page, report_page

pytestmark = pytest.mark.skipif(
    find() is None,
    reason=f"no Chromium found: install one of {', '.join(NAMES)}, or name it in CHROMIUM",
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(str(find()), tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {"report": report_page(folder / "run"), "runs": comparison_page(folder)}


PAGES = pytest.mark.parametrize("page", ["report", "runs"])


@PAGES
def test_nothing_is_said_and_nothing_but_the_file_is_loaded(
    chromium: Browser, files: dict[str, Path], page: str
) -> None:
    chromium.open(files[page])
    chromium.run("console.error('heard'), 0")  # so that silence means something
    said = chromium.console()
    assert len(said) == 1 and "heard" in said[0], said
    loaded = chromium.loaded()
    assert loaded[0] == files[page].resolve().as_uri()
    assert [url for url in loaded[1:] if not url.startswith("data:")] == []


@PAGES
def test_the_page_loads_nothing_even_if_it_is_told_to(
    chromium: Browser, files: dict[str, Path], page: str, tmp_path: Path
) -> None:
    """As a name that was not escaped would."""
    text = files[page].read_text(encoding="utf-8")
    bad = "<script>document.title = 'run'</script><img alt='' src='https://example.org/x.png'>"
    (tmp_path / "bad.html").write_text(text.replace("</h1>", f"</h1>{bad}", 1), encoding="utf-8")
    chromium.open(tmp_path / "bad.html")
    assert chromium.run("document.title") != "run"
    assert sum("Content Security Policy" in line for line in chromium.console()) == 2
    assert chromium.run("[...document.images].filter((i) => i.naturalWidth === 0).length") == 1


@PAGES
def test_every_picture_is_drawn(chromium: Browser, files: dict[str, Path], page: str) -> None:
    chromium.open(files[page])
    sizes = chromium.run("[...document.images].map((i) => [i.alt, i.naturalWidth, i.complete])")
    assert len(sizes) == {"report": 15, "runs": 1}[page]
    assert [size for size in sizes if size[1] == 0 or not size[2]] == []


@PAGES
@pytest.mark.parametrize("width", [320, 400, 1280])
def test_only_tables_scroll_sideways(
    chromium: Browser, files: dict[str, Path], page: str, width: int
) -> None:
    chromium.open(files[page], width=width)
    assert chromium.run("document.documentElement.scrollWidth") <= width
    outside = chromium.run(
        """[...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll")
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 99))"""
    )
    assert outside == []
    if width <= 400:
        assert chromium.run(
            "[...document.querySelectorAll('.scroll')].some((e) => e.scrollWidth > e.clientWidth)"
        )


#: The table of the cases, and what a column of it shows.
CASES = "document.querySelector('#cases table')"
COLUMN = f"[...{CASES}.tBodies[0].rows].map((r) => r.cells[%d].textContent.trim())"
SORTED = f"[...{CASES}.tHead.rows[0].cells].map((h) => h.getAttribute('aria-sort'))"


def test_sorting_by_click_and_by_keyboard(chromium: Browser, files: dict[str, Path]) -> None:
    chromium.open(files["report"])
    heads = chromium.run(f"[...{CASES}.tHead.rows[0].cells].map((h) => h.innerText.trim())")
    dice = next(i for i, head in enumerate(heads) if "all it has" in head and "Dice" in head)
    assert chromium.run(SORTED) == [None] * len(heads)
    assert chromium.run(COLUMN % 0) == ["p1", "p10", "p2", "p9"]

    click = f"{CASES}.tHead.rows[0].cells[%d].querySelector('button').click()"
    chromium.run(click % dice)
    rising = chromium.run(COLUMN % dice)
    assert rising == sorted(rising, key=float) == ["32.0", "45.0", "48.0", "51.0"]
    assert chromium.run(SORTED)[dice] == "ascending"
    chromium.run(click % dice)
    assert chromium.run(COLUMN % dice) == rising[::-1]
    assert chromium.run(SORTED)[dice] == "descending"

    # Names are sorted as people count, not letter by letter.
    chromium.run(f"{CASES}.tHead.rows[0].cells[0].querySelector('button').focus()")
    chromium.press("Enter", text="\r")
    assert chromium.run(COLUMN % 0) == ["p1", "p2", "p9", "p10"]
    chromium.press(" ", text=" ")
    assert chromium.run(COLUMN % 0) == ["p10", "p9", "p2", "p1"]
    assert chromium.run(SORTED) == ["descending", *[None] * (len(heads) - 1)]
    assert chromium.run("document.activeElement.tagName") == "BUTTON"


def test_undefined_scores_stay_at_the_end(
    chromium: Browser, files: dict[str, Path], tmp_path: Path
) -> None:
    text = files["report"].read_text(encoding="utf-8")
    text = re.sub(r'data-value="0\.1200*\d*"', 'data-value=""', text)
    (tmp_path / "nan.html").write_text(text, encoding="utf-8")
    chromium.open(tmp_path / "nan.html")
    column = chromium.run(
        f"[...{CASES}.tHead.rows[0].cells].findIndex((h) => h.innerText.includes('worst'))"
    )
    for _ in range(2):
        chromium.run(f"{CASES}.tHead.rows[0].cells[{column}].querySelector('button').click()")
        assert chromium.run(COLUMN % 0)[-1] == "p10"


@PAGES
def test_every_sortable_column_sorts(chromium: Browser, files: dict[str, Path], page: str) -> None:
    chromium.open(files[page])
    faults = chromium.run(
        """[...document.querySelectorAll("table.sortable th button")].filter((button) => {
          button.click();
          const head = button.parentElement, column = head.cellIndex;
          const body = head.closest("table").tBodies[0];
          const texts = [...body.rows].map((r) => r.cells[column].dataset.value ?? "");
          const known = texts.filter((t) => t).map(Number);
          return head.getAttribute("aria-sort") !== "ascending"
            || known.some((x, i) => i && x < known[i - 1]);
        }).map((button) => button.innerText)"""
    )
    assert faults == []
    assert chromium.run("document.querySelectorAll('table.sortable th button').length") > 20


@PAGES
def test_the_first_key_leads_to_the_content(
    chromium: Browser, files: dict[str, Path], page: str
) -> None:
    chromium.open(files[page])
    chromium.press("Tab")
    assert chromium.run("document.activeElement.textContent") == "Skip to the content"
    assert chromium.run("document.activeElement.getBoundingClientRect().left") >= 0
    assert chromium.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    chromium.press("Enter", text="\r")
    assert chromium.run("location.hash + ' ' + document.activeElement.id") == "#content content"


CONTRAST = """(() => {
  const parse = (colour) => {
    const parts = colour.match(/[\\d.]+/g).map(Number);
    return parts.length < 4 ? [...parts, 1] : parts;
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const faults = new Set();
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own) continue;
    const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faults.add(`${element.tagName}.${element.className} ${ratio.toFixed(2)}`);
  }
  return [...faults];
})()"""


@PAGES
def test_text_has_enough_contrast(chromium: Browser, files: dict[str, Path], page: str) -> None:
    chromium.open(files[page])
    assert chromium.run(CONTRAST) == []


@PAGES
def test_paper_has_whole_tables_and_no_buttons(
    chromium: Browser, files: dict[str, Path], page: str
) -> None:
    chromium.open(files[page])
    chromium.call("Emulation.setEmulatedMedia", media="print")
    try:
        boxes = "[...document.querySelectorAll('.scroll')]"
        assert chromium.run(f"{boxes}.every((e) => getComputedStyle(e).overflowX === 'visible')")
        assert chromium.run(
            "[...document.querySelectorAll('th button')].every((b) => "
            "getComputedStyle(b).display === 'contents' && "
            "getComputedStyle(b, '::after').content === 'none')"
        )
        hidden = "[...document.querySelectorAll('nav, .skip, .hint')]"
        assert chromium.run(f"{hidden}.every((e) => getComputedStyle(e).display === 'none')")
        # 186 mm of an A4 page between its margins; the browser shrinks what is wider, down to half.
        chromium.size(703)
        assert chromium.run("document.documentElement.scrollWidth") <= 2 * 703
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")
    printed = chromium.call(
        "Page.printToPDF", preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69
    )
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 15
