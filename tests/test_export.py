import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import pipeline.evaluation.exported
from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.early_exit import early_exit
from pipeline.errors import UserError
from pipeline.evaluate import evaluate
from pipeline.export import export
from pipeline.model.config import InputSpec
from pipeline.model.roadwork import RoadworkModel
from pipeline.predict import predict
from tests.small_run import make_backbone, make_model, make_run, make_shards, noisy_photo, telling_labels


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An evaluated run."""
    folder = tmp_path_factory.mktemp("export")
    model = make_model(make_backbone(folder / "backbone"))
    labels = {name: telling_labels(model, name, 30, seed) for seed, name in enumerate(("val", "test"))}
    make_shards(folder / "shards", labels)
    run = make_run(folder / "run", model, folder / "shards")
    evaluate(run, workers=0)
    return run


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def logits_of(folder, run):
    """A saved model's answers to some photos of the run's test split."""
    shards = Path(json.loads((run / "summary.json").read_text())["evaluation"]["shards"])
    dataset = ShardDataset(shards, read_index(shards), "test", InputSpec(32, mask_side=4))
    model = RoadworkModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(collate([dataset[row] for row in range(4)])).logits


def test_the_exported_folder_gives_bitwise_the_same_logits(run, tmp_path):
    before = logits_of(run / "model", run)
    summary = json.loads(export(run, out=tmp_path / "new" / "folder").read_text())
    assert torch.equal(logits_of(tmp_path / "new" / "folder", run), before)
    assert summary["largest_logit_difference"] == 0
    assert RoadworkModel.from_pretrained(run / "model").config.decision_bias == 0


def test_a_photo_has_the_same_probability_in_evaluation_and_prediction_and_one_half_is_the_cut(run, tmp_path):
    path = export(run)
    assert path == (run / "model" / "summary.json").resolve()
    about = json.loads((run / "summary.json").read_text())["evaluation"]
    config = RoadworkModel.from_pretrained(run / "model").config
    assert (config.decision_bias, config.decision_slope) == (about["cut"], about["slope"])
    assert about["slope"] not in (1.0, 0.0)
    (tmp_path / "photos").mkdir()
    for number in range(30):
        (tmp_path / "photos" / f"{number:02d}.jpg").write_bytes(noisy_photo(2000 + number))
    predict(run / "model", tmp_path / "x.csv", input=[str(tmp_path / "photos")], workers=0)
    evaluated = pd.read_csv(run / "predictions.csv").query("split == 'test'")
    found = pd.read_csv(tmp_path / "x.csv", keep_default_na=False)
    np.testing.assert_allclose(found["probability"], evaluated["probability_null"], atol=2e-6)
    assert found["probability"].std() > 0.1
    called = found["label"] == "Roadwork"
    assert called.tolist() == (evaluated["prediction"] == 1).tolist()
    assert 0 < called.sum() < 30


def test_evaluating_an_exported_run_gives_the_same_result(run):
    before = json.loads((run / "summary.json").read_text())
    export(run)
    after = json.loads(evaluate(run, workers=0).read_text())
    assert after["test"] == before["test"]
    assert after["evaluation"]["model_sha256"] == before["evaluation"]["model_sha256"]
    assert after["evaluation"]["cut"] == before["evaluation"]["cut"]
    export(run)  # what export wrote is not taken for a change of the model


def test_half_stores_16_bits_and_loads_in_32(run):
    before = logits_of(run / "model", run)
    summary = json.loads(export(run, half=True).read_text())
    stored = load_file(run / "model-half" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = RoadworkModel.from_pretrained(run / "model-half")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    difference = (logits_of(run / "model-half", run) - before).abs().max()
    assert 0 < difference < 0.05
    assert 0 < summary["largest_logit_difference"] < 0.05
    assert torch.equal(logits_of(run / "model", run), before)


def test_files_that_others_put_into_the_folder_stay(run, tmp_path):
    (tmp_path / "hub" / ".git").mkdir(parents=True)
    (tmp_path / "hub" / "model_card.json").write_text("{}")
    export(run, out=tmp_path / "hub")
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {
        ".git",
        "model_card.json",
        "config.json",
        "model.safetensors",
        "README.md",
        "summary.json",
    }


def test_a_failed_export_leaves_no_trace(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.evaluation.exported, "verify", lambda *_: 1 / 0)
    before = (run / "model" / "config.json").read_bytes()
    for out in (None, tmp_path / "new"):
        with pytest.raises(ZeroDivisionError):
            export(run, out=out)
    assert (run / "model" / "config.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not list(run.glob(".*"))


def test_weights_that_do_not_survive_the_trip_are_noticed(run, monkeypatch):
    save = RoadworkModel.save_pretrained

    def damage(self, folder, state_dict, **kwargs):
        save(self, folder, state_dict={name: value + 1e-3 for name, value in state_dict.items()}, **kwargs)

    monkeypatch.setattr(RoadworkModel, "save_pretrained", damage)
    with pytest.raises(AssertionError, match="differs"):
        export(run)


@pytest.mark.parametrize(("value", "half", "cure"), [(torch.nan, False, "train it"), (1e6, True, "without --half")])
def test_a_model_whose_answer_is_no_number_is_not_exported(run, tmp_path, value, half, cure):
    model = RoadworkModel.from_pretrained(run / "model")
    with torch.no_grad():
        next(model.head.parameters()).fill_(value)
    model.save_pretrained(run / "model")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({"best": summary["best"]}))
    with pytest.raises(UserError, match=f"the model's answer is not a number.*{cure}"):
        export(run, out=tmp_path / "new", half=half)
    assert not (tmp_path / "new").exists()


def test_a_run_whose_backbone_moved_is_evaluated_exported_and_fitted_from_its_new_place(run, tmp_path):
    values = json.loads((run / "model" / "config.json").read_text())
    place = str(shutil.copytree(values["backbone"], tmp_path / "moved"))
    gone = {**values, "backbone": str(tmp_path / "gone")}
    (run / "model" / "config.json").write_text(json.dumps(gone))
    for command in (evaluate, early_exit, export):
        with pytest.raises(UserError, match=r"cannot load the backbone .*with --backbone \("):
            command(run)
    evaluate(run, workers=0, backbone=place)
    early_exit(run, max_loss=0.3, workers=0, backbone=place)
    evaluate(run, workers=0, backbone=place)
    summary = json.loads(export(run, backbone=place).read_text())
    assert summary["largest_logit_difference"] == 0
    assert RoadworkModel.from_pretrained(run / "model", backbone=place).config.stopping is not None


def test_the_card_shows_results_data_and_licences(run):
    export(run)
    card, test = (
        (run / "model" / "README.md").read_text(),
        json.loads((run / "summary.json").read_text())["test"],
    )
    assert "On noise <of> photos:" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| test | 30 |"))
    shown = (test["mcc_null_metadata"], test["ece"], test["calibration"]["ece_perfect"]["mean"], test["nll"])
    assert all(f"| {value:.3f} |" in row for value in shown)
    about = json.loads((run / "summary.json").read_text())["evaluation"]
    assert f"sigmoid({about['slope']:.4f} (z - {about['cut']:.4f}))" in card
    assert "loaded from the place named above" in card
    assert "encodes 4 of 12 views" in card


def test_the_cards_python_runs_as_written(run, tmp_path, monkeypatch):
    export(run)
    code = re.search(r"```python\n(.*?)```", (run / "model" / "README.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "photo.jpg").write_bytes(noisy_photo(5))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("FOLDER", str(run / "model")), names)
    predict(run / "model", tmp_path / "x.csv", input=["photo.jpg"], workers=0)
    written = pd.read_csv(tmp_path / "x.csv")["probability"][0]
    assert names["probability"].tolist() == pytest.approx([written])


def test_without_evaluation_the_calibration_is_that_of_training(run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({"best": summary["best"]}))
    written = json.loads(export(run).read_text())
    assert (written["decision_bias"], written["decision_slope"]) == (-0.8, 1.7)
    assert "Not evaluated yet" in (run / "model" / "README.md").read_text()


def weights_change(run):
    model = RoadworkModel.from_pretrained(run / "model")
    with torch.no_grad():
        next(model.head.parameters()).mul_(1.5)
    model.save_pretrained(run / "model")


def early_exit_instead_of_evaluation(run):
    early_exit(run, max_loss=0.3, workers=0)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({key: summary[key] for key in ("best", "calibration")}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run: early_exit(run, max_loss=0.3, workers=0), "has changed since it was evaluated"),
        (lambda run: early_exit(run, pruning="fixed", workers=0), "has changed since it was evaluated"),
        (weights_change, "has changed since it was evaluated"),
        (early_exit_instead_of_evaluation, "early-exit has changed the model"),
    ],
)
def test_a_cut_and_scores_of_another_model_are_not_exported(run, change, sentence):
    change(run)
    before = (run / "model" / "config.json").read_bytes()
    with pytest.raises(UserError, match=f"{sentence}.*; run `.*evaluate --run {run}`"):
        export(run)
    assert (run / "model" / "config.json").read_bytes() == before
    evaluate(run, workers=0)
    export(run)


def test_a_run_that_an_older_version_evaluated_is_to_be_evaluated_again(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["evaluation"] = {"data": "photos", "source_sha256": "ab", "threshold": 0.4}
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"evaluated by an older version.*; run `.*evaluate --run"):
        export(run)


def test_wrong_input_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        export(run, out=tmp_path / "file")
    with pytest.raises(UserError, match="no run at"):
        export(tmp_path / "nowhere")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="no calibration yet"):
        export(run)
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="no model in"):
        export(run)
