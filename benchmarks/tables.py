"""The tables of results in README and docs/, written from the committed JSON files: `python -m benchmarks.tables`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.form import COLUMNS, RESULTS, ROOT, Report, cells, read_report
from pipeline.cli import command
from pipeline.files import write_text
from pipeline.progress import say

BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n)(.*?)(<!-- /results:\2 -->)", flags=re.DOTALL)
NUMBERS = range(2, 6)  # columns that are set flush right


def tables(root: Path = ROOT, results: Path = RESULTS) -> Path:
    """Write the table of each benchmark between its markers, `<!-- results:NAME -->` and `<!-- /results:NAME -->`.

    Args:
        root: Folder of the README, and of docs/.
        results: Folder of the JSON files.

    Returns:
        The README.
    """
    for page in pages(root):
        text = page.read_text()
        made = fill(text, results, up_from(page, root))
        if made != text:
            write_text(page, made)
        if marked(made):
            say(f"{page}: tables of {', '.join(sorted(marked(made)))}")
    return (root / "README.md").resolve()


def pages(root: Path = ROOT) -> list[Path]:
    """The README and all of docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def up_from(page: Path, root: Path = ROOT) -> str:
    """What stands before a path from the root in a link on a page."""
    return "../" * (len(page.relative_to(root).parts) - 1)


def fill(text: str, results: Path = RESULTS, up: str = "") -> str:
    """The text with the current table in each pair of markers; see `up_from`."""
    reports = read_all(results)
    return BLOCK.sub(lambda found: f"{found[1]}{markdown(reports.get(found[2], []), up)}{found[4]}", text)


def marked(text: str) -> set[str]:
    """The benchmarks that a text has markers for."""
    return {name for _, name, _, _ in BLOCK.findall(text)}


def read_all(results: Path = RESULTS) -> dict[str, list[Report]]:
    """Benchmark to its reports, one for each machine, in the order of the files' names."""
    reports: dict[str, list[Report]] = {}
    for path in sorted(results.glob("*.json")):
        report = read_report(path)
        reports.setdefault(report.name, []).append(report)
    return reports


def markdown(reports: list[Report], up: str = "") -> str:
    """A table for each machine, with the command that gives it."""
    return "".join(f"{_caption(report, up)}\n\n{_table(report)}\n" for report in reports)


def _caption(report: Report, up: str) -> str:
    tools = [
        f"{name} {number}" for name, number in report.versions.items() if name not in ("python", "revision", "roadwork")
    ]
    given_by = f"python -m benchmarks.{report.module or report.name}"
    return (
        f"`{given_by}` on `{report.machine['name']}` ({report.machine['cpu']}, "
        f"{report.machine['memory_gb']:.0f} GB), with {', '.join(tools)}. "
        f"Notes on each row: [JSON]({up}benchmarks/results/{report.machine['name']}-{report.name}.json)."
    )


def _table(report: Report) -> str:
    rule = ["--:" if column in NUMBERS else "---" for column in range(len(COLUMNS))]
    lines = [COLUMNS, rule, *(cells(row) for row in report.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    raise SystemExit(command(tables))
