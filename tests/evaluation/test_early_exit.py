"""When an answer is certain enough: rules and orders fitted on made-up answers, and the command on a run."""

import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.early_exit import early_exit
from pipeline.errors import UserError
from pipeline.evaluate import evaluate
from pipeline.evaluation.early_exit import Risk, RoundAnswers, best_order, fit_rule
from pipeline.evaluation.inference import load_model
from pipeline.evaluation.metrics import confusion_counts, mcc_of
from pipeline.export import export
from pipeline.model.pruning import StoppingRule
from pipeline.predict import predict
from tests.small_run import make_backbone, make_model, make_run, make_shards, noisy_photo, random_labels


def wandering_answers(count, seed, rounds=5, prevalence=0.5):
    """Answers that come closer to the final one in every round, which is right nine times in ten."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < prevalence).astype(int)
    final = (2 * labels - 1) * rng.normal(1.3, 1.0, count)
    noise = np.linspace(1.0, 0.0, rounds) * rng.normal(size=(count, rounds))
    return RoundAnswers(labels, final[:, None] + noise, np.tile(np.arange(1, rounds + 1), (count, 1)))


def loss_of(answers, rule):
    kept = [float(mcc_of(*confusion_counts(answers.labels, values, rule.cut).sum(axis=0)))
            for values in (answers.log_odds[:, -1], answers.stopped(rule)[0])]  # fmt: skip
    return kept[0] - kept[1]


def test_a_rule_stops_each_photo_in_its_first_certain_round():
    log_odds = np.array([[0.0, 2.0, 9.0], [-1.5, 5.0, 5.0], [0.5, -0.5, -9.0], [1.2, -3.0, -3.0]])
    answers = RoundAnswers(np.zeros(4), log_odds, np.array([[1, 2, 12]] * 3 + [[1, 2, 2]]))
    kept, views = answers.stopped(StoppingRule(0.2, margins_none=(1.6, 1.0), margins_roadwork=(1.5, 1.0)))
    assert kept.tolist() == [2.0, -1.5, -9.0, -3.0]
    assert views.tolist() == [2, 1, 12, 2]


def test_a_rule_says_the_same_of_tensors():
    rule = StoppingRule(0.2, (1.6, 1.0), (1.5, 1.0))
    values = torch.tensor([-2.0, -1.4, -0.8, 0.2, 1.2, 1.7])
    assert rule.certain(values, 0).tolist() == [True, True, False, False, False, True]
    assert rule.certain(values, 1).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("max_loss", [0.002, 0.02, 0.1])
@pytest.mark.parametrize("prevalence", [0.5, 0.1])
def test_the_stated_loss_is_kept_on_the_photos_at_hand_and_on_others(max_loss, prevalence):
    answers = wandering_answers(2000, seed=0, prevalence=prevalence)
    rule = fit_rule(answers, 0.1, max_loss)
    assert loss_of(answers, rule) <= max_loss + 1e-9
    losses = [loss_of(wandering_answers(2000, seed, prevalence=prevalence), rule) for seed in range(1, 9)]
    assert np.mean(losses) <= max_loss + 0.003
    assert answers.stopped(rule)[1].mean() < 4.9


def test_a_larger_stated_loss_takes_fewer_views():
    answers = wandering_answers(2000, seed=0)
    views = [answers.stopped(fit_rule(answers, 0.0, max_loss))[1].mean() for max_loss in (0.001, 0.01, 0.1)]
    assert views[0] > views[1] > views[2]


def test_a_rule_that_costs_too_much_is_made_stricter():
    """Where the few photos of a rare class are those that change, the chance alone would allow too much."""
    labels = np.array([0] * 990 + [1] * 10)
    final = np.where(labels == 1, 1.0, -1.0)
    early = np.where(labels == 1, -2.5, -2.0 - np.linspace(0, 1, 1000))
    answers = RoundAnswers(labels, np.stack([early, final], axis=1), np.tile([1, 12], (1000, 1)))
    rule = fit_rule(answers, 0.0, 0.05)
    assert loss_of(answers, rule) <= 0.05


def test_the_risk_is_a_logistic_regression():
    rng = np.random.default_rng(0)
    distances = rng.exponential(1.0, 5000)
    changes = rng.random(5000) < 1 / (1 + np.exp(-(0.5 - 2.0 * distances)))
    risk = Risk.fit(distances, changes)
    reference = LogisticRegression(C=np.inf).fit(distances[:, None], changes)
    assert risk.offset == pytest.approx(reference.intercept_[0], abs=0.03)
    assert risk.slope == pytest.approx(-reference.coef_[0, 0], abs=0.05)
    assert 1 / (1 + np.exp(risk.slope * risk.distance(0.01) - risk.offset)) == pytest.approx(0.01)


def test_without_any_change_or_any_photo_the_margin_is_finite():
    assert 0 < Risk.fit(np.linspace(0, 3, 200), np.zeros(200, dtype=bool)).distance(0.001) < 10
    assert np.isfinite(Risk.fit(np.empty(0), np.empty(0, dtype=bool)).distance(0.001))


def test_the_best_order_takes_the_most_telling_view_first():
    labels = np.array([0, 1] * 20)
    telling = {1: 0.1, 2: 2.0, 3: 0.7, 4: 0.0}
    asked = []

    def answer(views):
        asked.append(list(views))
        return (2 * labels - 1) * sum(telling.get(view, 0.0) for view in views)

    assert best_order(answer, labels, 5) == [2, 3, 1, 4]
    assert all(views[0] == 0 for views in asked)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    make_shards(folder / "shards", {"train": [0, 1], "val": random_labels(40, 0), "test": random_labels(30, 1)})
    return make_run(folder / "run", make_model(make_backbone(folder / "backbone"), keep_views=12), folder / "shards")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_calibrated_model_prunes_dynamically_in_evaluation_export_and_prediction(run, tmp_path):
    found = json.loads(early_exit(run, max_loss=0.4, workers=0).read_text())["calibration"]
    model = load_model(run / "model", torch.device("cpu"))
    assert model.config.pruning == "dynamic"
    assert model.config.stopping == found["stopping"]
    assert 1 <= found["views"] < 12

    evaluate(run, workers=0)
    rows = (run / "predictions.csv").read_text().splitlines()
    kept = [line.split(",")[-2].count(";") + 1 for line in rows[1:] if line.startswith("val")]
    assert len(set(kept)) > 1
    assert np.mean(kept) == pytest.approx(found["views"])

    assert json.loads(export(run).read_text())["largest_logit_difference"] == 0
    (tmp_path / "photos").mkdir()
    for seed in range(8):
        (tmp_path / "photos" / f"{seed}.jpg").write_bytes(noisy_photo(seed))
    predict(run / "model", tmp_path / "out.jsonl", input=[str(tmp_path / "photos")], workers=0)
    counts = [len(json.loads(line)["kept_views"]) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert min(counts) < 12


def test_what_training_and_evaluation_wrote_stays_in_the_summary(run):
    summary = json.loads(early_exit(run, workers=0).read_text())
    assert summary["steps"] == 8
    assert summary["calibration"]["n"] == 40
    assert summary["calibration"]["mcc"] >= summary["calibration"]["mcc_without"] - 2 / 40 - 1e-9


def test_fixed_views_are_chosen_and_then_used_for_every_photo(run):
    found = json.loads(early_exit(run, pruning="fixed", workers=0).read_text())["calibration"]
    assert sorted(found["fixed_views"]) == list(range(1, 12))
    model = load_model(run / "model", torch.device("cpu"))
    assert (model.config.pruning, model.config.fixed_views) == ("fixed", found["fixed_views"])


def test_wrong_use_ends_in_one_sentence(run, trained, tmp_path):
    with pytest.raises(UserError, match="--max_loss"):
        early_exit(run, max_loss=0.0)
    with pytest.raises(UserError, match="no run at"):
        early_exit(tmp_path / "nowhere")
    make_shards(tmp_path / "one_class", {"val": [1, 1, None]})
    with pytest.raises(UserError, match="not have labels of both classes"):
        early_exit(run, shards=str(tmp_path / "one_class"), workers=0)
    baseline = make_model(load_model(run / "model", torch.device("cpu")).config.backbone, head="mean_pool")
    with pytest.raises(UserError, match="prunes no views"):
        early_exit(make_run(tmp_path / "baseline", baseline, trained.parent / "shards"))
