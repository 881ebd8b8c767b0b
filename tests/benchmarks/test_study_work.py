"""The study's work: recipes make trainings, trainings choose learning rates, and mistakes are one sentence."""

import json

import numpy as np
import pytest
import torch

from benchmarks.loops import BareLoop
from benchmarks.study.arms import COMPLETE, select_arms
from benchmarks.study.config import RECIPES, PlanConfig, read_recipe
from benchmarks.study.photos import check_pretraining
from benchmarks.study.training import Training, batch_rows
from benchmarks.study.work import choose, plan_work, settle
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.config import LossConfig
from pipeline.model.output import RoadworkOutput
from pipeline.optim.config import OptimConfig
from pipeline.training.memory import noise
from tests.small_run import make_backbone, make_model


def training(**changes):
    config = read_recipe("study_small")
    values = vars(plan_work(config, select_arms([]), "f").of_arm[COMPLETE][0][0][0])
    return Training(**{**values, **changes})


def test_an_epoch_draws_each_photo_at_most_once_and_steps_are_full():
    rows = np.arange(100, 140)
    batches = list(batch_rows(training(steps=6, batch_size=8, epoch_share=0.8), rows, np.ones(40)))
    assert [len(batch) for batch in batches] == [8] * 6
    first = np.concatenate(batches[:4]).tolist()
    assert len(set(first)) == 32
    assert set(first) < set(rows)


def outcome(mcc, loss, diverged=False):
    return {"diverged": diverged, "null": {"val_mcc": mcc, "val_loss": loss}}


def test_the_learning_rate_is_chosen_on_validation_and_not_among_those_that_diverged():
    rates = ["a", "b", "c", "d"]
    outcomes = [outcome(0.7, 0.5), outcome(0.8, 0.5), outcome(0.8, 0.4), {"diverged": True}]
    assert choose(list(zip(rates, outcomes, strict=True)))[0] == "c"
    assert choose([("d", outcomes[3])])[0] == "d"


def test_the_rate_that_the_first_seed_chooses_in_a_fold_trains_all_seeds_there(tmp_path):
    config = read_recipe("study_small")
    config.plan.lrs, config.plan.seeds, config.plan.folds = [1e-3, 3e-3], 3, 2
    work = plan_work(config, select_arms(["metadata_given"]), "f")
    best = (3e-3, 1e-3)
    for one in work.flat(COMPLETE):
        assert one.seed == 0
        scores = {"val_mcc": 0.8 if one.optim.lr == best[one.fold] else 0.7, "val_loss": 0.1}
        other = {"val_mcc": 1.5 - scores["val_mcc"], "val_loss": 0.1}
        text = json.dumps({"diverged": False, "null": scores, "metadata": other})
        (tmp_path / f"{one.name}.json").write_text(text)
    settled = settle(work, tmp_path)
    for arm in (COMPLETE, "metadata_given"):
        chosen = [(one.fold, one.seed, one.optim.lr) for one in settled.flat(arm)]
        assert chosen == [(fold, seed, best[fold]) for fold in (0, 1) for seed in range(3)]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
@pytest.mark.parametrize("quick", [False, True])
def test_every_recipe_has_arms_that_differ_from_complete(recipe, quick):
    config = read_recipe(recipe)
    config = config.quick() if quick else config
    work = plan_work(config, select_arms(config.plan.arms), "f")
    for arm in select_arms(config.plan.arms):
        lrs = config.plan.head_lrs if arm.group == "heads" and config.plan.head_lrs else config.plan.lrs
        for fold in work.of_arm[arm.name]:
            assert sorted(one.optim.lr for one in fold[0]) == sorted(lrs)
            assert len(fold) == config.plan.seeds
            assert {len(seed) for seed in fold[1:]} <= {0 if len(lrs) > 1 else 1}
    assert work.trainings[0].model.head == "roadwork"  # the longest first


def test_metadata_at_the_test_trains_nothing_of_its_own():
    config = read_recipe("study_small")
    work = plan_work(config, select_arms(["metadata_given"]), "f")
    assert len(work.trainings) == len(work.flat(COMPLETE))


