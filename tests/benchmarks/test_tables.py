"""The tables of docs/results.md are those of the committed results, all of them, and no other page has one."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.form import COLUMNS, RESULTS, ROOT, Goal, Report, cells, compare, read_report
from benchmarks.gpu.rows import ROWS
from benchmarks.tables import PAGE, fill, marked, read_all, tables
from pipeline.files import write_json

TEXT = "Before.\n\n<!-- results:loader -->\nold\n<!-- /results:loader -->\n\nAfter.\n"
SECTIONS = (
    "Data preparation", "Views", "Loader", "Features", "Pruning", "Trainer", "Several heads", "Checkpoints", "Parity",
    "Sophia", "Study", "Scaling", "GPU",
)  # fmt: skip


def result(cores: int) -> Report:
    machine = {"name": f"cpu-{cores}core-x86_64", "cpu": "a CPU", "memory_gb": 7.6}
    row = compare("reading", "tarfile", [40.0 * cores, 42.0 * cores], [20.0, 20.5], "images/s", Goal(1.5))
    revision = "0123456789abcdef" if cores == 1 else "fedcba9876543210+"
    return Report(
        "loader", machine, {"python": "3.12", "revision": revision, "roadwork": "1", "numpy": "2.0"}, 0, (row,)
    )


def commit(folder: Path, report: Report) -> None:
    write_json(folder / f"{report.machine['name']}-{report.name}.json", asdict(report))


def test_every_committed_result_has_its_table_on_the_page_and_no_other_page_has_one():
    page = PAGE.read_text()
    assert sorted(marked(page)) == sorted(read_all())
    assert fill(page) == page
    others = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {PAGE}
    assert [other.name for other in sorted(others) if marked(other.read_text())] == []


def test_the_page_has_these_sections():
    """Other pages link to them."""
    assert tuple(re.findall(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)) == SECTIONS


def test_the_worst_case_that_the_page_names_is_the_worst_of_its_table():
    page = PAGE.read_text()
    for name, section in (("parity", "Parity"), ("sophia", "Sophia")):
        rows = [row for row in read_all()[name][0].rows if row.unit == "relative difference"]
        prose = " ".join(page.partition(f"## {section}\n")[2].partition("<details>")[0].split())
        assert cells(max(rows, key=lambda row: row.ours))[2] in prose
        assert f"{len(rows)} combinations" in prose


def test_a_claim_that_was_not_tested_has_no_verdict_and_its_note_says_why():
    rows = [row for reports in read_all().values() for report in reports for row in report.rows]
    untested = [row for row in rows if row.what.endswith(": untested")]
    assert all(row.met is None and row.note.startswith("untested: ") for row in untested)


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
    loader = "`python -m benchmarks.loader` at revision"
    assert f"{loader} 0123456, on `cpu-1core-x86_64` (a CPU, 8 GB), with numpy 2.0." in text
    assert f"{loader} fedcba9 with uncommitted edits, on `cpu-2core-x86_64` (a CPU, 8 GB), with numpy 2.0." in text
    assert "[JSON](../benchmarks/results/cpu-2core-x86_64-loader.json)" in text


def test_only_what_is_between_the_markers_changes_and_once_is_enough(tmp_path):
    commit(tmp_path, result(2))
    text = fill(TEXT, tmp_path)
    assert text.startswith("Before.\n\n<!-- results:loader -->\n\n`python")
    assert text.endswith("|\n\n<!-- /results:loader -->\n\nAfter.\n")
    assert "old" not in text
    assert fill(text, tmp_path) == text


def test_markers_without_a_result_are_emptied(tmp_path):
    assert fill(TEXT, tmp_path) == TEXT.replace("old\n", "")


GPU_TEXT = "<!-- gpu:2 -->\nold\n<!-- /gpu:2 -->\n"


def measured(folder: Path, dry: bool = False) -> Path:
    lines = [
        {"name": "gpu-2", "dry": dry},
        {"part": "training", "what": "AdamW, ZeRO-2", "images_per_s": 1234.5, "step_s": 0.05, "mfu": 0.41, "loss": 0.1},
        {"part": "training", "what": "AdamW, ZeRO-2, the same again", "equal": True},
        {"part": "training", "what": "sophia_h", "failed": "RuntimeError: no | room\nmore"},
    ]
    file = folder / "h100-gpu-2.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_rows_of_a_gpu_are_there_before_they_are_measured(tmp_path):
    text = fill(GPU_TEXT, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| training |")]
    assert len(rows) == len(ROWS[2]["training"])
    assert all(row.endswith("| not measured yet |") for row in rows)
    assert "old" not in text
    assert fill(text, tmp_path) == text


def test_a_gpus_numbers_come_from_its_file_and_what_failed_says_so(tmp_path):
    measured(tmp_path)
    text = fill(GPU_TEXT, tmp_path)
    assert "| part | what | numbers | `h100` |" in text
    names = "photos/s, s per step, MFU, peak GiB, share of waiting for data"
    assert f"| training | AdamW, ZeRO-2 | {names} | 1,234, 0.05, 0.41, -, - |" in text
    assert "| AdamW, ZeRO-2, the same again | same bits | yes |" in text
    assert f"| sophia_h | {names} | failed: RuntimeError: no / room |" in text
    assert "| baseline |" in text
    assert text.count("not measured yet") == sum(map(len, ROWS[2].values())) - 3


def test_a_rehearsal_is_no_result(tmp_path):
    measured(tmp_path, dry=True)
    with pytest.raises(ValueError, match="is of a rehearsal"):
        fill(GPU_TEXT, tmp_path)


def test_the_command_writes_the_file(tmp_path):
    commit(tmp_path, result(2))
    page = tmp_path / "results.md"
    page.write_text(TEXT)
    assert tables(page, tmp_path) == page
    assert page.read_text() == fill(TEXT, tmp_path)
