"""Whole runs of two processes that stream their training data from a URL."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from tests.data.tampering import distribute, swapped_bit, tamper
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.training.test_training import finish, launch

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five training tars for two processes of two readers, and a recipe of six steps."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": random_labels(24, 0), "val": random_labels(9, 1)})
    distribute(folder / "shards", "train", 5)
    recipe = Config(
        train=TrainConfig(epochs=2, batch_size=8, micro_batch_size=2, log_every=1, wandb=False, patience=0),
        data=DataConfig(shards=f"file://{folder / 'shards'}", epoch_share=1.0, workers=2, streaming=True,
                        shuffle_buffer=4),
        model=small_config(make_backbone(folder / "backbone")),
        optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every_steps=4, every_minutes=0),
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def test_two_processes_stream_from_a_url_and_finish_together(world):
    _, err = finish(launch(world, world / "run"))
    assert "streaming 5 tars with 2 x 2 readers" in err
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["samples_seen"]) == (6, 48)
    assert summary["best"]["val"]["n"] == 9
    assert summary["sampling"]["obtained"] == summary["sampling"]["asked"] == summary["sampling"]["photos"]
    share = sum(classes["roadwork"] for classes in summary["sampling"]["photos"].values())
    assert f"sampling   share of the photos -> asked -> of an epoch: roadwork {share:.1%} -> {share:.1%}" in err


@pytest.mark.parametrize("key", ["train_16", "val_3"])
def test_damage_that_one_worker_meets_ends_all_processes_with_one_sentence(world, tmp_path, key):
    """In training or in validation; the other process is told why instead of losing its peer."""
    shards = shutil.copytree(world / "shards", tmp_path / "shards")
    tar = {"train_16": "train-00003.tar", "val_3": "val-00000.tar"}[key]
    tamper(shards / tar, swapped_bit(f"{key}.jpg"))
    _, err = finish(launch(world, tmp_path / "run", "--shards", f"file://{shards}"), status=2)
    assert f"{tar}, sample {key}: the photo is not the one of its record" in err
    assert "Traceback" not in err
    assert len({line for line in err.splitlines() if line.startswith("error: ")}) == 1
