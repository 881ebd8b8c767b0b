"""Which photos are answered for, and in which order."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.photo_list import PhotoList, check_inputs, write_list


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.JPG", "a.jpg", "c[1].jpeg", "deep/e.png", "deep/d.jpg", "deep-1.jpg", "notes.txt"):
        (folder / name).write_bytes(b"")
    return folder


def listed(folder: Path, inputs: list[str], lines: Path | None = None) -> list[Path]:
    with sqlite3.connect(folder / "list") as database:
        assert write_list(database, inputs, lines) == database.execute("SELECT count(*) FROM photo").fetchone()[0]
    database.close()
    photos = PhotoList(folder / "list")
    return [photos[row] for row in range(len(photos))]


def test_files_folders_and_patterns_mix_and_name_each_photo_once(photos, tmp_path):
    found = listed(tmp_path, [str(photos / "deep" / "*.png"), str(photos / "c[1].jpeg"), f"{photos}/"])
    names = ["deep/e.png", "c[1].jpeg", "a.jpg", "b.JPG", "deep/d.jpg", "deep-1.jpg"]
    assert found == [photos / name for name in names]


def test_a_folder_is_sorted_as_paths_are(photos, tmp_path):
    found = listed(tmp_path, [str(photos)])
    assert found == sorted(found)
    assert len(found) == 6


def test_a_pattern_may_cross_folders(photos, tmp_path):
    found = listed(tmp_path, [str(photos / "**" / "*.jpg")])
    assert [path.name for path in found] == ["a.jpg", "d.jpg", "deep-1.jpg"]


def test_a_file_that_is_named_is_tried_whatever_its_suffix(photos, tmp_path):
    assert listed(tmp_path, [str(photos / "notes.txt")]) == [photos / "notes.txt"]


def test_a_folder_behind_a_link_is_not_searched_and_a_file_is_found(photos, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "linked.jpg").symlink_to(photos / "a.jpg")
    (tmp_path / "inside" / "round").symlink_to(tmp_path / "inside")
    assert listed(tmp_path, [str(tmp_path / "inside")]) == [tmp_path / "inside" / "linked.jpg"]


def test_the_lines_of_a_list_follow_in_their_order_and_need_not_exist(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    lines = tmp_path / "lines"
    lines.write_bytes(b"z.jpg\n\nb.JPG\r\n./deep//e.png\na.jpg \nb.JPG\nodd\xff.jpg")
    found = listed(tmp_path, ["deep"], lines)
    assert [os.fsencode(path) for path in found] == [
        b"deep/d.jpg", b"deep/e.png", b"z.jpg", b"b.JPG", b"a.jpg ", b"odd\xff.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "lines", "sentence"),
    [
        ([], None, "--input is .*, or --list a file"),
        (["*.gif"], None, r"--input '\*.gif' leads to no photo"),
        (["empty"], None, "--input 'empty' leads to no photo"),
        (["absent.jpg"], None, "--input 'absent.jpg' leads to no photo"),
        ([], "absent", "--list 'absent' cannot be read: No such file"),
        ([], "empty", "--list 'empty' cannot be read: Is a directory"),
        ([], "lines", "--list 'lines' names no photo"),
    ],
)
def test_inputs_that_lead_to_nothing_are_refused(photos, monkeypatch, inputs, lines, sentence):
    monkeypatch.chdir(photos)
    (photos / "empty").mkdir()
    (photos / "lines").write_text("\n\n")
    with pytest.raises(UserError, match=sentence):
        check_inputs(inputs, None if lines is None else Path(lines))


MEASURED = """
import resource, sys
from pathlib import Path
from pipeline.evaluation.kept_answers import KeptAnswers
kept = KeptAnswers(Path(sys.argv[1], "x.csv"), 16)
with kept.locked():
    photos, _ = kept.begin({}, [], Path(sys.argv[1], "lines"), 1)
share = kept.missing(photos, 0, 1)
print(photos, kept.photos[share[len(share) - 1]].stem, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_million_paths_are_listed_and_dealt_in_the_memory_of_a_thousand(tmp_path):
    """Their names alone are 60 MB, and as a list in Python more than 100."""
    peaks = []
    for photos in (1_000, 1_000_000):
        folder = tmp_path / str(photos)
        folder.mkdir()
        with (folder / "lines").open("w") as lines:
            for number in range(photos):
                lines.write(f"/photos/of/a/city/with/a/rather/long/name/{number:08d}.jpg\n")
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found, last, peak_kib = map(int, done.stdout.split())
        assert (found, last) == (photos, photos - 1)
        peaks.append(peak_kib / 1024)
    assert peaks[1] - peaks[0] < 24, peaks
