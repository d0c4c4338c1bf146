"""Typed results, terminal tables, an offline page, a picture for a README, and the card of a merged model."""

from calmerge.report.card import model_card
from calmerge.report.charts import summary_svg
from calmerge.report.html import html_page, write_html
from calmerge.report.league import headline, standings
from calmerge.report.results import (
    Analysis,
    Input,
    LeftOut,
    Protocol,
    Report,
    Row,
    Score,
    Suite,
    TaskInfo,
    Versions,
    dump,
    dumps,
    load,
    loads,
    path_free,
)
from calmerge.report.tables import csv_table, league_table, markdown_table
from calmerge.report.traces import CalmStage, CalmTrace, Coefficients, Coverage, Density, FitTrace, Histogram

__all__ = [
    "Analysis",
    "CalmStage",
    "CalmTrace",
    "Coefficients",
    "Coverage",
    "Density",
    "FitTrace",
    "Histogram",
    "Input",
    "LeftOut",
    "Protocol",
    "Report",
    "Row",
    "Score",
    "Suite",
    "TaskInfo",
    "Versions",
    "csv_table",
    "dump",
    "dumps",
    "headline",
    "html_page",
    "league_table",
    "load",
    "loads",
    "markdown_table",
    "model_card",
    "path_free",
    "standings",
    "summary_svg",
    "write_html",
]
