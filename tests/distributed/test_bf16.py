"""Training in bf16, as a GPU would, on two processes: each ZeRO stage and placement of experts, baselines, resuming."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.parity_cells import STEPS, Cell, bare_loop, run
from pipeline.config import ROOT, CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from pipeline.model.roadwork import RoadworkModel
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.training.test_training import finish
from tests.warm import python

pytestmark = pytest.mark.dist
HALF = STEPS // 2
CELLS = (
    *(Cell(stage, sharding, 2, precision="bf16") for stage in (1, 2, 3) for sharding in (1, 2)),
    Cell(2, 1, 2, precision="bf16", optimizer="sophia_g"),
)


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Of each cell, the curve of all steps and that of the second half, resumed; one start of processes for all."""
    folder, cells = tmp_path_factory.mktemp("cells"), []
    for number, cell in enumerate(CELLS):
        place = str(folder / str(number))
        cells += [replace(cell, save=place), replace(cell, resume=place)]
    found = run(cells)
    return {cell: (found[2 * number], found[2 * number + 1]) for number, cell in enumerate(CELLS)}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_losses_in_bf16_are_near_those_in_fp32(curves, cell):
    """Within the rounding of weights to 8 bits, which is not that of fp32."""
    expected = bare_loop(replace(cell, precision="fp32"))
    losses = curves[cell][0].losses[:, 0]
    np.testing.assert_allclose(losses, expected.losses[:, 0], rtol=0.05)
    assert (losses != expected.losses[:, 0]).all()
    np.testing.assert_allclose(curves[cell][0].norms, expected.norms, rtol=0.2)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_resumed_run_in_bf16_has_bitwise_the_same_losses_and_norms(curves, cell):
    whole, rest = curves[cell]
    np.testing.assert_array_equal(rest.losses, whole.losses[HALF:])
    np.testing.assert_array_equal(rest.norms, whole.norms[HALF:])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, a backbone and a recipe of four steps."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": random_labels(16, 0), "val": random_labels(9, 1)})
    recipe = Config(
        train=TrainConfig(epochs=2, batch_size=8, micro_batch_size=4, log_every=1, wandb=False, patience=0),
        data=DataConfig(shards=str(folder / "shards"), epoch_share=1.0, workers=0),
        model=small_config(make_backbone(folder / "backbone")),
        optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every_steps=2, every_minutes=0, keep=9),
    )
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def train(world: Path, run_folder: Path, *words: str) -> str:
    """Two processes of the launcher, in bf16; returns what they say."""
    code = "import sys; from pipeline.launch.launcher import *; "
    code += "sys.exit(supervise([*launch_words(Path(sys.argv[1]), None), *sys.argv[2:]], restarts=0))"
    command = [
        python(), "-c", code, str(ROOT / "accelerate_configs" / "cpu_2.yaml"),
        str(Path(__file__).with_name("bf16_train.py")), "--config", str(world / "recipe.yaml"),
        "--run", str(run_folder), *words,
    ]  # fmt: skip
    pipe = subprocess.PIPE
    return finish(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))[1]


def test_a_run_that_resumes_in_bf16_ends_with_the_same_bits(world):
    """Photos, exploration, dropout and metadata's NULLs; all tensors of the last checkpoint, and the best model."""
    whole, again = world / "whole", world / "again"
    shared = ("--train.expert_parallel", "2")
    err = train(world, whole, *shared)
    assert "experts    2 per layer, 1 on each of 2 processes" in err
    assert "bf16" in err
    later = shutil.ignore_patterns("step-00000004", "model", "summary.json")
    shutil.copytree(whole, again, ignore=later)
    assert "resuming at step 2 of 4" in train(world, again, *shared)
    files = sorted(path.relative_to(whole) for path in whole.glob("checkpoints/step-00000004/**/*.safetensors"))
    assert len(files) >= 3
    for file in (*files, Path("model/model.safetensors")):
        ours, theirs = load_file(again / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), f"{file}: {name}"


@pytest.mark.parametrize("head", ["single_view", "mean_pool", "attention_mil"])
def test_a_baseline_trains_in_bf16_and_is_saved_in_fp32(world, head):
    run_folder = world / head
    train(world, run_folder, "--model.head", head)
    assert json.loads((run_folder / "summary.json").read_text())["steps"] == 4
    assert {value.dtype for value in load_file(run_folder / "model" / "model.safetensors").values()} == {torch.float32}
    assert RoadworkModel.from_pretrained(run_folder / "model").config.head == head
