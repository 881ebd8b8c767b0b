"""The study from scenes to verdicts, on a few tiny photos: what it leaves, and that it never trains twice."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks.form import read_report
from benchmarks.study import study
from benchmarks.study.arms import ARMS
from benchmarks.study.config import read_recipe
from benchmarks.study.photos import find_photos, load_photos
from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from pipeline.cli import Parser, parse
from pipeline.errors import UserError

RECIPE = """
plan:
  arms: [mean_pool, uniform, metadata_given, seen_places]
  seeds: 2
  parts: 3
  folds: 2
  steps: {steps}
  batch_size: 8
  validations: 2
  lrs: [1.0e-3]
model: {{backbone: scenes-tiny, view_side: 32, pool_grid: 2, width: 16, layers: 1, heads: 2, fusion_heads: 2,
  experts: 2, experts_per_token: 1, expert_width: 16, mask_side: 4}}
loss: {{roadwork: 2.0}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with shards and a finished study, and what it returned."""
    folder = tmp_path_factory.mktemp("study")
    scenes(folder / "photos", images=96, size="320x240", workers=1)
    shard(folder / "photos", folder / "shards", workers=1)
    (folder / "tiny.yaml").write_text(RECIPE.format(steps=4))
    run(folder)
    return folder


def run(folder, recipe="tiny"):
    return study(str(folder / f"{recipe}.yaml"), str(folder / "shards"), out=folder / "out", workers=1)


def trained(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "trainings").iterdir()}


def test_every_training_leaves_one_whole_file_and_the_same_command_trains_nothing(place, capsys):
    before = trained(place)
    assert len(before) == 2 * 2 * (1 + 3)  # metadata_given asks the heads of complete
    assert all(name.endswith(".json") and not name.startswith(".") for name in before)
    page = (place / "out" / "study.html").read_text()
    run(place)
    assert "0 of 16 trainings are to be done" in capsys.readouterr().err
    assert trained(place) == before
    assert (place / "out" / "study.html").read_text() == page


def test_what_was_lost_is_trained_again_to_the_same_bytes(place, capsys):
    path = sorted((place / "out" / "trainings").iterdir())[0]
    outcome = json.loads(path.read_text())
    path.unlink()
    run(place)
    assert "1 of 16 trainings are to be done" in capsys.readouterr().err
    again = json.loads(path.read_text())
    assert {**again, "wall_s": 0} == {**outcome, "wall_s": 0}


def test_other_settings_are_trained_beside(place, capsys):
    before = trained(place)
    (place / "longer.yaml").write_text(RECIPE.format(steps=5).replace("seeds: 2", "seeds: 1"))
    run(place, "longer")
    assert "8 of 8 trainings are to be done" in capsys.readouterr().err
    assert before.items() < trained(place).items()
    run(place)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_says_verdicts_and_that_scenes_are_procedural_and_asks_for_nothing(place):
    page = Page((place / "out" / "study.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 3
    assert text.index("The complete model beats mean pooling with an MLP") < text.index("Against the complete model")
    assert "procedural scenes" in text
    assert "a place being a city" in text


def test_the_json_has_the_form_of_the_benchmarks(place):
    report = read_report(place / "out" / "tiny.json")
    assert report.name == "tiny"
    assert report.module.startswith("study --recipe ")
    assert len(report.rows) == 6
    assert all(np.isfinite([row.ours, row.theirs, row.ratio, *row.interval]).all() for row in report.rows)
    assert all("tested procedural scenes in 2 folds, 2 seeds" in row.note for row in report.rows)
    assert all(row.what.endswith(("supported", "refuted", "undecided")) for row in report.rows)


def test_the_arrays_hold_what_the_cache_and_the_shards_hold(place):
    config = read_recipe(str(place / "tiny.yaml"))
    photos = load_photos(find_photos(config, str(place / "shards"), None, place / "out"))
    index = json.loads((place / "shards" / "index.json").read_text())
    samples = [sample for split in ("train", "val", "test") for sample in index["splits"][split]["samples"]]
    assert photos.labels.tolist() == [sample["label"] for sample in samples]
    assert photos.groups.tolist() == [sample["group"] for sample in samples]
    assert photos.tensors["cells"].shape[:3] == (len(samples), 12, 4)
    assert photos.data == "procedural scenes"


def test_without_shards_it_is_one_sentence(place, tmp_path):
    with pytest.raises(UserError, match=r"no shards in .*nowhere: there is no index\.json"):
        study(str(place / "tiny.yaml"), str(tmp_path / "nowhere"), out=tmp_path / "out")


def test_a_cache_of_another_backbones_sizes_is_refused(place, tmp_path):
    (tmp_path / "other.yaml").write_text(RECIPE.format(steps=4).replace("view_side: 32", "view_side: 48"))
    with pytest.raises(UserError, match="is stale: it was made with the view side 32, and not 48"):
        study(
            str(tmp_path / "other.yaml"), str(place / "shards"), str(place / "out" / "features"), out=tmp_path / "out"
        )


def test_the_commands_of_the_docs_are_those_that_there_are():
    page = (Path(__file__).parents[2] / "docs" / "study.md").read_text()
    commands = re.findall(r"^python -m benchmarks\.study(.*?)(?:#.*)?$", page, flags=re.MULTILINE)
    assert len(commands) == 4
    for words in commands:
        read_recipe(parse(Parser(prog="study"), [study], words.split())["recipe"])
    named = set(re.findall(r"`(\w+)`", page.split("## The arms")[1].split("## How to read")[0]))
    assert {arm.name for arm in ARMS} - {arm.name for arm in ARMS if arm.group == "optimizers"} <= named
