"""Leaking, missing and foreign metadata is refused where a model would read it, and nowhere else."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

from pipeline.config import parse_config
from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.data.inputs import check_inputs
from pipeline.data.stand_in import StandIn
from pipeline.doctor import doctor
from pipeline.errors import AuditFailed, UserError
from pipeline.evaluate import evaluate
from pipeline.launch.checks import BAD, GOOD, NOTE
from pipeline.model.config import InputSpec, ModelConfig
from pipeline.train import train
from tests.small_run import SIDE, make_backbone, make_model, make_run, make_shards, random_labels

WHY = "known exactly where the label is roadwork (MCC 1.00)"
LEAKS = {"description": WHY, "weather": "its values tell the label (Cramer's V 0.71)", "travel_alteration": WHY}


def make_index(folder, **changes):
    make_shards(folder, {"train": [0, 1], "val": [0, 1]}, **changes)
    return read_index(folder)


@pytest.fixture
def leaking(tmp_path):
    return make_index(tmp_path / "shards", leaks=LEAKS, text_dim=5)


def test_a_leaking_field_is_refused_with_the_reason_and_the_ways_out(leaking):
    with pytest.raises(UserError) as caught:
        check_inputs(leaking, ModelConfig(), allow_leaks=False)
    message = str(caught.value)
    assert "weather (its values tell the label (Cramer's V 0.71))" in message
    assert "--model.metadata '[gps, daytime, scene]'" in message
    assert "--data.allow_leaks true" in message
    assert "description" not in message
    assert "\n" not in message


def test_the_models_text_is_the_records_description(leaking):
    with pytest.raises(UserError, match=r"text \(known exactly where the label is roadwork"):
        check_inputs(leaking, ModelConfig(metadata=("gps", "text"), text_dim=5), allow_leaks=False)


def test_what_the_model_does_not_read_may_leak(leaking):
    check_inputs(leaking, ModelConfig(metadata=("gps", "daytime")), allow_leaks=False)
    check_inputs(leaking, ModelConfig(head="mean_pool"), allow_leaks=False)


def test_the_user_may_insist(leaking):
    check_inputs(leaking, ModelConfig(metadata=("weather", "text"), text_dim=5), allow_leaks=True)


def test_text_needs_vectors_in_the_shards(tmp_path):
    index = make_index(tmp_path / "shards")
    check_inputs(index, ModelConfig(), allow_leaks=False)
    with pytest.raises(UserError, match="hold no vectors of descriptions; shard again with --text_encoder"):
        check_inputs(index, ModelConfig(metadata=("text",)), allow_leaks=False)


def test_text_vectors_of_another_length_or_encoder_are_refused(tmp_path):
    index = make_index(tmp_path / "shards", text_dim=5)
    with pytest.raises(UserError, match=r"model.text_dim is 384.* have 5 numbers \(noise@1\).*--model.text_dim 5"):
        check_inputs(index, ModelConfig(metadata=("text",)), allow_leaks=False)
    fitting = ModelConfig(metadata=("text",), text_dim=5)
    check_inputs(index, fitting, allow_leaks=False, text_encoder="noise@1")
    with pytest.raises(UserError, match=r"trained on vectors of the text encoder noise@2, .* those of noise@1"):
        check_inputs(index, fitting, allow_leaks=False, text_encoder="noise@2")


class TrainingStarts(Exception):
    """Instead of training."""


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], UserError),
        (["--data.allow_leaks", "true"], TrainingStarts),
        (["--model.metadata", "[gps, daytime, scene]"], TrainingStarts),
    ],
)
def test_training_refuses_a_leak_before_anything_starts_unless_allowed(leaking, tmp_path, monkeypatch, words, error):
    def begin(*settings):
        raise TrainingStarts

    monkeypatch.setattr("pipeline.train.start", begin)
    config, _ = parse_config(["--data.shards", str(tmp_path / "shards"), *words], "train")
    with pytest.raises(error):
        train(config, dry_run=False)


@pytest.mark.parametrize(
    ("room", "verdict", "text"),
    [
        ("model: {backbone: scenes-tiny}", BAD, "weather (its values tell the label (Cramer's V 0.71))"),
        ("data: {allow_leaks: true}", NOTE, "the model reads gps, weather (leaks the label), daytime, scene"),
        ("model: {metadata: [gps]}", GOOD, "the model reads gps"),
    ],
)
def test_doctor_reports_a_leak_that_a_recipe_would_read(leaking, tmp_path, room, verdict, text):
    (tmp_path / "recipe.yaml").write_text(room)
    try:
        path = doctor(str(tmp_path / "recipe.yaml"), str(tmp_path / "shards"), tmp_path)
    except AuditFailed as failed:
        path = failed.summary
    (finding,) = [found for found in json.loads(path.read_text())["findings"] if found["about"] == "metadata"]
    assert finding["verdict"] == verdict
    assert text in finding["text"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("text") / "backbone")


def logits(model, batch):
    with torch.no_grad():
        return model(batch).logits


def test_the_text_vector_changes_the_answer_where_it_is_enabled_and_only_there(backbone, tmp_path):
    index = make_index(tmp_path / "shards", text_dim=5)
    data = ShardDataset(tmp_path / "shards", index, "train", InputSpec(SIDE, mask_side=4))
    batch = collate([data[0], data[1]])  # the second photo has no description
    without = {**batch, "text": torch.full_like(batch["text"], torch.nan)}
    reads_text = make_model(backbone, metadata=("gps", "text"), text_dim=5)
    changed = (logits(reads_text, batch) - logits(reads_text, without)).abs().amax(dim=1)
    assert changed[0] > 1e-3
    assert changed[1] == 0
    blind = make_model(backbone, metadata=("gps",))
    assert torch.equal(logits(blind, batch), logits(blind, without))


def test_the_stand_in_feeds_a_model_that_reads_text(backbone):
    model = make_model(backbone, metadata=("text",), text_dim=5)
    assert logits(model, collate([StandIn(2, model.config.input_spec, 5)[0]])).shape == (1, 2)


@pytest.fixture
def text_run(backbone, tmp_path):
    """A run that reads text, on shards where the description leaks."""
    shards = tmp_path / "shards"
    make_shards(shards, {"val": random_labels(8, 0)}, text_dim=5, leaks={"description": WHY})
    run = make_run(tmp_path / "run", make_model(backbone, metadata=("text",), text_dim=5), shards)
    arguments = {"text_encoder": "noise@1"}
    (run / "provenance.json").write_text(json.dumps({"versions": {}, "data": {"arguments": arguments}}))
    return run


def test_evaluation_reads_the_text_and_tells_of_a_leak(text_run, capsys):
    evaluate(text_run, splits=["val"], workers=0)
    rows = pd.read_csv(text_run / "predictions.csv")
    differs = (rows["probability"] != rows["probability_null"]).tolist()
    assert differs == [True, False] * 4
    assert f"do not trust the score with metadata: in these shards text gives the label away ({WHY})" in (
        capsys.readouterr().err
    )


def test_evaluation_on_vectors_of_another_encoder_is_refused(text_run):
    path = text_run.parent / "shards" / "index.json"
    path.write_text(path.read_text().replace("noise@1", "noise@2"))
    with pytest.raises(UserError, match="trained on vectors of the text encoder noise@1"):
        evaluate(text_run, splits=["val"], workers=0)
