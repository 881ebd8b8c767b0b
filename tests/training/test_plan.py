import pytest

from pipeline.config import Config, DataConfig, TrainConfig
from pipeline.distributed.settings import check_mixup, plan_batches
from pipeline.errors import UserError
from pipeline.optim.config import OptimConfig
from pipeline.training.plan import describe_schedule, plan_schedule


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 64])
def test_the_batch_is_the_same_at_every_world_size(world_size):
    planned = plan_batches(TrainConfig(batch_size=64, micro_batch_size=16), world_size)
    assert world_size * planned.micro_batch_size * planned.accumulation == 64
    assert planned.micro_batch_size <= 16


def test_the_largest_even_micro_batch_is_taken():
    assert plan_batches(TrainConfig(batch_size=36, micro_batch_size=16), 1).micro_batch_size == 12


@pytest.mark.parametrize(("batch", "world_size", "advice"), [(64, 3, "63 or 66"), (2, 4, "4 or 4|4 or 8|choose 4")])
def test_a_batch_that_cannot_be_shared_is_refused_with_advice(batch, world_size, advice):
    with pytest.raises(UserError, match=advice):
        plan_batches(TrainConfig(batch_size=batch), world_size)


def test_the_schedule_covers_the_epochs_and_validates_at_the_end():
    config = Config(
        train=TrainConfig(epochs=3, batch_size=32, validations_per_epoch=2), data=DataConfig(epoch_share=0.5)
    )
    schedule = plan_schedule(config, 1000)
    assert schedule.samples_per_epoch == 500
    assert schedule.steps == 47  # 1500 / 32, rounded up
    assert len(schedule.validation_steps) == 6
    assert max(schedule.validation_steps) == schedule.steps


def test_a_run_shorter_than_its_validations_still_validates_its_last_step():
    schedule = plan_schedule(Config(train=TrainConfig(epochs=1, batch_size=64, validations_per_epoch=5)), 40)
    assert schedule.steps == 1
    assert schedule.validation_steps == {1}


def test_mixup_needs_two_photos_beside_each_other():
    check_mixup(0.2, plan_batches(TrainConfig(batch_size=4, micro_batch_size=2), 1))
    check_mixup(0.0, plan_batches(TrainConfig(batch_size=4, micro_batch_size=1), 1))
    with pytest.raises(UserError, match=r"loss\.mixup_alpha is 0\.2, but each forward pass has one photo"):
        check_mixup(0.2, plan_batches(TrainConfig(batch_size=4, micro_batch_size=8), 4))


@pytest.mark.parametrize(("name", "notes"), [("adamw", ["optim.gamma 0.02 is for Sophia"]), ("sophia_g", [])])
def test_a_setting_of_sophias_without_sophia_is_told(name, notes):
    config = Config(optim=OptimConfig(name=name, gamma=0.02))
    told = [text for _, text in describe_schedule(config, plan_schedule(config, 1000)) if "Sophia" in text]
    assert len(told) == len(notes)
    assert all(note in line for note, line in zip(notes, told, strict=True))
