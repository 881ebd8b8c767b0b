"""Names in tables: found however they are spelled where one file can be meant, and one hint for all that are not."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest

from data_prep.sources.opening import open_source
from tests.data_prep.examples import write_table
from tests.data_prep.sources.annotations import image_of, write_coco

SPELLINGS = {
    "as it is": lambda name, folder: name,
    "dot": lambda name, folder: f"./{name}",
    "blanks": lambda name, folder: f" {name} ",
    "backslashes": lambda name, folder: name.replace("/", "\\"),
    "dot and backslash": lambda name, folder: ".\\" + name.replace("/", "\\"),
    "capitals": lambda name, folder: name.upper(),
    "small letters": lambda name, folder: name.lower(),
    "the folder's name": lambda name, folder: f"{folder.name}/{name}",
    "the folder's name and backslashes": lambda name, folder: f"{folder.name}\\" + name.replace("/", "\\"),
    "quoted": lambda name, folder: quote(name),
    "quoted wholly": lambda name, folder: quote(name, safe=""),
    "absolute": lambda name, folder: f"{folder}/{name}",
    "decomposed": lambda name, folder: unicodedata.normalize("NFD", name),
    # By their last parts.
    "another folder": lambda name, folder: f"images/{name}",
    "another machine": lambda name, folder: f"/home/me/set/{name}",
    "another system": lambda name, folder: "D:\\set\\" + name.replace("/", "\\"),
    "an address": lambda name, folder: f"https://host/set/{quote(name)}",
    "its last part": lambda name, folder: name.rpartition("/")[2],
}


def read(folder: Path, names: list[str]) -> dict[str, str]:
    """Name in the table to the file that it is taken for, or to why there is none."""
    write_table(folder / "metadata.csv", [{"file_name": name} for name in names])
    items = list(open_source(folder))[: len(names)]
    return {name: item.problem or item.name for name, item in zip(names, items, strict=True)}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("seed", range(3))
def test_a_name_is_found_in_every_spelling(tmp_path, spelling, seed):
    pick = random.Random(seed)
    folder = tmp_path / "set"
    files = []
    for number in range(10):
        stem = "".join(pick.choices("abcXYZ äÉß#+,'&()", k=6)).strip() or "x"
        files.append(f"{pick.choice(['', 'Sub/', 'a b/C/'])}{stem}{number}.{pick.choice(['jpg', 'JPG', 'png'])}")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x")
    names = [SPELLINGS[spelling](file, folder) for file in files]
    assert list(read(folder, names).values()) == files


def test_rows_that_spell_one_name_in_two_ways_are_the_same_photo(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "p q.jpg").write_bytes(b"x")
    for name in ("sub/p%20q.jpg", "sub\\p q.jpg", "SUB/P q.jpg", f"{tmp_path.name}/sub/p q.jpg"):
        assert read(tmp_path, [name, "sub/p q.jpg"]) == {
            name: "sub/p q.jpg",
            "sub/p q.jpg": "an earlier row names the same photo",
        }


def test_the_exact_name_comes_before_any_other_reading(tmp_path):
    files = ["p q.jpg", "p%20q.jpg", "C.jpg", "c.JPG", "sub\\a.jpg", "sub/a.jpg"]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    assert list(read(tmp_path, files).values()) == files


def test_what_may_be_several_files_or_rows_is_missing_with_one_hint(tmp_path, capsys):
    for file in ("a/1.jpg", "b/1.jpg", "C.jpg", "c.JPG", "2.jpg"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    # Two files with this last part; two that differ by case; two rows that end like one file.
    names = ["1.jpg", "c.jpg", "train/2.jpg", "val/2.jpg"]
    assert set(read(tmp_path, names).values()) == {"the photo is missing"}
    (hint,) = capsys.readouterr().err.splitlines()
    assert "names that leave open which file or row is meant: 4, such as '1.jpg', perhaps 'a/1.jpg'" in hint


def test_a_file_that_a_row_names_exactly_is_no_others(tmp_path):
    (tmp_path / "2.jpg").write_bytes(b"x")
    assert read(tmp_path, ["other/2.jpg", "2.jpg"]) == {"other/2.jpg": "the photo is missing", "2.jpg": "2.jpg"}


def test_a_mask_is_never_taken_for_a_photo_nor_a_photo_for_a_mask(tmp_path):
    (tmp_path / "masks").mkdir()
    for file in ("b.png", "masks/a.png"):
        (tmp_path / file).write_bytes(b"x")
    rows = [{"file_name": "a.png", "mask": "masks/a.png"}, {"file_name": "b.png", "mask": "gone/b.png"}]
    write_table(tmp_path / "metadata.csv", rows)
    assert [item.problem for item in open_source(tmp_path)] == ["the photo is missing", "the mask is missing"]


def test_a_thousand_missing_names_are_one_hint(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"x")
    names = [f"gone-{number}.jpg" for number in range(1000)] + ["../a.jpg", "x/../a.jpg", "y" * 300 + ".jpg", "\\\\"]
    assert set(read(tmp_path, names).values()) == {"the photo is missing"}
    (hint,) = capsys.readouterr().err.splitlines()
    assert f"names that no file in {tmp_path} has: 1004, such as 'gone-0.jpg'; it has 1 photo, such as 'a.jpg'" in hint


@pytest.mark.parametrize("column", ["file name", "File-Name", "image_path", "Path", "image", "filename "])
def test_the_column_of_names_has_several_names(tmp_path, column):
    (tmp_path / "a.jpg").write_bytes(b"x")
    write_table(tmp_path / "metadata.csv", [{"label": 1, column: "a.jpg"}])
    assert [(item.name, item.problem) for item in open_source(tmp_path)] == [("a.jpg", "")]


@pytest.mark.parametrize("cell", [["a.jpg"], 7, 7.5, True, "\ud800.jpg", "nul\0", {"path": "a.jpg"}])
def test_a_name_of_another_kind_is_missing_or_no_column(tmp_path, cell):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg"}) + "\n" + json.dumps({"image": cell}))
    try:
        items = list(open_source(tmp_path))
    except ValueError as error:
        sentence = str(error)
    else:
        sentence = items[1].problem
    expected = "row 2 of .* has no column 'file_name'" if isinstance(cell, dict) else "the photo is missing"
    assert re.search(expected, sentence)


def test_names_in_coco_are_found_alike(tmp_path, capsys):
    (tmp_path / "p q.jpg").write_bytes(b"x")
    (tmp_path / "r.jpg").write_bytes(b"x")
    images = [image_of(1, file_name="images/p%20q.jpg"), image_of(2, file_name="R.JPG"), image_of(3, file_name="s.jpg")]
    items = list(open_source(tmp_path, write_coco(tmp_path, images, [])))
    assert [(item.name, item.problem) for item in items[:2]] == [("p q.jpg", ""), ("r.jpg", "")]
    assert "names found by their last parts: 1, such as 'images/p%20q.jpg' as 'p q.jpg'" in capsys.readouterr().err
