"""What a config.json says about how a model computes, and that old models answer as they did."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.errors import UserError
from pipeline.model.roadwork import RoadworkConfig, RoadworkModel
from pipeline.model.trunk import Trunk
from pipeline.model.version_1 import TrunkV1
from tests.model.examples import random_photos
from tests.small_run import make_backbone, make_model

MADE = Path(__file__).parents[1] / "compatibility" / "made_by_14eef39"


@pytest.fixture
def exported(tmp_path):
    """An exported model of revision 14eef39, with its backbone at the path that this test has."""
    shutil.copytree(MADE / "exported", tmp_path / "exported")
    path = tmp_path / "exported" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backbone": str(MADE / "backbone")}))
    return tmp_path / "exported"


@torch.inference_mode()
def test_a_model_without_the_key_is_of_version_1_and_answers_as_recorded(exported):
    assert "format_version" not in json.loads((exported / "config.json").read_text())
    model = RoadworkModel.from_pretrained(exported)
    assert (model.config.format_version, model.config.evidence) == (1, False)
    assert type(model.head) is TrunkV1
    photos = [prepare(path.read_bytes(), model.config.input_spec) for path in sorted((MADE / "inputs").iterdir())]
    found = [model.probability(model(collate([photo])).logits).item() for photo in photos]
    np.testing.assert_allclose(found, pd.read_csv(MADE / "answers.csv")["probability"], atol=1e-4)


@torch.inference_mode()
def test_version_1_differs_from_version_2_with_the_same_weights(exported):
    """Otherwise the records above would say nothing about the version."""
    model = RoadworkModel.from_pretrained(exported)
    newer = RoadworkModel(RoadworkConfig(**{**model.config.to_dict(), "format_version": 2})).eval()
    newer.load_state_dict(model.state_dict())
    photo = prepare((MADE / "inputs" / "000000.jpg").read_bytes(), model.config.input_spec)
    answers = [one.probability(one(collate([photo])).logits).item() for one in (model, newer.attach(model.backbone))]
    assert abs(answers[0] - answers[1]) > 1e-3


@torch.inference_mode()
def test_saving_an_old_model_again_keeps_its_version_and_its_answers(exported, tmp_path):
    model = RoadworkModel.from_pretrained(exported)
    model.save_pretrained(tmp_path / "again")
    again = RoadworkModel.from_pretrained(tmp_path / "again")
    assert again.config.format_version == 1
    assert again.config.evidence is False
    photos = collate([prepare(path.read_bytes(), model.config.input_spec) for path in (MADE / "inputs").iterdir()])
    assert torch.equal(again(photos).logits, model(photos).logits)


@pytest.mark.parametrize("version", [0, 3, "2"])
def test_another_version_is_refused_in_one_sentence(exported, version):
    path = exported / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version}))
    with pytest.raises(UserError, match=rf"has format version {version}, this program reads up to 2; update") as raised:
        RoadworkModel.from_pretrained(exported)
    assert "\n" not in str(raised.value)


@torch.inference_mode()
def test_a_new_model_is_of_version_2_and_is_restored_with_its_evidence(tmp_path):
    model = make_model(make_backbone(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (saved["format_version"], saved["evidence"], saved["ensemble"]) == (2, True, 1)
    assert any(".evidence." in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    again, photos = RoadworkModel.from_pretrained(tmp_path / "model"), random_photos()
    assert type(again.head) is Trunk
    for name in ("logits", "evidence_map", "fused_logits"):
        torch.testing.assert_close(again(photos)[name], model(photos)[name])
