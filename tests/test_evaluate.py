import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.data import dataset as dataset_module
from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.devices import pick_device
from pipeline.errors import UserError
from pipeline.evaluate import evaluate
from pipeline.evaluation.calibration import fit
from pipeline.evaluation.inference import kept_views
from pipeline.evaluation.scoring import score_clusters, score_split
from pipeline.export import export
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import InputSpec
from pipeline.model.roadwork import RoadworkModel
from pipeline.predict import predict
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_model, make_run, make_shards, noisy_photo, telling_labels

N = {"val": 40, "test": 61}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as training leaves it."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = make_model(make_backbone(folder / "backbone"))
    labels = {"val": telling_labels(model, "val", 40, 0), "test": [*telling_labels(model, "test", 60, 1), None]}
    make_shards(folder / "shards", {"train": [0, 1], **labels})
    return make_run(folder / "run", model, folder / "shards")


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The same run, evaluated; with the number of views that the backbone saw."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained, run)
    seen, call = [], FrozenBackbone.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenBackbone, "__call__", lambda self, views: (seen.append(len(views)), call(self, views))[1])
        path = evaluate(run, workers=0, batch_size=7)
    assert path == (run / "summary.json").resolve()
    return run, json.loads(path.read_text()), pd.read_csv(run / "predictions.csv"), sum(seen)


def test_training_keys_stay_in_the_summary(evaluated):
    summary = evaluated[1]
    assert summary["steps"] == 8
    assert summary["best"]["val"]["cut"] == -0.8
    assert summary["evaluation"]["data"] == "noise <of> photos"


def test_every_sample_has_one_row_and_unlabelled_ones_are_not_scored(evaluated):
    _, summary, rows, _ = evaluated
    assert rows["key"].tolist() == [f"{name}_{i}" for name, n in N.items() for i in range(n)]
    assert rows["label"].isna().sum() == 1
    assert rows["source"].iloc[3] == "photos/3.jpg"
    assert (summary["val"]["n"], summary["test"]["n"]) == (40, 60)


def test_metrics_are_those_of_scikit_learn_on_the_written_rows(evaluated):
    _, summary, rows, _ = evaluated
    known = rows[(rows["split"] == "test") & rows["label"].notna()]
    labels, called, informed = known["label"].astype(int), known["probability_null"] > 0.5, known["probability"] > 0.5
    test = summary["test"]
    assert test["mcc_null_metadata"] == pytest.approx(sk.matthews_corrcoef(labels, called))
    assert test["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, informed))
    assert test["auroc"] == pytest.approx(sk.roc_auc_score(labels, known["probability_null"]))
    assert test["accuracy"] == pytest.approx((labels == called).mean())
    raw = 1 / (1 + np.exp(-known["log_odds_null"]))
    for name, found, before in (("nll", sk.log_loss, "nll_before"), ("brier", sk.brier_score_loss, "brier_before")):
        assert test[name] == pytest.approx(found(labels, known["probability_null"]))
        assert test["calibration"][before] == pytest.approx(found(labels, raw))
    assert (known["prediction"] == called).all()
    assert set(test["ci95"]) == {"mcc", "mcc_null_metadata", "auroc", "average_precision", "accuracy", "f1"}
    low, high = test["ci95"]["mcc_null_metadata"]
    assert low < test["mcc_null_metadata"] < high
    assert test["ci95"]["mcc"] != test["ci95"]["mcc_null_metadata"]


def test_all_probabilities_are_on_the_one_scale_that_validation_gave_without_metadata(evaluated):
    _, summary, rows, _ = evaluated
    val, about = rows[rows["split"] == "val"], summary["evaluation"]
    calibration = fit(val["label"].to_numpy(int), val["log_odds_null"].to_numpy())
    assert (about["cut"], about["slope"]) == pytest.approx((calibration.cut, calibration.slope))
    for ending in ("", "_null"):
        odds = np.exp(about["slope"] * (rows[f"log_odds{ending}"] - about["cut"]))
        np.testing.assert_allclose(rows[f"probability{ending}"], odds / (1 + odds), rtol=1e-9)
    assert (rows["prediction"] == (rows["log_odds_null"] > about["cut"])).all()
    assert 0 < rows["prediction"].mean() < 1


def test_validations_own_scores_are_cross_fitted(evaluated):
    _, summary, rows, _ = evaluated
    val = rows[rows["split"] == "val"]
    labels, held_out = val["label"].to_numpy(int), np.empty(40)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, val["group"])
    for others, held in folds:
        found = fit(labels[others], val["log_odds_null"].to_numpy()[others])
        held_out[held] = found.probability(val["log_odds_null"].to_numpy()[held])
    assert summary["val"]["mcc_null_metadata"] == pytest.approx(sk.matthews_corrcoef(labels, held_out > 0.5))
    assert summary["val"]["nll"] == pytest.approx(sk.log_loss(labels, held_out))
    assert summary["val"]["auroc"] == pytest.approx(sk.roc_auc_score(labels, val["log_odds_null"]))
    assert summary["val"]["nll"] > sk.log_loss(labels, val["probability_null"])


