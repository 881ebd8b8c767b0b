"""The tables of docs/results.md, written from the committed results: `python -m benchmarks.tables`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.form import COLUMNS, RESULTS, ROOT, Report, cells, read_report
from benchmarks.gpu.rows import table
from pipeline.cli import command
from pipeline.files import write_text
from pipeline.progress import say

PAGE = ROOT / "docs" / "results.md"
UP = "../"  # from the page to the project's root
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n)(.*?)(<!-- /results:\2 -->)", flags=re.DOTALL)
GPU_BLOCK = re.compile(r"(<!-- gpu:(\d) -->\n)(.*?)(<!-- /gpu:\2 -->)", flags=re.DOTALL)
NUMBERS = range(2, 6)  # columns that are aligned right


def tables(page: Path = PAGE, results: Path = RESULTS) -> Path:
    """Write the table of each benchmark between its markers, `<!-- results:NAME -->` and `<!-- /results:NAME -->`.

    The table of a call of benchmarks/gpu.sh stands between `<!-- gpu:CALL -->` and `<!-- /gpu:CALL -->`.

    Args:
        page: Markdown file with the markers, in a folder of the project's root.
        results: Folder of the committed results.

    Returns:
        The page.
    """
    text = page.read_text()
    made = fill(text, results)
    if made != text:
        write_text(page, made)
    say(f"{page}: tables of {', '.join(sorted(marked(made)))}")
    return page.resolve()


def fill(text: str, results: Path = RESULTS) -> str:
    """Put the current table into each pair of markers of a text; markers without results are emptied.

    A GPU's rows stay without results, and say so.
    """
    reports = read_all(results)
    text = GPU_BLOCK.sub(lambda found: f"{found[1]}\n{table(int(found[2]), results)}\n{found[4]}", text)
    return BLOCK.sub(lambda found: f"{found[1]}{markdown(reports.get(found[2], []))}{found[4]}", text)


def marked(text: str) -> list[str]:
    """The benchmarks that a text has markers for, in their order."""
    return [name for _, name, _, _ in BLOCK.findall(text)]


def read_all(results: Path = RESULTS) -> dict[str, list[Report]]:
    """Benchmark to its reports, one for each machine, in the order of the files' names."""
    reports: dict[str, list[Report]] = {}
    for path in sorted(results.glob("*.json")):
        report = read_report(path)
        reports.setdefault(report.name, []).append(report)
    return reports


def markdown(reports: list[Report]) -> str:
    """A table for each machine, with the command that makes it; empty lines around it, as <details> needs them."""
    return "".join(f"\n{_caption(report)}\n\n{_table(report)}\n" for report in reports)


def _caption(report: Report) -> str:
    tools = [
        f"{name} {number}" for name, number in report.versions.items() if name not in ("python", "revision", "roadwork")
    ]
    made_by = f"python -m benchmarks.{report.module or report.name}"
    return (
        f"`{made_by}` {_revision(report.versions['revision'])}, on `{report.machine['name']}` "
        f"({report.machine['cpu']}, {report.machine['memory_gb']:.0f} GB), with {', '.join(tools)}. "
        f"Notes on each row: [JSON]({UP}benchmarks/results/{report.machine['name']}-{report.name}.json)."
    )


def _revision(revision: str) -> str:
    """The revision that was measured, in words; a `+` at its end means that files differed from it."""
    return f"at revision {revision[:7]}" + (" with uncommitted edits" if revision.endswith("+") else "")


def _table(report: Report) -> str:
    rule = ["--:" if column in NUMBERS else "---" for column in range(len(COLUMNS))]
    lines = [COLUMNS, rule, *(cells(row) for row in report.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    raise SystemExit(command(tables))
