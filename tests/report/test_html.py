import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from calmerge.report.charts import summary_svg
from calmerge.report.html import html_page, write_html
from calmerge.report.results import Report, Versions
from calmerge.report.sections import searched
from calmerge.report.traces import FitTrace, SearchTrace, Tried

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--hide-scrollbars", "--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom"]
# a window of Chromium is at least 500 pixels wide, a frame is not
FRAME = """<!doctype html><body><script>
addEventListener("message", (event) => { document.body.dataset.seen = event.data; });
</script><iframe src="report.html" width="%d" height="900" style="border:0"></iframe></body>"""
PROBE = """<script>
document.querySelectorAll("details").forEach((part) => { part.open = true; });
const button = [...document.querySelectorAll("table.league button")].find((b) => b.textContent === "time");
const labels = () => [...document.querySelector("table.league").tBodies[1].rows].map((r) => r.cells[0].textContent);
const outside = [], clash = [];
document.querySelectorAll("svg").forEach((svg) => {
  const box = svg.getBoundingClientRect();
  if (!box.width) return;
  const texts = [...svg.querySelectorAll("text")].filter((t) => !t.getAttribute("transform"));
  const boxes = texts.map((t) => t.getBoundingClientRect());
  boxes.forEach((b, i) => {
    if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
      outside.push(texts[i].textContent);
    boxes.slice(0, i).forEach((c, j) => {
      const wide = Math.min(b.right, c.right) - Math.max(b.left, c.left);
      const high = Math.min(b.bottom, c.bottom) - Math.max(b.top, c.top);
      if (wide > 1 && high > 3) clash.push([texts[i].textContent, texts[j].textContent]);
    });
  });
});
const before = labels();
button.focus();
button.click();
const first = [button.closest("th").ariaSort, labels()];
button.click();
const second = [button.closest("th").ariaSort, labels()];
const root = document.documentElement;
const seen = {width: root.scrollWidth, inner: window.innerWidth, before, first, second, outside, clash,
  sorted: document.querySelectorAll("[aria-sort=ascending], [aria-sort=descending]").length};
parent.postMessage(JSON.stringify(seen), "*");
</script></body>"""


