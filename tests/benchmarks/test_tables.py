"""The tables of the README and of docs/ are those of the committed results."""

from dataclasses import asdict
from pathlib import Path

from benchmarks.form import COLUMNS, RESULTS, Goal, Report, compare, read_report
from benchmarks.tables import fill, marked, pages, read_all, tables, up_from
from pipeline.files import write_json

TEXT = "Before.\n\n<!-- results:loader -->\nold\n<!-- /results:loader -->\n\nAfter.\n"


def result(cores: int) -> Report:
    machine = {"name": f"cpu-{cores}core-x86_64", "cpu": "a CPU", "memory_gb": 7.6}
    row = compare("reading", "tarfile", [40.0 * cores, 42.0 * cores], [20.0, 20.5], "images/s", Goal(1.5))
    return Report("loader", machine, {"python": "3.12", "revision": "abc", "roadwork": "1", "numpy": "2.0"}, 0, (row,))


def commit(folder: Path, report: Report) -> None:
    write_json(folder / f"{report.machine['name']}-{report.name}.json", asdict(report))


def test_every_committed_result_has_its_table_on_one_page_and_there_is_no_other():
    shown = [name for page in pages() for name in marked(page.read_text())]
    assert sorted(shown) == sorted(read_all())
    for page in pages():
        assert fill(page.read_text(), up=up_from(page)) == page.read_text()


def test_committed_results_are_named_after_machine_and_benchmark():
    for path in RESULTS.glob("*.json"):
        report = read_report(path)
        assert path.stem == f"{report.machine['name']}-{report.name}"


def test_a_table_has_a_line_for_each_row_and_says_how_it_was_made(tmp_path):
    for cores in (1, 2):
        commit(tmp_path, result(cores))
    text = fill(TEXT, tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == f"| {' | '.join(COLUMNS)} |"
    assert lines[2] == "| reading | tarfile | 41 | 20.2 | images/s | 2.02 (1.74 to 2.36) | >= 1.5 | yes |"
    assert len(lines) == 6  # a table for each machine
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "`python -m benchmarks.loader` on `cpu-2core-x86_64` (a CPU, 8 GB), with numpy 2.0." in text
    assert "benchmarks/results/cpu-2core-x86_64-loader.json" in text


def test_only_what_is_between_the_markers_changes_and_once_is_enough(tmp_path):
    commit(tmp_path, result(2))
    text = fill(TEXT, tmp_path)
    assert text.startswith("Before.\n\n<!-- results:loader -->\n`python")
    assert text.endswith("|\n\n<!-- /results:loader -->\n\nAfter.\n")
    assert "old" not in text
    assert fill(text, tmp_path) == text


def test_markers_without_a_result_are_emptied(tmp_path):
    assert fill(TEXT, tmp_path) == TEXT.replace("old\n", "")


def test_the_command_writes_the_file(tmp_path):
    commit(tmp_path, result(2))
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "loading.md"
    page.parent.mkdir()
    for path in (readme, page):
        path.write_text(TEXT)
    assert tables(tmp_path, tmp_path) == readme
    assert readme.read_text() == fill(TEXT, tmp_path)
    assert "[JSON](../benchmarks/results/cpu-2core-x86_64-loader.json)" in page.read_text()