def test_another_setting_is_another_training():
    names = {training().name, training(seed=9).name, training(steps=7).name, training(optim=OptimConfig(lr=1.0)).name}
    assert len(names) == 4
    assert training().name == training().name


def test_an_arm_that_takes_nothing_away_is_refused():
    config = read_recipe("study_small")
    config.loss.consistency = 0.0
    with pytest.raises(UserError, match=r"'no_consistency' .* is the same as 'complete' by this recipe"):
        plan_work(config, select_arms(["no_consistency"]), "f")


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no study recipe 'big'; there are pruning, study, study_heads, "):
        read_recipe("big")
    (tmp_path / "preset.yaml").write_text("scenes: {preset: stdy}")
    with pytest.raises(UserError, match=r"scenes\.preset"):
        read_recipe(str(tmp_path / "preset.yaml"))
    (tmp_path / "name.yaml").write_text("optim: {name: sophia_h}")
    with pytest.raises(UserError, match=r"optim is 'sophia_h with lr 0\.0003', but must be without name and lr"):
        read_recipe(str(tmp_path / "name.yaml"))
    (tmp_path / "views.yaml").write_text("plan: {asks_views: true}")
    with pytest.raises(UserError, match=r"model\.keep_views is 8, but must be 12 with plan\.asks_views"):
        read_recipe(str(tmp_path / "views.yaml"))
    with pytest.raises(UserError, match=r"plan\.arms names 'piramid', but must be among "):
        select_arms(["piramid"])
    with pytest.raises(UserError, match=r"plan\.folds is 5, but must be at most the 4 parts"):
        PlanConfig(folds=5)
    config = read_recipe("study_small")
    config.scenes["seed"] = 20000003
    with pytest.raises(UserError, match=r"scenes\.seed is 20000003, .* pretrained on scenes of this seed"):
        check_pretraining(config)


class Scalar(torch.nn.Module):
    """A model whose loss is its weight times the factors of the batch, summed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch, with_loss, keep_all):
        return RoadworkOutput(loss=(batch["factor"] * self.weight).sum())


def test_a_step_without_a_finite_loss_leaves_the_weights():
    model = Scalar()
    loop = BareLoop(model, OptimConfig(lr=0.1), steps=10)
    assert np.isnan(loop.step(0, [{"factor": torch.tensor(torch.nan)}]))
    assert model.weight.item() == 2.0
    assert loop.step(0, [{"factor": torch.tensor(3.0)}]) == pytest.approx(6.0)
    assert model.weight.item() == pytest.approx(2.0 - 0.1, abs=1e-3)


def test_micro_batches_are_one_batch():
    weights = []
    for factors in ([2.0, 4.0], [3.0]):
        model = Scalar()
        loop = BareLoop(model, OptimConfig(name="sophia_g", lr=0.1, grad_clip=0.0, hessian_every=7), steps=10)
        assert loop.step(1, [{"factor": torch.tensor(factor)} for factor in factors]) == pytest.approx(6.0)
        weights.append(model.weight.grad.item())
    assert weights == [3.0, 3.0]


def test_a_field_that_gives_the_label_away_is_in_no_model():
    config = read_recipe("study_small").without({"weather": "known only where the label is roadwork"})
    assert config.model.metadata == ("gps", "daytime", "scene")
    work = plan_work(config, select_arms(["all"]), "f")
    assert not any("weather" in training.model.metadata for training in work.trainings)


@pytest.mark.parametrize("name", ["sophia_h", "sophia_g"])
def test_sophias_estimate_changes_curvature_alone_and_its_steps_learn(name, tmp_path):
    model = make_model(make_backbone(tmp_path)).train()
    model.loss_config = LossConfig()
    batch = noise(Config(model=model.config.sizes), model.backbone.config, 4)
    batch |= {"weather": torch.eye(8)[:4], "labels": torch.tensor([0, 1, 0, 1])}
    loop = BareLoop(model, OptimConfig(name=name, lr=1e-3, hessian_every=5), steps=40)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loop.estimate(0, batch, keep_all=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(float(state["hessian"].abs().sum()) for state in loop.optimizer.state.values()) > 0
    assert model.training
    losses = [loop.step(number, [batch], keep_all=True) for number in range(40)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
