import base64
import io
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.evaluate import evaluate
from pipeline.evaluation.inference import evidence_map
from pipeline.evaluation.report.page import THUMBNAIL_PX, WORST, thumbnail, view_shares, worst_mistakes
from pipeline.evaluation.report.plots import MOST_POINTS, heat_map, loss_curve, svg, thin, validation_curve
from pipeline.model.evidence import stitch_map
from pipeline.model.roadwork import RoadworkModel
from tests.small_run import make_backbone, make_model, make_run, make_shards, noisy_photo, random_labels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An evaluated run; the name of its data and a line of its configuration look like markup."""
    folder = tmp_path_factory.mktemp("report")
    make_shards(folder / "shards", {"val": random_labels(60, 0), "test": random_labels(60, 1)})
    run = make_run(folder / "run", make_model(make_backbone(folder / "backbone")), folder / "shards")
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "# </pre><script>alert(1)</script>\n")
    evaluate(run, workers=0)
    return run


class Page(HTMLParser):
    """Collects elements, the places they point to, and their text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(run):
    return Page((run / "report.html").read_text())


def test_the_page_asks_for_nothing_from_elsewhere(run, page):
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in (run / "report.html").read_text()
    assert "url(http" not in (run / "report.html").read_text()


def test_what_users_wrote_is_text_not_markup(run, page):
    assert "noise <of> photos" in page.text
    assert any("</pre><script>" in text for text in page.text)


def test_the_headline_is_the_summarys(run, page):
    test = json.loads((run / "summary.json").read_text())["test"]
    text = " ".join(" ".join(page.text).split())
    low, high = test["ci95"]["mcc_null_metadata"]
    assert f"{test['mcc_null_metadata']:.3f} MCC on 60 test photos, metadata NULL" in text
    assert f"95 % interval {low:.2f} to {high:.2f}" in text
    assert str(test["confusion"]["tp"]) in page.text


def test_every_part_is_there(page):
    text = " ".join(page.text)
    for part in (
        "Training loss",
        "Validation MCC, 0.400 at the lowest loss",
        "Reliability",
        "Scores",
        "Views kept",
    ):
        assert part in text
    for heading in ("By place", "Worst mistakes", "config.yaml", "provenance.json"):
        assert heading in text


