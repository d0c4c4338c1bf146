"""One league of several benches of one suite, such as one with three seeds and one with one: table and picture.

python bench/league_page.py bench-text bench-text-3 --svg docs/bench-text.svg        # the table goes to the terminal
"""

import argparse
from pathlib import Path

from calmerge.report.charts import summary_svg
from calmerge.report.results import Report, load, write_text
from calmerge.report.tables import markdown_table


def joined(reports: list[Report]) -> Report:
    """The first report with the rows of all, each method and seed once."""
    rows = {(row.label, row.seed): row for report in reports for row in report.rows}
    seeds = sorted({seed for report in reports for seed in report.seeds})
    return reports[0].model_copy(update={"rows": list(rows.values()), "seeds": seeds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--svg", type=Path, required=True)
    args = parser.parse_args()
    report = joined([load(folder / "report.json") for folder in args.folders])
    write_text(args.svg, summary_svg(report))
    print(markdown_table(report))


if __name__ == "__main__":
    main()