def test_log_odds_and_kept_views_are_the_models_own(evaluated, trained):
    rows = evaluated[2]
    model = RoadworkModel.from_pretrained(trained / "model").eval()
    shards = trained.parent / "shards"
    dataset = ShardDataset(shards, read_index(shards), "test", InputSpec(32, mask_side=4))
    batch = collate([dataset[row] for row in range(5)])
    with torch.no_grad():
        blind = model(batch, null_metadata=True)
        informed = model(batch)
    written = rows[rows["split"] == "test"].head(5)
    np.testing.assert_allclose(written["log_odds_null"], model.log_odds(blind), atol=1e-5)
    np.testing.assert_allclose(written["log_odds"], model.log_odds(informed), atol=1e-5)
    assert not np.allclose(written["log_odds"], written["log_odds_null"], atol=1e-3)
    assert written["kept_views"].tolist() == [";".join(names) for names in kept_views(blind)]


def test_both_regimes_share_one_pass_of_the_backbone(evaluated):
    shown = (evaluated[0] / "report.html").read_text().count('alt="evidence in ')  # drawn from one more pass each
    assert 0 < shown <= 12
    assert evaluated[3] == 4 * (sum(N.values()) + shown)  # four views are kept


def test_evaluating_again_changes_no_result(evaluated):
    run, summary, _, _ = evaluated
    rows, page = (run / "predictions.csv").read_bytes(), (run / "report.html").read_bytes()
    again = json.loads(evaluate(run, workers=1, batch_size=7).read_text())
    for timing in ("wall_s", "images_per_s"):
        again["evaluation"][timing] = summary["evaluation"][timing]
    assert again == summary
    assert (run / "predictions.csv").read_bytes() == rows
    assert (run / "report.html").read_bytes() == page


def test_a_split_alone_takes_the_calibration_that_the_run_knows(trained, evaluated, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    summary = json.loads(evaluate(run, splits=["test"], workers=0).read_text())
    assert (summary["evaluation"]["cut"], summary["evaluation"]["slope"]) == (-0.8, 1.7)
    assert "val" not in summary
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="no calibration yet"):
        evaluate(run, splits=["test"], workers=0)
    run = shutil.copytree(evaluated[0], tmp_path / "evaluated")
    summary = json.loads(evaluate(run, splits=["test"], workers=0).read_text())
    assert summary["evaluation"]["cut"] == evaluated[1]["evaluation"]["cut"]
    assert summary["val"] == evaluated[1]["val"]


def change_weights(run):
    model = RoadworkModel.from_pretrained(run / "model")
    with torch.no_grad():
        next(model.head.parameters()).mul_(1.5)
    model.save_pretrained(run / "model")


def test_scores_and_cut_of_another_model_do_not_stay_beside_new_ones(evaluated, tmp_path):
    run = shutil.copytree(evaluated[0], tmp_path / "run")
    change_weights(run)
    with pytest.raises(UserError, match=r"has changed since it was evaluated; run `.*evaluate --run .*run` once more"):
        evaluate(run, splits=["test"], workers=0)
    summary = json.loads(evaluate(run, splits=["val"], workers=0).read_text())
    assert "test" not in summary
    assert summary["steps"] == 8
    assert summary["evaluation"]["model_sha256"] != evaluated[1]["evaluation"]["model_sha256"]


def test_answers_that_are_not_numbers_end_in_one_sentence(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    model = RoadworkModel.from_pretrained(run / "model")
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    model.save_pretrained(run / "model")
    with pytest.raises(UserError, match=r"gives no number for 40 of 40 photos, the first of which is val_0"):
        evaluate(run, workers=0)


def test_a_baseline_is_evaluated_too(trained, tmp_path):
    backbone = str(trained.parent / "backbone")
    shards = trained.parent / "shards"
    run = make_run(tmp_path / "run", make_model(backbone, head="single_view"), shards)
    summary = json.loads(evaluate(run, workers=0).read_text())
    assert summary["test"]["mcc"] == summary["test"]["mcc_null_metadata"]
    assert set(pd.read_csv(run / "predictions.csv")["kept_views"]) == {"global"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no run at"),
        (lambda run: shutil.rmtree(run / "model"), "no model in"),
        (lambda run: (run / "config.yaml").unlink(), "no configuration at"),
    ],
)
def test_an_incomplete_run_is_refused(trained, tmp_path, change, message):
    run = shutil.copytree(trained, tmp_path / "run")
    change(run)
    with pytest.raises(UserError, match=message):
        evaluate(run, workers=0)


def test_a_split_without_labels_is_refused_before_anything_is_written(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    make_shards(tmp_path / "shards", {"val": [0, 1], "test": [None, None]})
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UserError, match=r"'test'.* no labelled photo"):
        evaluate(run, shards=tmp_path / "shards", workers=0)
    with pytest.raises(UserError, match="no samples in split 'train'"):
        evaluate(run, shards=tmp_path / "shards", splits=["val", "train"], workers=0)
    assert sorted(path.name for path in run.iterdir()) == before


def test_an_absent_device_is_refused():
    for name in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match="--device"):
            pick_device(name)


