import numpy as np
import pytest

from pipeline.config import Config, DataConfig, TrainConfig
from pipeline.data.index import Sample, Split
from pipeline.distributed.settings import check_mixup, plan_batches
from pipeline.errors import UserError
from pipeline.optim.config import OptimConfig
from pipeline.training.plan import describe_sampling, describe_schedule, plan_sampling, plan_schedule


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


def split_of(roadwork: float, clusters: dict[int, int], weights: dict[int, float]) -> Split:
    """Photos of clusters of these sizes, by their numbers; roadwork is that share of each; one weight a class."""
    labels = {cluster: np.arange(size) < round(roadwork * size) for cluster, size in clusters.items()}
    return Split((), tuple(
        Sample(f"{cluster}-{row}", 0, {}, int(label), row, cluster, weights[int(label)], 96, 64)
        for cluster, of in labels.items() for row, label in enumerate(of)
    ))  # fmt: skip


def told_of(config: Config, split: Split) -> list[tuple[str, str]]:
    return list(describe_sampling(plan_sampling(config, split)))


RARE = split_of(0.1, {0: 700, 3: 300}, {0: 0.5 / 0.9, 1: 5.0})


def test_the_plan_says_what_is_asked_and_what_an_epoch_obtains():
    words = "share of the photos -> asked -> of an epoch: roadwork 10.0% -> "
    assert told_of(Config(), RARE) == [("sampling", f"{words}50.0% -> 50.0%")]
    assert told_of(Config(data=DataConfig(sampling="uniform")), RARE) == [("sampling", f"{words}10.0% -> 10.0%")]


@pytest.mark.parametrize(("most", "obtained"), [(2, "25.0%"), (1, "12.5%")])
def test_the_plan_says_where_the_cap_holds_the_epoch_back(most, obtained):
    (_, line), (about, note) = told_of(Config(data=DataConfig(max_repeats=most)), RARE)
    assert f"roadwork 10.0% -> 50.0% -> {obtained}" in line
    assert about == "note"
    assert note.startswith(f"data.max_repeats {most} holds 100 photos back")
    assert note.endswith("up to 4.0 times an epoch")


def test_the_clusters_that_change_most_are_told():
    sizes = {1: 100, 2: 400, 7: 100, 11: 200}
    samples = split_of(0.5, sizes, {0: 1.0, 1: 1.0}).samples
    heavy = {2: 0.25, 7: 5.0}
    split = Split((), tuple(Sample(**{**vars(s), "weight": heavy.get(s.cluster, 1.0)}) for s in samples))
    line = told_of(Config(), split)[0][1]
    assert "cluster 7 12.5% -> 55.6% -> " in line
    assert "cluster 2 50.0% -> 11.1% -> " in line
    assert "cluster 1 " not in line


def test_the_report_counts_what_the_loader_will_show():
    sampling = plan_sampling(Config(data=DataConfig(max_repeats=3)), RARE)
    report, rows = sampling.report(), sampling.draw.order(0)
    assert len(rows) == 800
    for cluster, label, name in ((0, 0, "none"), (0, 1, "roadwork"), (3, 0, "none"), (3, 1, "roadwork")):
        there = (RARE.clusters[rows] == cluster) & (RARE.labels[rows] == label)
        assert report["obtained"][str(cluster)][name] == pytest.approx(there.mean(), abs=1e-6)
    assert report["photos"] == {"0": {"roadwork": 0.07, "none": 0.63}, "3": {"roadwork": 0.03, "none": 0.27}}
    assert report["asked"] == {"0": {"roadwork": 0.35, "none": 0.35}, "3": {"roadwork": 0.15, "none": 0.15}}
