"""The report as one page that needs nothing else: no network, no fonts, no libraries."""

from importlib.resources import files
from pathlib import Path

from calmerge.report import sections
from calmerge.report.league import headline, split_stamp
from calmerge.report.markup import Html, el, join
from calmerge.report.results import Report, write_text

NAVIGATION = {
    "result": "Result",
    "league": "League",
    "tasks": "Tasks",
    "vectors": "Task vectors",
    "fits": "Fits",
    "provenance": "Provenance",
}


def write_html(report: Report, path: str | Path) -> Path:
    """Write the page of a report, all or nothing; returns the path.

    Raises:
        OutputError: the file cannot be written; whatever was there stays.
    """
    return write_text(path, html_page(report))


def html_page(report: Report) -> str:
    """The page of a report as HTML: headline, key numbers, charts, a sortable table, the curves of fits, provenance.

    >>> page = html_page(Report(title="A <b> test", created="2026-01-31", versions={
    ...     "calmerge": "0.1.0", "torch": "2.9", "python": "3.11", "platform": "Linux"}))
    >>> "<title>A &lt;b&gt; test</title>" in page, "No method has been evaluated." in page
    (True, True)
    """
    parts = {
        "result": sections.overview(report),
        "league": sections.league(report),
        "tasks": sections.per_task(report),
        "vectors": sections.vectors(report.analysis),
        "fits": sections.fits(report),
        "provenance": sections.provenance(report),
    }
    links = (el("a", NAVIGATION[name], href=f"#{name}") for name, part in parts.items() if part)
    stamp = split_stamp(report)
    header = el(
        "header",
        el(
            "p", "calmerge report · ", report.created[:10], " · ", el("span", stamp, class_=f"stamp {stamp.split()[0]}")
        ),
        el("h1", report.title),
        el("p", headline(report), class_="lead"),
        sections.tiles(report),
        el("nav", *links, aria_label="Parts of the report"),
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", report.title),
        el("style", Html(_asset("colours.css") + _asset("page.css"))),
    )
    script = el("script", Html(_asset("page.js")))
    body = el("body", header, el("main", *parts.values()), script)
    return f"<!doctype html>\n{join(el('html', head, body, lang='en'))}\n"


def _asset(name: str) -> str:
    return files("calmerge.report").joinpath(name).read_text("utf-8")
