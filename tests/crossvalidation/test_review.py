"""The folder of suspects has the structure that FiftyOne and Label Studio document for an import."""

import json
import xml.etree.ElementTree as ET
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest

from pipeline.crossvalidation.review import write_review
from pipeline.names import LABEL_NAMES
from tests.small_run import noisy_photo


@pytest.fixture
def suspects():
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "rank": np.arange(1, 7), "key": [f"photo-{n}_a" for n in range(6)], "split": "train",
        "source": [f"folder/{n} å.jpg" for n in range(6)], "label": [0, 1, 0, 1, 1, 0],
        "confidence": np.linspace(0.01, 0.2, 6), "out_of_fold_probability": rng.random(6),
        "out_of_fold_prediction": [1, 0, 1, 0, 0, 1], "place": 3, "group": 4, "fold": 0,
    })  # fmt: skip


@pytest.fixture
def folder(tmp_path, suspects):
    photos = {key: noisy_photo(n) for n, key in enumerate(suspects["key"])}
    write_review(tmp_path / "suspects", suspects, lambda key: ("png" if key == "photo-0_a" else "jpg", photos[key]))
    assert sorted(path.stem for path in (tmp_path / "suspects" / "data").iterdir()) == sorted(photos)
    assert (tmp_path / "suspects" / "data" / "photo-3_a.jpg").read_bytes() == photos["photo-3_a"]
    return tmp_path / "suspects"


def test_fiftyone_finds_a_photo_and_a_target_for_each_entry(folder, suspects):
    """As documented for FiftyOneImageClassificationDataset: names of files without extension, ids into `classes`."""
    values = json.loads((folder / "labels.json").read_text())
    assert values.keys() == {"classes", "labels"}
    names = {path.stem for path in (folder / "data").iterdir()}
    assert set(values["labels"]) == names
    for row in suspects.itertuples():
        target = values["labels"][row.key]
        assert target.keys() == {"label", "confidence", "attributes"}
        assert values["classes"][target["label"]] == LABEL_NAMES[row.label]
        assert target["confidence"] == pytest.approx(row.confidence)
        attributes = target["attributes"]
        assert (attributes["rank"], attributes["source"]) == (row.rank, row.source)
        assert attributes["out_of_fold_prediction"] != LABEL_NAMES[row.label]


def test_label_studio_finds_a_photo_and_a_prediction_for_each_task(folder, suspects):
    """As documented for pre-annotations: `data` and `predictions`, whose names are those of the interface."""
    tasks = json.loads((folder / "label_studio.json").read_text())
    interface = ET.fromstring((folder / "label_studio.xml").read_text())
    image, choices = interface.find("Image"), interface.find("Choices")
    offered = {choice.get("value") for choice in choices}
    assert choices.get("toName") == image.get("name")
    assert [task["data"]["rank"] for task in tasks] == suspects["rank"].tolist()
    for task, row in zip(tasks, suspects.itertuples(), strict=True):
        url = urlsplit(task["data"][image.get("value").removeprefix("$")])
        assert url.path == "/data/local-files/"
        (path,) = parse_qs(url.query)["d"]
        assert (folder.parent / path).is_file()  # below the document root
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert (result["from_name"], result["to_name"]) == (choices.get("name"), image.get("name"))
        assert result["type"] == "choices"
        assert result["value"]["choices"] == [LABEL_NAMES[row.out_of_fold_prediction]]
        assert set(result["value"]["choices"]) < offered
        roadwork = row.out_of_fold_probability
        assert prediction["score"] == pytest.approx(roadwork if row.out_of_fold_prediction else 1 - roadwork)
        assert task["data"]["label"] == LABEL_NAMES[row.label]
