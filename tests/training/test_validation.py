"""Validation: what is measured, on which answer, and that it does not depend on the processes."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, matthews_corrcoef, roc_auc_score

from pipeline.data.batch import collate
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import read_index
from pipeline.errors import UserError
from pipeline.evaluation.calibration import cross_fit, fit
from pipeline.model.config import InputSpec
from pipeline.training import validation
from pipeline.training.validation import Validation
from tests.small_run import make_backbone, make_model, make_shards, telling_labels

N = 25


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(make_backbone(tmp_path_factory.mktemp("validation") / "backbone"))


@pytest.fixture(scope="module")
def dataset(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "shards"
    make_shards(folder, {"train": [0, 1], "val": [*telling_labels(model, "val", N, 0), None]})
    return ShardDataset(folder, read_index(folder), "val", InputSpec(32, mask_side=4))


@pytest.fixture(scope="module")
def answers(model, dataset):
    """Labels, groups and the log-odds of the whole answer, metadata NULL."""
    samples = dataset.split.samples[:N]
    with torch.no_grad():
        log_odds = model.log_odds(model(collate([dataset[row] for row in range(N)]), null_metadata=True))
    return np.array([s.label for s in samples]), np.array([s.group for s in samples]), log_odds.double().numpy()


def measure(model, dataset, monkeypatch, ranks):
    """Validate as one of several processes would, whose answers are gathered."""
    every = [Validation(dataset, 4, 0, rank, ranks) for rank in range(ranks)]
    parts = [part._answers(model.eval(), lambda: None) for part in every]
    monkeypatch.setattr(validation, "on_all_ranks", lambda action: parts[0])
    monkeypatch.setattr(validation, "gather", lambda mine: parts)
    return every[0](model)


def test_scores_are_cross_fitted_and_the_calibration_is_that_of_all_photos(model, dataset, answers, monkeypatch):
    scores = measure(model, dataset, monkeypatch, 1)
    labels, groups, log_odds = answers
    assert scores["mcc"] == pytest.approx(matthews_corrcoef(labels, cross_fit(labels, log_odds, groups) > 0.5))
    assert scores["auroc"] == pytest.approx(roc_auc_score(labels, log_odds))
    calibration = fit(labels, log_odds)
    assert (scores["cut"], scores["slope"]) == pytest.approx((calibration.cut, calibration.slope), rel=1e-3)
    assert scores["n"] == N


def test_the_loss_is_that_of_cross_fitted_probabilities_whatever_their_scale(model, dataset, answers, monkeypatch):
    """The focal loss of raw answers grows as they become surer, and would keep the weights of too early a step."""
    scores = measure(model, dataset, monkeypatch, 1)
    labels, groups, log_odds = answers
    assert scores["loss"] == pytest.approx(log_loss(labels, cross_fit(labels, log_odds, groups)), rel=1e-5)
    usual = type(model).log_odds
    monkeypatch.setattr(type(model), "log_odds", staticmethod(lambda output: 9 * usual(output)))
    assert measure(model, dataset, monkeypatch, 1)["loss"] == pytest.approx(scores["loss"], rel=1e-3)


@pytest.mark.parametrize("ranks", [2, 3])
def test_folds_and_scores_do_not_depend_on_the_number_of_processes(model, dataset, monkeypatch, ranks):
    alone, together = measure(model, dataset, monkeypatch, 1), measure(model, dataset, monkeypatch, ranks)
    assert together.pop("confusion") == alone.pop("confusion")
    assert together == pytest.approx(alone, rel=1e-6)


def test_answers_that_are_not_numbers_end_in_one_sentence(model, dataset, monkeypatch):
    monkeypatch.setattr(type(model), "log_odds", staticmethod(lambda output: output.logits[:, 0] * torch.nan))
    with pytest.raises(UserError, match="the model, at this validation, gives no number for 25 of 25 photos"):
        measure(model, dataset, monkeypatch, 1)
