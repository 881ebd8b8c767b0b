"""Several heads under the engine: resumed bit for bit, on fewer processes too, and saved in fp32 from a bf16 run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.parity_cells import STEPS, Cell, run
from pipeline.config import CheckpointConfig, Config, DataConfig, TrainConfig, to_yaml
from pipeline.model.config import TERMS
from pipeline.model.roadwork import RoadworkModel
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.training.test_training import finish, launch

pytestmark = pytest.mark.dist
HALF = STEPS // 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run of two processes, its second half again, the same half on one process, and the folder of a bf16 run."""
    folder = tmp_path_factory.mktemp("heads")
    saved, exported = str(folder / "saved"), str(folder / "exported")
    whole, again, _ = run([
        Cell(2, 2, 2, heads=2, save=saved),
        Cell(2, 2, 2, heads=2, resume=saved),
        Cell(1, 1, 2, heads=2, precision="bf16", export=exported),
    ])  # fmt: skip
    (alone,) = run([Cell(2, 1, 1, heads=2, resume=saved)])
    return whole, again, alone, Path(exported)


def test_two_heads_go_on_to_bitwise_the_same_losses_and_gradients(found):
    whole, again, _, _ = found
    np.testing.assert_array_equal(again.losses, whole.losses[HALF:])
    np.testing.assert_array_equal(again.norms, whole.norms[HALF:])
    assert len(again.losses) == STEPS - HALF
    for term in ("evidence", "evidence_masks"):
        assert (whole.losses[:, 1 + TERMS.index(term)] > 0).all()


def test_two_heads_go_on_with_whole_experts_on_one_process(found):
    whole, _, alone, _ = found
    np.testing.assert_allclose(alone.losses, whole.losses[HALF:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone.norms, whole.norms[HALF:], rtol=1e-5)


def test_a_run_in_bf16_saves_its_average_in_fp32(found):
    """Its weights are rounded to 8 bits; the average, and so what is validated and saved, is not."""
    weights = load_file(found[3] / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert "head.members.1.evidence.judge.1.weight" in weights
    rounded = [value.to(torch.bfloat16).float() for value in weights.values()]
    same = [torch.equal(one, other) for one, other in zip(weights.values(), rounded, strict=True)]
    assert np.mean(same) < 0.2  # such as a bias that nothing has changed
    model = RoadworkModel.from_pretrained(found[3])
    assert (model.dtype, model.config.ensemble) == (torch.float32, 2)


def test_a_run_is_told_the_number_of_its_heads(tmp_path):
    make_shards(tmp_path / "shards", {"train": random_labels(8, 0), "val": random_labels(8, 1)})
    recipe = Config(
        train=TrainConfig(epochs=1, batch_size=8, micro_batch_size=8, log_every=1, wandb=False),
        data=DataConfig(shards=str(tmp_path / "shards"), epoch_share=1.0, workers=0),
        model=small_config(make_backbone(tmp_path / "backbone")),
        checkpoint=CheckpointConfig(every_steps=0, every_minutes=0),
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    finish(launch(tmp_path, tmp_path / "run", "--train.heads=2", processes=1))
    model = RoadworkModel.from_pretrained(tmp_path / "run" / "model")
    assert (model.config.ensemble, len(model.head.members)) == (2, 2)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss/evidence", "loss/evidence_masks"} <= first.keys()
