"""Evaluation in the profile `streetvision`: what the client sent, beside the native evaluation of the same run."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.data.batch import collate
from pipeline.data.copies import make_copy
from pipeline.data.dataset import ShardDataset, prepare_image
from pipeline.data.index import read_index
from pipeline.data.photo import decode
from pipeline.errors import UserError
from pipeline.evaluate import evaluate
from pipeline.evaluation.calibration import fit
from pipeline.evaluation.report.headline import headline
from pipeline.model.config import InputSpec
from pipeline.model.roadwork import RoadworkModel
from tests.test_evaluate import cached, evaluated, trained

__all__ = ["cached", "evaluated", "trained"]  # fixtures


@pytest.fixture(scope="module")
def sent(evaluated, tmp_path_factory):
    """The evaluated run, evaluated once more in the profile `streetvision`."""
    run = shutil.copytree(evaluated[0], tmp_path_factory.mktemp("sent") / "run")
    path = evaluate(run, profile="streetvision", workers=0)
    assert path == (run / "streetvision" / "summary.json").resolve()
    return run, json.loads(path.read_text()), pd.read_csv(run / "streetvision" / "predictions.csv")


def test_the_clients_profile_leaves_the_native_evaluation_as_it_was(sent, evaluated):
    run, client, _ = sent
    for name in ("summary.json", "predictions.csv", "report.html"):
        assert (run / name).read_bytes() == (evaluated[0] / name).read_bytes()
    assert (client["val"]["n"], client["test"]["n"]) == (40, 60)
    assert client["evaluation"]["source_sha256"] == evaluated[1]["evaluation"]["source_sha256"]


def test_the_client_is_answered_from_its_224_pixels_without_metadata(sent, trained):
    _, _, rows = sent
    shards = trained.parent / "shards"
    dataset = ShardDataset(shards, read_index(shards), "test", InputSpec(32, mask_side=4))
    model, views = RoadworkModel.from_pretrained(trained / "model").eval(), []
    for row in range(5):
        record, photo = dataset.sample(row)
        views.append(prepare_image(make_copy(decode(photo), record.sha256, 1), InputSpec(32)))
    with torch.no_grad():
        output = model(collate(views), null_metadata=True)
    written = rows[rows["split"] == "test"].head(5)
    np.testing.assert_allclose(written["log_odds_null"], model.log_odds(output), atol=1e-5)
    np.testing.assert_allclose(rows["probability"], rows["probability_null"], atol=1e-6)


def test_the_clients_calibration_is_that_of_what_it_sends(sent, evaluated):
    _, client, rows = sent
    val = rows[rows["split"] == "val"]
    found = fit(val["label"].to_numpy(int), val["log_odds_null"].to_numpy())
    assert client["evaluation"]["cut"] == pytest.approx(found.cut)
    assert client["evaluation"]["cut"] != evaluated[1]["evaluation"]["cut"]
    assert (rows["prediction"] == (rows["probability_null"] > 0.5)).all()


def test_each_profile_has_a_report_and_a_later_native_one_shows_both(sent, evaluated, tmp_path):
    assert "test, streetvision" not in (evaluated[0] / "report.html").read_text()
    page = (sent[0] / "streetvision" / "report.html").read_text()
    assert "run, streetvision: roadwork report" in page
    run = shutil.copytree(sent[0], tmp_path / "run")
    evaluate(run, splits=["test"], workers=0)
    page = (run / "report.html").read_text()
    assert page.count("<tr><td>test, streetvision</td>") == 2  # scores and calibration
    assert "val, streetvision" in page


def test_scores_on_other_shards_are_not_shown_beside_these(sent, tmp_path, capsys):
    run = shutil.copytree(sent[0], tmp_path / "run")
    headline(run)
    assert "224 px    MCC" in capsys.readouterr().err
    path = run / "streetvision" / "summary.json"
    client = json.loads(path.read_text())
    client["evaluation"]["source_sha256"] = "b" * 64
    path.write_text(json.dumps(client))
    headline(run)
    assert "224 px    MCC" not in capsys.readouterr().err
    evaluate(run, profile="streetvision", splits=["test"], baseline=sent[0], workers=0)
    again = json.loads(path.read_text())
    assert again.keys() == {"test", "evaluation", "baseline"}
    assert again["evaluation"]["cut"] == client["evaluation"]["cut"]
    page = (run / "streetvision" / "report.html").read_text()
    assert f"on the same frozen backbone and photos: MCC {again['baseline']['mcc']:.3f}" in page


def test_a_run_without_an_evaluation_has_no_headline_and_the_message_says_what_to_do(sent, tmp_path):
    run = shutil.copytree(sent[0], tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({"steps": summary["steps"]}))
    with pytest.raises(UserError, match=f"{run} has no evaluation on test yet; run `.*evaluate --run {run}` first"):
        headline(run)


def test_scores_of_the_clients_profile_are_found_where_version_0_1_wrote_them(sent, evaluated, tmp_path, capsys):
    run = shutil.copytree(evaluated[0], tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({**evaluated[1], "streetvision": sent[1]}))
    headline(run)
    assert f"224 px    MCC {sent[1]['test']['mcc_null_metadata']:.3f}" in capsys.readouterr().err


def test_the_clients_profile_takes_no_cache_and_no_cut_for_whole_photos(trained, cached, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match=r"leave --features out with --profile streetvision"):
        evaluate(run, profile="streetvision", features=str(cached[1]), workers=0)
    # The calibration of training is for whole photos.
    with pytest.raises(UserError, match=r"no calibration yet; run `.*--profile streetvision` with `val`"):
        evaluate(run, profile="streetvision", splits=["test"], workers=0)
    evaluate(run, profile="streetvision", splits=["val"], workers=0)
    assert not (run / "report.html").exists()
    with pytest.raises(UserError, match=r"no evaluation on test; run `evaluate --run .*run` first"):
        evaluate(trained, baseline=run, workers=0)
