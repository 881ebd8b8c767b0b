"""How far an output is: nothing yet, planned, assembled or finished, or something else is in its way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.work.workplace import Workplace
from pipeline.data.index import Shard
from pipeline.errors import UserError


def read(folder: str) -> str:
    """Stands for `read_index`, which refuses what is none."""
    text = (Path(folder) / "index.json").read_text()
    if text != "good":
        raise UserError("no index")
    return text


def fill(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)


def test_an_output_is_finished_when_its_index_and_summary_are_there(tmp_path):
    workplace = Workplace(str(tmp_path / "out"), None)
    assert workplace.finished(read, "shards") is None
    fill(tmp_path / "out")
    assert workplace.finished(read, "shards") is None  # an empty folder is no obstacle
    fill(tmp_path / "out", index="good", summary="{}")
    assert workplace.finished(read, "shards") == "good"
    assert workplace.summary_path == tmp_path / "out" / "summary.json"


@pytest.mark.parametrize("name", ["index", "summary", "thesis"])
def test_whatever_else_is_there_is_refused(tmp_path, name):
    fill(tmp_path / "out", **{name: "good"})
    with pytest.raises(UserError, match="out exists and holds no finished features; choose another --out or remove it"):
        Workplace(str(tmp_path / "out"), None).finished(read, "features")


def test_an_output_is_assembled_when_a_good_index_lies_in_the_hidden_folder(tmp_path):
    workplace = Workplace(str(tmp_path / "out"), None)
    assert workplace.assembled(read) is None
    fill(workplace.path, index="good")
    assert workplace.assembled(read) is None
    fill(workplace.path, summary="{}")
    assert workplace.assembled(read) == "good"
    fill(workplace.path, index="half")
    assert workplace.assembled(read) is None


def test_a_plan_that_cannot_be_read_is_none(tmp_path):
    workplace = Workplace(str(tmp_path / "out"), None)
    assert workplace.planned(lambda values: values["tars"]) is None
    fill(workplace.path, plan=json.dumps({"tars": 3}))
    assert workplace.planned(lambda values: values["tars"]) == 3
    for text in ("{", "{}", "[]"):
        fill(workplace.path, plan=text)
        assert workplace.planned(lambda values: values["tars"]) is None


def test_a_finished_output_that_lacks_a_byte_is_refused(tmp_path):
    workplace, tar = Workplace(str(tmp_path / "out"), None), Shard("a.tar", 3, "", 1)
    fill(tmp_path / "out")
    with pytest.raises(UserError, match=r"out is damaged, a\.tar is missing or not 3 bytes long; choose another --out"):
        workplace.check_whole([tar])
    (tmp_path / "out" / "a.tar").write_bytes(b"abc")
    workplace.check_whole([tar])
    (tmp_path / "out" / "a.tar").write_bytes(b"ab")
    with pytest.raises(UserError, match="damaged"):
        workplace.check_whole([tar])
