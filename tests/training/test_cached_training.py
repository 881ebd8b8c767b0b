"""Training from the feature cache takes the road that training from the photos takes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.config import Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.warm import python

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, a cache of them and a recipe of six steps."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": random_labels(24, 0), "val": random_labels(9, 1)})
    backbone = make_backbone(folder / "backbone")
    make_cache(folder / "cache", folder / "shards", backbone, copies=4)  # two of each kind, one for each epoch
    recipe = Config(
        train=TrainConfig(epochs=2, batch_size=8, micro_batch_size=4, log_every=1, wandb=False, patience=0),
        data=DataConfig(shards=str(folder / "shards"), epoch_share=1.0, workers=0),
        model=small_config(backbone),
        optim=OptimConfig(lr=3e-3),
    )
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def train(world, run, *words, processes=1):
    """Train in one process, or under the launcher in two."""
    command = [python(), str(ROOT / "pipeline" / "train.py"), "--config", str(world / "recipe.yaml")]
    if processes == 2:
        configuration = str(ROOT / "accelerate_configs" / "cpu_2.yaml")
        command = [python(), "-m", "pipeline.launch.launcher", str(world / "recipe.yaml")]
        command += ["--config_file", configuration]
    command += ["--run", str(run), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def curve(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == kind]


MIXTURE = ["--data.augment_share", "0.4", "--data.streetvision_share", "0.3", "--loss.mixup_alpha", "1.0"]


@pytest.mark.parametrize("mixture", [[], MIXTURE], ids=["photos", "mixture"])
def test_losses_and_validation_are_those_of_training_from_the_photos(world, tmp_path, mixture):
    for run, words in (("photos", []), ("cached", ["--data.features", str(world / "cache")])):
        done = train(world, tmp_path / run, *mixture, *words)
        assert done.returncode == 0, done.stderr
    for kind, number in (("train", 6), ("val", 2)):
        photos, cached = curve(tmp_path / "photos", kind), curve(tmp_path / "cached", kind)
        assert len(photos) == number
        assert cached == pytest.approx(photos, rel=0.02)
        assert cached != photos  # tokens rounded to bf16 were read


def weights(run):
    """The bytes of the model that a run saved."""
    return {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_place_of_the_features_changes_no_bit_of_the_run(world, tmp_path, processes):
    cache = ["--data.features", str(world / "cache"), *MIXTURE]
    for place in ("disk", "host", "device"):
        done = train(world, tmp_path / place, *cache, "--data.features_in", place, processes=processes)
        assert done.returncode == 0, done.stderr
        assert ("into memory" in done.stderr) == (place != "disk")
        for kind in ("train", "val"):
            assert curve(tmp_path / place, kind) == curve(tmp_path / "disk", kind)
        assert weights(tmp_path / place) == weights(tmp_path / "disk") != {}


def test_a_run_from_memory_whose_cache_is_damaged_ends_in_one_sentence(world, tmp_path):
    shutil.copytree(world / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / "train-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    words = ["--data.features", str(tmp_path / "cache"), "--data.features_in", "host"]
    done = train(world, tmp_path / "run", *words, processes=2)
    assert done.returncode == 2
    assert "train-00001.safetensors, sample train_" in done.stderr
    assert "its bytes have changed; remove" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_stale_cache_ends_a_run_in_one_sentence_before_it_has_a_folder(world):
    done = train(world, world / "stale", "--data.features", str(world / "cache"), "--model.view_side", "48")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert f"the feature cache {world / 'cache'} is stale: it was made with the view side 32, and not 48;" in said[0]
    assert "Traceback" not in done.stderr
    assert not (world / "stale").exists()