class Outline(HTMLParser):
    """Counts tags and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_nests_and_headings_descend_by_one(report: Report) -> None:
    outline = Outline()
    outline.feed(html_page(report))
    assert outline.open == []
    assert outline.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False))


@pytest.mark.parametrize(("options", "opened"), [(2, True), (40, False)])
def test_what_a_search_took_is_a_table_folded_where_it_is_long(options: int, opened: bool) -> None:
    values = {f"layer {i}: scale": 0.123456 + i for i in range(options)}
    page = searched(
        SearchTrace(score="expert_kl", strategy="tpe", trials=[Tried(values=values, scores=[-1.0])], best=0), ""
    )
    assert ("<details open>" in page) is opened
    assert "<td>0.1235</td>" in page


def test_page_needs_no_network(report: Report) -> None:
    page = html_page(report).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//cdn|@import|url\(|src=|<link", page)


def test_texts_of_the_report_are_escaped(report: Report) -> None:
    page = html_page(report.model_copy(update={"title": "<script>alert(1)</script>"}))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "lr &lt;0.1 &amp; try again" in page


def test_every_figure_and_tile_is_stamped(report: Report) -> None:
    page = html_page(report)
    assert page.count("<figcaption>") == len(re.findall(r"<figcaption>.*?class=\"stamp", page))
    assert page.count('class="tile"') == len(re.findall(r'class="tile">.*?class="stamp inductive"', page))


def test_transductive_numbers_are_stamped_so(report: Report) -> None:
    rows = [row.model_copy(update={"split": "transductive"}) if row.trace else row for row in report.rows]
    page = html_page(report.model_copy(update={"rows": rows}))
    assert "inductive + transductive" in page
    assert 'class="stamp transductive"' in page
    assert "test inputs" in page


def test_empty_and_unevaluated_reports_make_pages(report: Report, tmp_path: Path) -> None:
    versions = Versions(calmerge="0.1.0", torch="2.9", python="3.11", platform="Linux")
    empty = Report(title="empty", created="2026-01-31", versions=versions)
    assert "No method has been evaluated." in write_html(empty, tmp_path / "a.html").read_text()
    bare = [row.model_copy(update={"scores": {}}) for row in report.rows]
    assert "Inside the fits" in html_page(report.model_copy(update={"rows": bare}))


def test_only_failures_make_a_page(report: Report) -> None:
    page = html_page(report.model_copy(update={"rows": report.rows[-1:]}))
    assert "loss is not finite" in page
    assert "No method has been evaluated." in page


def test_losses_that_are_not_finite_can_be_drawn(report: Report) -> None:
    rows = [row.model_dump() for row in report.rows if row.label == "CALM"]
    for row in rows:
        row["trace"]["stages"][0]["loss"]["tweets"] = [float("nan")] * 60
        row["trace"]["stages"][0]["loss"]["movies"][7] = float("inf")
    fields = report.model_dump(by_alias=True) | {"rows": rows}
    assert "Stage 1" in html_page(Report.model_validate(fields))


def test_expert_with_nothing_right_still_makes_a_page(report: Report) -> None:
    rows = [row.model_dump() for row in report.rows]
    rows[1]["scores"]["tweets"]["accuracy"] = 0.0
    page = html_page(Report.model_validate(report.model_dump(by_alias=True) | {"rows": rows}))
    assert "CALM leads" in page


def test_summary_picture_is_wellformed_and_names_all_methods(report: Report) -> None:
    root = ElementTree.fromstring(summary_svg(report))
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert texts >= {"CALM", "AdaMerging", "TIES", "Base", "% of the experts' accuracy, inductive"}


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on the PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_chromium(report: Report, tmp_path: Path, width: int) -> None:
    assert CHROMIUM
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % width)
    (tmp_path / "report.html").write_text(html_page(report).replace("</body>", PROBE))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<body data-seen="([^"]*)"', dom)
    assert found
    seen = json.loads(unescape(found[1]))
    assert seen["inner"] == width
    assert seen["width"] <= width
    assert seen["outside"] == []
    assert seen["clash"] == []
    assert seen["before"][0] == "CALM"
    assert seen["first"][0] == "descending"
    assert seen["second"][0] == "ascending"
    assert seen["sorted"] == 1
    *ranked, failed = seen["first"][1]
    assert seen["second"][1] == [*reversed(ranked), failed]  # what has no number stays last
    assert failed == "DARE on TIES (failed)"


def test_methods_of_several_blocks_are_ranked_apart(report: Report) -> None:
    rows = [row.model_copy(update={"per_task": True}) if row.label == "CALM" else row for row in report.rows]
    mixed = report.model_copy(update={"rows": rows})
    page = html_page(mixed)
    assert page.count('<tbody class="block">') == 2
    assert page.count('<tbody class="methods">') == 2
    assert "CALM leads" not in page  # the best one, but it competes with none of the others
    assert "CALM leads" in html_page(report)
    assert 'class="block"' not in html_page(report)
    assert "What time buys" in page


def test_the_second_drawing_stands_under_a_short_first_one(report: Report) -> None:
    row = next(row for row in report.rows if row.label == "CALM")
    for count, under in ((4, True), (14, False)):
        rows = [row.model_copy(update={"label": f"CALM {i}"}) for i in range(count)]
        page = html_page(report.model_copy(update={"rows": rows}))
        assert (page.index("What time buys") < page.index("How it was measured")) == under


def test_many_fits_are_folded(report: Report) -> None:
    fitted = next(row for row in report.rows if row.label == "AdaMerging")
    more = [fitted.model_copy(update={"label": f"Fit {i}"}) for i in range(5)]
    more.append(fitted.model_copy(update={"label": "Statistics", "trace": FitTrace(loss=[])}))
    page = html_page(report.model_copy(update={"rows": [*report.rows, *more]}))
    assert "<summary>Fit 3</summary>" in page
    assert "<summary>Statistics</summary>" not in page  # nothing to draw
