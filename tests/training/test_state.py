"""The trainer's state: one object, whole in a checkpoint, and what follows from it."""

import json
from dataclasses import fields

import pytest

from pipeline.training.state import TrainState

SCORES = {"mcc": 0.8, "loss": 0.4, "n": 9}


def test_all_of_it_comes_back_from_json():
    state = TrainState(8, step=5, best={"step": 3, **SCORES}, validations_since_best=2, validated_step=4, wall_s=1.5,
                       skips=1, rollbacks=2)  # fmt: skip
    assert all(getattr(state, field.name) != field.default for field in fields(state))
    written = json.loads(json.dumps(state.to_json()))
    assert TrainState.from_json({**written, "config": {}}, batch_size=8) == state
    assert written["samples_seen"] == 40


def test_a_state_with_fewer_keys_and_others_is_read():
    written = {"step": 7, "best": None, "validations_since_best": 1, "validated_step": 6, "config": {"train": {}}}
    state = TrainState.from_json(written, batch_size=8)
    assert (state.step, state.samples_seen, state.validations_since_best, state.wall_s) == (7, 56, 1, 0.0)


@pytest.mark.parametrize(
    ("later", "better"),
    [({"mcc": 0.9, "loss": 0.9}, False), ({"mcc": 0.8, "loss": 0.3}, True), ({"mcc": 0.8, "loss": 0.4}, False),
     ({"mcc": 0.7, "loss": 0.1}, True)],
)  # fmt: skip
def test_the_best_validation_is_the_first_with_the_lowest_loss(later, better):
    state = TrainState(8, step=3)
    assert state.add_validation(SCORES)
    state.step = 6
    assert state.add_validation(later) == better
    assert (state.best["step"], state.validations_since_best, state.validated_step) == (
        (6, 0, 6) if better else (3, 1, 6)
    )


def test_patience_ends_after_as_many_validations_without_a_lower_loss():
    state = TrainState(8)
    state.add_validation(SCORES)
    for _ in range(2):
        state.add_validation({"mcc": 0.9, "loss": 1.0})
    assert [state.is_out_of_patience(patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]


def test_the_summary_counts_epochs_by_samples():
    state = TrainState(8, step=6, best={"step": 3, **SCORES}, validated_step=6, wall_s=4.0)
    assert state.summary(24) == {
        "steps": 6, "epochs": 2.0, "validated_step": 6, "samples_seen": 48, "wall_s": 4.0, "images_per_s": 12.0,
        "best": {"step": 3, "val": SCORES},
    }  # fmt: skip