def test_a_run_without_training_log_has_a_page_too(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("metrics.jsonl", "provenance.json"):
        (copy / name).unlink()
    evaluate(copy, workers=0)
    text = " ".join(Page((copy / "report.html").read_text()).text)
    assert "Training loss" not in text
    assert "Reliability" in text


def rows_of(labels, probabilities):
    return pd.DataFrame(
        {
            "key": [f"k{i}" for i in range(len(labels))],
            "label": pd.array(labels, dtype="Int64"),
            "probability_null": probabilities,
            "prediction": (np.array(probabilities) > 0.5).astype(int),
            "kept_views": "global;tile_0_1",
        }
    )


def test_the_worst_mistakes_come_first_and_only_mistakes():
    asked = []

    def photo(split, row):
        asked.append((split, row))
        return noisy_photo(row)

    rows = rows_of([0, 1, 1, 0, None, 1], [0.9, 0.2, 0.8, 0.6, 0.99, 0.01])
    mistakes = worst_mistakes(rows, "test", photo)
    assert [mistake["key"] for mistake in mistakes] == ["k5", "k0", "k1", "k3"]
    assert [mistake["label"] for mistake in mistakes] == ["roadwork", "none", "roadwork", "none"]
    assert mistakes[0]["kept"] == ["global", "tile_0_1"]
    assert asked == [("test", 5), ("test", 0), ("test", 1), ("test", 3)]
    many = rows_of([0] * 40, np.linspace(0.6, 0.9, 40))
    assert len(worst_mistakes(many, "test", lambda split, row: noisy_photo(row))) == WORST


def test_a_mistake_is_shown_under_its_evidence_where_the_model_has_any():
    heat, rows = np.zeros((96, 96), dtype=np.float32), rows_of([0, 1], [0.9, 0.2])
    plain = worst_mistakes(rows, "test", lambda split, row: noisy_photo(row))
    shown = worst_mistakes(rows, "test", lambda split, row: noisy_photo(row), lambda split, row: heat if row else None)
    assert [mistake["evidence"] for mistake in plain] == [None, None]
    assert [mistake["key"] for mistake in shown if mistake["evidence"] is None] == ["k0"]
    assert [mistake["picture"] for mistake in shown] == [mistake["picture"] for mistake in plain]


def test_a_heat_map_colours_a_grey_photo_only_where_there_is_evidence():
    photo = Image.fromarray(np.full((60, 120, 3), (20, 120, 200), dtype=np.uint8))
    heat = np.zeros((96, 96), dtype=np.float32)
    heat[64:, 64:] = 1.0
    found = np.asarray(heat_map(photo, heat)).astype(int)
    assert found.shape == (60, 120, 3)
    assert np.ptp(found[:36, :76], axis=2).max() == 0
    corner = found[45:, 85:].reshape(-1, 3)
    assert (corner[:, 0] > corner[:, 2] + 50).all()


def test_the_evidence_is_the_models_own_over_the_whole_photo(run):
    model = RoadworkModel.from_pretrained(run / "model").eval()
    sample = prepare(noisy_photo(3), model.config.input_spec)
    found = evidence_map(model, sample)
    with torch.no_grad():
        wanted = stitch_map(model(collate([sample]), null_metadata=True), 96)[0]
    np.testing.assert_array_equal(found, wanted)
    assert 0 <= found.min() < found.max() <= 1
    baseline = make_model(model.config.backbone, head="mean_pool")
    assert evidence_map(baseline, sample) is None


def test_calibration_is_shown_beside_what_chance_would_show(run, page):
    test, text = json.loads((run / "summary.json").read_text())["test"], " ".join(page.text)
    found = test["calibration"]
    shown = (test["ece"], found["ece_perfect"]["mean"], found["nll_before"], test["nll"], test["brier"], found["slope"])
    assert all(f"{value:.3f}" in page.text for value in shown)
    assert "if every probability were right" in " ".join(text.split())


def test_thumbnails_are_small_and_keep_their_shape():
    url = thumbnail(noisy_photo(0, 1440, 720))
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.size == (THUMBNAIL_PX, THUMBNAIL_PX // 2)


def test_view_shares_count_photos_and_are_empty_without_pruning():
    rows = pd.DataFrame({"kept_views": ["global;tile_0_0", "global;crop_last", "global;tile_0_0"]})
    shares = view_shares(rows)
    assert (shares["global"], shares["crop_first"]) == (1, 0)
    assert shares["tile_0_0"] == pytest.approx(2 / 3)
    assert view_shares(pd.DataFrame({"kept_views": ["global", "global"]})) == {}


def test_long_curves_are_averaged_not_cut():
    steps, values = thin(range(3000), np.arange(3000) * 2.0)
    assert len(steps) == MOST_POINTS
    np.testing.assert_allclose(values, steps * 2)
    assert steps.mean() == pytest.approx(1499.5)
    short, _ = thin([1, 2, 5], [1.0, 2.0, 3.0])
    assert short.tolist() == [1, 2, 5]


def test_the_validation_with_the_lowest_loss_is_marked_not_the_one_with_the_highest_mcc():
    assert "0.700 at the lowest loss" in validation_curve([1, 2, 3], [0.5, 0.7, 0.9], [0.3, 0.1, 0.2])


def test_drawings_are_equal_between_runs_and_named():
    first, second = (loss_curve([1, 2], [0.5, 0.25]) for _ in range(2))
    assert first == second
    assert first.startswith('<svg role="img" aria-label="training loss"')
    assert "<?xml" not in svg(lambda axes: axes.plot([0, 1]), "line")
