"""Shards, a cache, a run with checkpoints and an exported model that revision 14eef39 wrote, used as today's."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.devices import CPU_ONLY
from tests.warm import python

ROOT = Path(__file__).parents[2]
MADE = Path(__file__).with_name("made_by_14eef39")
# What another processor may add by rounding. On the machine that made the files all is equal bit for bit.
TOLERANCE = 1e-4

pytestmark = pytest.mark.dist


@pytest.fixture
def place(tmp_path):
    """A copy of all that was made, to be worked in: paths in it are relative."""
    return Path(shutil.copytree(MADE, tmp_path / "made"))


def run(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, **CPU_ONLY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / "zero1.json"),
    }  # fmt: skip
    done = subprocess.run([python(), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_run_is_refused_since_its_epochs_had_another_order_and_keeps_its_files(place):
    shutil.rmtree(place / "run")
    (place / "stopped_run").rename(place / "run")
    done = run(place, str(ROOT / "pipeline" / "train.py"), "--config", "recipe.yaml", status=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: run/checkpoints/step-00000007/state.json is of a run that was begun by a version whose epochs have "
        "other photos in another order; finish it with that version, or choose another --train.run and "
        "checkpoint.sync to start anew"
    ]
    assert "Traceback" not in done.stderr
    assert content(place / "run") == content(MADE / "stopped_run")


def test_a_finished_run_is_recognised(place):
    done = run(place, str(ROOT / "pipeline" / "train.py"), "--config", "recipe.yaml")
    assert "run is finished already" in done.stderr


@pytest.mark.parametrize("features", ["", "features"])
def test_a_run_is_evaluated_to_the_same_predictions_and_scores(place, features):
    """Once from the photos, whose tokens are not rounded to bf16, and once from the feature cache, as it was made."""
    run(place, "-m", "pipeline.evaluate", "--run=run", "--workers=0", f"--features={features}")
    found, expected = (pd.read_csv(folder / "run" / "predictions.csv") for folder in (place, MADE))
    exact = ["split", "key", "source", "label", "group", "cluster"]
    pd.testing.assert_frame_equal(found[exact], expected[exact])
    for ending in ("_null", ""):  # then the probabilities were those of the log-odds as they are
        before = 1 / (1 + np.exp(-found[f"log_odds{ending}"]))
        np.testing.assert_allclose(before, expected[f"probability{ending}"], atol=TOLERANCE if features else 0.01)
    if features:
        assert (found["kept_views"] == expected["kept_views"]).all()
        results = [json.loads((folder / "run" / "summary.json").read_text()) for folder in (place, MADE)]
        assert results[0].keys() == results[1].keys()
        assert results[0]["test"]["auroc"] == results[1]["test"]["auroc"]


def test_an_exported_model_answers_as_it_did(place):
    run(place, "-m", "pipeline.predict", "--model=exported", "--input=inputs", "--output=new.csv", "--workers=0")
    found, expected = pd.read_csv(place / "new.csv"), pd.read_csv(MADE / "answers.csv")
    pd.testing.assert_frame_equal(found.drop(columns="probability"), expected.drop(columns="probability"))
    np.testing.assert_allclose(found["probability"], expected["probability"], atol=TOLERANCE)


def test_a_run_is_exported_to_the_same_model_once_it_is_evaluated_again(place):
    done = run(place, "-m", "pipeline.export", "--run=run", "--out=again", status=2)
    assert "run was evaluated by an older version, which did not calibrate probabilities; run `" in done.stderr
    assert "Traceback" not in done.stderr
    run(place, "-m", "pipeline.evaluate", "--run=run", "--workers=0")
    run(place, "-m", "pipeline.export", "--run=run", "--out=again")
    assert (place / "again" / "model.safetensors").read_bytes() == (
        MADE / "exported" / "model.safetensors"
    ).read_bytes()
    again, before = (
        json.loads((folder / "config.json").read_text()) for folder in (place / "again", MADE / "exported")
    )
    evaluation = json.loads((place / "run" / "summary.json").read_text())["evaluation"]
    assert (again["decision_bias"], again["decision_slope"]) == (evaluation["cut"], evaluation["slope"])
    assert {**again, **before} == {**again, "decision_bias": before["decision_bias"]}


def test_shards_and_cache_are_whole_and_finished(place):
    run(place, "-m", "data_prep", "verify", "--shards=shards", "--out=verified")
    done = run(place, "-m", "data_prep", "features", "--recipe=recipe.yaml", "--out=features", "--device=cpu")
    assert "features is finished already" in done.stderr
    for path in (MADE / "features").iterdir():
        assert (place / "features" / path.name).read_bytes() == path.read_bytes()
