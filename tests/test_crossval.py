"""The command `crossval` from shards to suspects, with its training in processes of its own."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.config import Config, DataConfig, OptimConfig, TrainConfig, to_yaml
from pipeline.crossvalidation.scores import heads_of
from pipeline.data.batch import collate
from pipeline.data.feature_dataset import open_split
from pipeline.data.features import open_cache
from pipeline.data.index import read_index
from pipeline.evaluation.inference import load_model
from pipeline.files import sha256_of
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_shards, random_labels, small_config
from tests.warm import python

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FOLDS, SEEDS = 3, 2
LABELS = {"train": [*random_labels(22, 0), None, None], "val": random_labels(12, 1), "test": random_labels(6, 2)}
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, a cache of them and a recipe of three steps."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", LABELS)
    backbone = make_backbone(folder / "backbone")
    make_cache(folder / "cache", folder / "shards", backbone, rows_per_file=50)
    recipe = Config(
        train=TrainConfig(
            run=str(folder / "run"), epochs=3, batch_size=8, micro_batch_size=8, log_every=1, wandb=False
        ),
        data=DataConfig(
            shards=str(folder / "shards"),
            features=str(folder / "cache"),
            epoch_share=1.0,
            sampling="uniform",
            workers=0,
        ),
        model=small_config(backbone, pruning="off", evidence=False),
        optim=OptimConfig(lr=3e-3),
    )
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def words(world, *more, seeds=SEEDS):
    return [
        python(), "-m", "pipeline.crossval", str(world / "recipe.yaml"), "--folds", str(FOLDS), "--seeds", str(seeds),
        "--review", "5", "--cpu", "--config_file", "accelerate_configs/cpu_1.yaml", *more,
    ]  # fmt: skip


def crossval(world, *more, **options):
    return subprocess.run(words(world, *more, **options), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(world):
    """A cross-validation that was interrupted in its second fold, and run again; its folder."""
    run = world / "run-crossval"
    with subprocess.Popen(words(world), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("== fold 2 of 3"):
                break
        for line in process.stderr:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped: ./launch.sh crossval ")
    assert "steps" in json.loads((run / "folds" / "0" / "summary.json").read_text())
    assert not (run / "folds" / "1" / "summary.json").exists()
    first = sha256_of(run / "folds" / "0" / "model" / "model.safetensors")
    again = crossval(world)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{(run / 'summary.json').resolve()}\n"
    assert "== fold 1 of 3" not in again.stderr
    assert "resuming at step" in again.stderr
    assert sha256_of(run / "folds" / "0" / "model" / "model.safetensors") == first
    return run


def test_every_labelled_photo_is_answered_by_the_fold_that_held_its_place_out(world, done):
    table = pd.read_csv(done / "out_of_fold.csv")
    index = read_index(world / "shards")
    samples = {s.key: s for name in ("train", "val") for s in index.splits[name].samples}
    labelled = [key for key, sample in samples.items() if sample.label is not None]
    assert table["key"].tolist() == labelled
    assert table["label"].tolist() == [samples[key].label for key in labelled]
    assert table["source"].tolist() == [f"photos/{key.partition('_')[2]}.jpg" for key in labelled]
    assert table.groupby("group")["fold"].nunique().max() == 1
    folds = json.loads((done / "folds.json").read_text())
    assert dict(zip(table["key"], table["fold"], strict=True)) == folds["part_of"]
    for fold in range(FOLDS):
        provenance = json.loads((done / "folds" / str(fold) / "provenance.json").read_text())
        counts = provenance["data"]["samples"]
        sizes = table["fold"].value_counts()
        assert counts["test"] == sizes[fold]
        assert counts["val"] == sizes[(fold + 1) % FOLDS]
        assert sum(counts.values()) == len(labelled)


@torch.inference_mode()
def test_the_log_odds_are_those_of_the_folds_models_on_the_shards_own_splits(world, done):
    table = pd.read_csv(done / "out_of_fold.csv").set_index("key")
    index = read_index(world / "shards")
    cache = open_cache(str(world / "cache"), index)
    models = [load_model(done / "folds" / str(fold) / "model", CPU) for fold in range(FOLDS)]
    whole = load_model(done / "model", CPU)
    for name in ("train", "val"):
        data = open_split(world / "shards", index, name, whole.config.input_spec, cache)
        rows = [row for row, sample in enumerate(data.split.samples) if sample.label is not None]
        batch, mine = collate([data[row] for row in rows]), table.loc[[data.split.samples[row].key for row in rows]]
        outputs = [model(batch, null_metadata=True) for model in models]
        heads = np.stack([[log_odds_of(member) for member in output.members] for output in outputs])  # [F, S, N]
        expected = heads[mine["fold"], :, np.arange(len(rows))].T
        np.testing.assert_allclose(heads_of(mine), expected, atol=1e-5)
        np.testing.assert_allclose(mine["out_of_fold_log_odds"], expected.mean(axis=0), atol=1e-5)
        assert (np.ptp(expected, axis=0) > 1e-6).all()  # the heads differ
        # Apart from the views' weights in the fusion, which follow the mean of the pruners.
        found = log_odds_of(whole(batch, null_metadata=True))
        np.testing.assert_allclose(found, heads.mean(axis=(0, 1)), atol=2e-3)


def log_odds_of(output):
    return (output.logits[:, 1] - output.logits[:, 0]).double().numpy()


def test_the_product_is_one_model_with_all_heads_and_the_summary_says_what_was_measured(done):
    summary = json.loads((done / "summary.json").read_text())
    config = json.loads((done / "model" / "config.json").read_text())
    assert config["ensemble"] == summary["model"]["heads"] == FOLDS * SEEDS
    assert config["decision_bias"] == pytest.approx(summary["model"]["cut"])
    assert config["decision_slope"] == pytest.approx(summary["model"]["slope"])
    assert summary["model"]["score"] is None
    assert summary["ensemble"]["n"] == 34
    assert (summary["folds"], summary["seeds"], summary["splits"]) == (FOLDS, SEEDS, ["train", "val"])
    card = " ".join((done / "model" / "README.md").read_text().split())
    assert "**The score of these 6 heads together was not measured:**" in card
    assert f"| 2 heads of a fold, averaged | {summary['ensemble']['mcc']:.3f} |" in card


def test_suspects_come_with_their_photos(world, done):
    suspects = pd.read_csv(done / "suspects.csv")
    assert len(suspects) == 34
    shown = suspects["key"].head(5).tolist()
    assert sorted(path.name for path in (done / "suspects" / "data").iterdir()) == sorted(f"{key}.jpg" for key in shown)
    assert [task["data"]["key"] for task in json.loads((done / "suspects" / "label_studio.json").read_text())] == shown


def test_a_second_run_says_at_once_that_it_is_finished(world, done):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    again = crossval(world)
    assert again.returncode == 0, again.stderr
    assert again.stderr.splitlines() == [
        f"{done} is finished already; for another cross-validation choose another --run"
    ]
    assert again.stdout == f"{(done / 'summary.json').resolve()}\n"
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*")}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--optim.lr", "1e-3"], "holds a cross-validation with optim.lr=0.003 (now 0.001); give the same value"),
        (["--splits", "train", "val", "test"], "holds a cross-validation with --splits ['train', 'val'] (now"),
        (["--folds", "18", "--run", "{world}/new"], "lie in 11 places (a group of near-duplicates), and 18 folds need"),
        (["--folds", "2"], "--folds is 2, but must be 3 or more"),
        (["--seeds", "0"], "--seeds is 0, but must be 1 or more"),
        (["--splits", "all"], "--splits is ['all'], but must be one or more of train, val, test"),
        (["--foldz", "3"], "unknown option 'foldz'"),
        (["--data.folds", "mine.json"], "data.folds is 'mine.json', but must be empty, since crossval makes the folds"),
        (
            ["--data.features", "", "--data.streaming", "true", "--run", "{world}/new"],
            "data.streaming is True, but must be false with data.folds",
        ),
        (["--run", "{world}/run-crossval/folds/0"], "holds a training run or a model, not a cross-validation"),
        (["--data.features", "{world}/nowhere", "--run", "{world}/new"], "no finished feature cache in"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(world, done, more, sentence):
    failed = crossval(world, *(word.format(world=world) for word in more))
    assert (failed.returncode, failed.stdout) == (2, "")
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert "Traceback" not in failed.stderr
    assert not (world / "new").exists()


def test_a_first_fold_that_is_refused_leaves_the_folder_free(world):
    run = world / "refused"
    failed = crossval(world, "--run", str(run), "--model.view_side", "48")
    assert failed.returncode == 2, failed.stderr
    (error,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "is stale: it was made with the view side 32, and not 48" in error
    mended = crossval(world, "--run", str(run), "--dry-run")
    assert mended.returncode == 0, mended.stderr


def test_a_dry_run_prints_the_folds_and_writes_nothing(world, done):
    dry = crossval(world, "--dry-run", "--run", str(world / "new"))
    assert (dry.returncode, dry.stdout) == (0, "")
    assert "34 labelled photos in 11 places, each a group of near-duplicates; photos in each fold" in dry.stderr
    assert not (world / "new").exists()


def commands_of_the_page():
    lines = (ROOT / "docs" / "crossval.md").read_text().splitlines()
    return [line.split("#")[0].split()[1:] for line in lines if line.startswith("./launch.sh crossval")]


@pytest.mark.parametrize("command", commands_of_the_page(), ids=" ".join)
def test_the_pages_commands_lack_nothing_but_photos(tmp_path, command):
    """Which the README's commands would have made."""
    call = [python(), "-m", "pipeline", *command]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    failed = subprocess.run(call, cwd=tmp_path, env=there, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: no shards in data/shards: ")
    assert list(tmp_path.iterdir()) == []


def test_a_call_without_a_recipe_says_what_to_type():
    call = [python(), "-m", "pipeline.crossval", "--folds", "3"]
    failed = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    sentence = "error: crossval needs a recipe first, such as in `./launch.sh crossval demo --folds 5 --seeds 3`\n"
    assert (failed.returncode, failed.stderr) == (2, sentence)