def frame(labels, probabilities, clusters):
    return pd.DataFrame(
        {
            "label": pd.array(labels, dtype="Int64"),
            "probability_null": probabilities,
            "probability": probabilities,
            "log_odds_null": np.log(probabilities) - np.log1p(-np.array(probabilities)),
            "log_odds": np.log(probabilities) - np.log1p(-np.array(probabilities)),
            "group": range(len(labels)),
            "cluster": clusters,
        }
    )


def test_clusters_are_listed_worst_first_and_only_when_large_enough(trained):
    index = read_index(trained.parent / "shards")
    labels = [0, 1] * 10 + [0, 1] * 10 + [1] * 5
    good, bad = [0.1, 0.9] * 10, [0.1, 0.9] * 6 + [0.9, 0.1] * 4
    rows = frame(labels, good + bad + [0.9] * 5, [0] * 20 + [1] * 20 + [2] * 5)
    places = score_clusters(rows, index)
    assert [(place["cluster"], place["n"]) for place in places] == [(1, 20), (0, 20)]
    assert [place["mcc"] for place in places] == pytest.approx([0.2, 1.0])
    assert places[0]["centre"] == (55.7, 13.2)


def test_a_cluster_of_one_class_has_no_mcc_and_comes_last(trained):
    index = read_index(trained.parent / "shards")
    rows = frame([1] * 20 + [0, 1] * 10, [0.4] * 20 + [0.1, 0.9] * 10, [0] * 20 + [1] * 20)
    places = score_clusters(rows, index)
    assert [place["mcc"] for place in places] == [1.0, None]


def test_a_split_of_one_class_is_json_without_nan():
    scores = score_split(frame([1] * 6, np.linspace(0.2, 0.9, 6), [0] * 6))
    text = json.loads(json.dumps(scores, allow_nan=False))
    assert text["auroc"] is None
    assert text["ci95"]["mcc"] is None
    assert text["calibration"]["slope"] is None


@pytest.fixture(scope="module")
def cached(trained, tmp_path_factory):
    """The same run, as if trained from a cache, and that cache."""
    folder = tmp_path_factory.mktemp("cached")
    cache = make_cache(folder / "cache", trained.parent / "shards", str(trained.parent / "backbone"))
    shutil.copytree(trained, folder / "run")
    text = (folder / "run" / "config.yaml").read_text()
    (folder / "run" / "config.yaml").write_text(text.replace("features: ''", f"features: {cache}"))
    return folder / "run", cache


def test_a_run_is_evaluated_from_its_cache_without_the_backbone(evaluated, cached, monkeypatch):
    monkeypatch.setattr(FrozenBackbone, "__call__", lambda *_: pytest.fail("the cache has these tokens"))
    evaluate(cached[0], workers=0)
    found, wanted = pd.read_csv(cached[0] / "predictions.csv"), evaluated[2]
    assert found["key"].tolist() == wanted["key"].tolist()
    for column in ("log_odds", "log_odds_null"):  # probabilities are steeper by the slope of so small a validation set
        assert np.abs(found[column] - wanted[column]).max() < 0.2 * wanted[column].std()


def test_a_cache_that_does_not_fit_is_passed_over_with_a_word_and_refused_when_asked_for(cached, capsys, tmp_path):
    run = shutil.copytree(cached[0], tmp_path / "run")
    values = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps({**values, "view_side": 48, "head_sha256": None}))
    with pytest.raises(UserError, match="is stale: it was made with the view side 32, and not 48"):
        evaluate(run, splits=["val"], features=str(cached[1]), workers=0)
    capsys.readouterr()
    evaluate(run, splits=["val"], workers=0)
    assert "computing the tokens anew: the feature cache" in capsys.readouterr().err
    evaluate(run, splits=["val"], features="", workers=0)
    assert "computing the tokens anew" not in capsys.readouterr().err


@pytest.mark.parametrize("known", ["run", "model"])
def test_a_run_decodes_as_it_was_trained_in_evaluation_export_and_prediction(trained, tmp_path, monkeypatch, known):
    """Photos of 96 x 64 are never halved at 32 px; what is asked of the decoder is what counts."""
    run = shutil.copytree(trained, tmp_path / "run")
    place = run / "config.yaml" if known == "run" else run / "model" / "config.json"
    text = place.read_text()
    changed = text.replace("decode_scale: full", "decode_scale: half").replace('"full"', '"half"')
    assert changed != text
    if known == "model":
        changed = json.dumps({**json.loads(changed), "head_sha256": None})
    place.write_text(changed)
    asked = []
    real = dataset_module.decode_scaled
    monkeypatch.setattr(dataset_module, "decode_scaled", lambda *a: (asked.append(a[1].decode_scale), real(*a))[1])
    evaluate(run, workers=0)
    wanted = "half" if known == "run" else "full"  # of a run, its own configuration counts
    assert set(asked) == {wanted}
    export(run, out=tmp_path / "exported")
    asked.clear()
    (tmp_path / "photo.jpg").write_bytes(noisy_photo(1))
    predict(tmp_path / "exported", tmp_path / "x.csv", input=[str(tmp_path / "photo.jpg")], workers=0)
    assert asked == [wanted]
