"""Several heads on one backbone: their means, their gradients, and models merged after training."""

import json

import numpy as np
import pytest
import torch

from pipeline.model.config import LossConfig
from pipeline.model.roadwork import RoadworkModel
from tests.model.examples import METADATA, random_photos
from tests.model.synthetic import learner, photos
from tests.small_run import make_backbone, make_model, small_config

K = 3


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone"))


def single(model, number):
    """One head of an ensemble as a model of its own, with the same pruner."""
    alone = learner(0, model.loss_config)
    prefix = f"head.members.{number}."
    weights = {name.replace(prefix, "head."): value for name, value in model.state_dict().items()}
    alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
    return alone.train(model.training)


def with_masks(batch):
    masks = torch.rand(len(batch["labels"]), 6, 4, 4, generator=torch.Generator().manual_seed(0))
    masks[1] = torch.nan
    return {**batch, "mask_targets": masks}


@torch.no_grad()
def test_an_ensemble_answers_with_the_mean_of_its_heads_log_odds():
    model, batch = learner(0, heads=K).eval(), photos(5, seed=1)
    output, alone = model(batch), [single(model, number)(batch) for number in range(K)]
    z = [(one.logits[:, 1] - one.logits[:, 0]).numpy() for one in alone]
    np.testing.assert_allclose(model.log_odds(output), np.mean(z, axis=0), rtol=1e-5, atol=1e-6)
    for name in ("evidence_logits", "evidence_map", "mask_logits", "view_importance"):
        expected = torch.stack([one[name] for one in alone]).mean(dim=0)
        torch.testing.assert_close(output[name], expected)
    assert all(torch.equal(output.view_indices, one.view_indices) for one in alone)
    assert np.ptp(z, axis=0).min() > 1e-3  # the heads differ from the first step on


def test_the_loss_is_the_mean_of_the_heads_and_each_learns_at_a_kth_of_it():
    model = learner(0, LossConfig(roadwork=1.0), heads=K, dropout=0.0, experts=2).train()
    batch = with_masks(photos(6, seed=1))
    output = model(batch, with_loss=True, keep_all=True)
    output.loss.backward()
    pruner = dict.fromkeys((name for name, _ in model.encoder.named_parameters()), 0.0)
    for number in range(K):
        alone = learner(0, model.loss_config, dropout=0.0, experts=2).train()
        prefix = f"head.members.{number}."
        weights = {name.replace(prefix, "head."): value for name, value in model.state_dict().items()}
        alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
        theirs = alone(batch, with_loss=True, keep_all=True)
        theirs.loss.backward()
        for term, values in output.loss_terms.items():
            own = torch.stack([torch.zeros_like(values), theirs.loss_terms[term]])
            output.loss_terms[term] = values - own.sum(dim=0) / K
        own = dict(model.head.members[number].named_parameters())
        for name, parameter in alone.head.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(own[name].grad, parameter.grad / K, rtol=1e-4, atol=1e-7)
        for name, parameter in alone.encoder.named_parameters():
            pruner[name] = pruner[name] + parameter.grad / K
    for left in output.loss_terms.values():
        assert left.abs().max() < 1e-5
    for name, parameter in model.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, pruner[name], rtol=1e-4, atol=1e-7)


def test_heads_start_from_different_weights_and_a_seed_gives_them_all():
    first, second, again = (dict(learner(seed, heads=2).named_parameters()) for seed in (0, 1, 0))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, weight in first.items():
        other = first.get(name.replace("members.0", "members.1"))
        if ".members.0." in name and weight.dim() > 1:
            assert not torch.equal(weight, other), name
            assert not torch.equal(weight, second[name]), name


def test_one_head_has_the_weights_and_names_of_a_model_without_an_ensemble():
    names = {name for name, _ in learner(0, heads=1).named_parameters()}
    assert "head.view_vector.weight" in names
    assert not any("members" in name for name in names)


@pytest.mark.parametrize("head", ["roadwork", "mean_pool", "cell_mil"])
@torch.no_grad()
def test_an_ensemble_is_saved_and_restored(backbone, tmp_path, head):
    torch.manual_seed(0)
    model = RoadworkModel.build(small_config(backbone, head=head), None, heads=2).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ensemble"] == 2
    again, batch = RoadworkModel.from_pretrained(tmp_path), {**random_photos(), **METADATA}
    assert torch.equal(again(batch).logits, model(batch).logits)
    assert len(again(batch).members) == 2


# Merging


def trained(backbone, seed, heads=1, **sizes):
    torch.manual_seed(seed)
    return RoadworkModel.build(small_config(backbone, **sizes), None, heads=heads).eval()


@torch.no_grad()
def test_merged_models_answer_with_the_mean_over_all_their_heads(backbone):
    models = [trained(backbone, 1, heads=2, pruning="off"), trained(backbone, 2, pruning="off")]
    merged, batch = RoadworkModel.merge(models), {**random_photos(), **METADATA}
    gates = [model.encode(batch).gates for model in models]
    assert not torch.allclose(*gates)
    # Pruned by their own scores, the heads' gates differ from those of the mean score: compare at gates of one.
    for model in (merged, *models):
        silence(model)
    output = merged(batch)
    z = [model.log_odds(one) for model in models for one in (model(batch).members or (model(batch),))]
    assert len(z) == len(output.members) == merged.config.ensemble == 3
    torch.testing.assert_close(merged.log_odds(output), torch.stack(z).mean(dim=0), rtol=1e-4, atol=1e-5)


def silence(model):
    """Let the pruner's gates all be one."""
    gather = model.encoder.gather
    model.encoder.gather = lambda *given: _with_open_gates(gather(*given))


def _with_open_gates(encoded):
    encoded.gates = torch.ones_like(encoded.gates)
    return encoded


@torch.no_grad()
def test_merged_models_keep_views_by_the_mean_of_their_scores(backbone):
    models = [trained(backbone, seed) for seed in (1, 2, 3)]
    batch = random_photos()
    scores = [model(batch).view_scores for model in models]
    merged = RoadworkModel.merge([RoadworkModel.merge(models[:2]), models[2]])
    output = merged(batch)
    mean = torch.stack(scores).mean(dim=0)
    torch.testing.assert_close(output.view_scores, mean)
    best = mean[:, 1:].topk(3).indices.sort(dim=1).values + 1
    assert output.view_indices[:, 1:].tolist() == best.tolist()
    assert any(one(batch).view_indices.tolist() != output.view_indices.tolist() for one in models)


@torch.no_grad()
def test_a_merged_model_is_saved_and_restored_without_the_cut_of_its_first_part(backbone, tmp_path):
    models = [make_model(backbone, pruning="dynamic"), trained(backbone, 2, pruning="dynamic")]
    models[0].config.decision_bias, models[0].config.decision_slope = 1.5, 3.0
    models[0].config.stopping = {"cut": 0.0, "margins_none": [1.0] * 3, "margins_roadwork": [1.0] * 3}
    merged = RoadworkModel.merge(models)
    assert (merged.config.decision_bias, merged.config.decision_slope, merged.config.stopping) == (0.0, 1.0, None)
    merged.save_pretrained(tmp_path)
    again, batch = RoadworkModel.from_pretrained(tmp_path), random_photos()
    assert (again.config.ensemble, again.config.pruners) == (2, 2)
    assert torch.equal(again(batch).logits, merged(batch).logits)
    assert not merged.training


@torch.no_grad()
def test_baselines_and_old_models_merge_too(backbone):
    batch = random_photos()
    models = [trained(backbone, seed, head="mean_pool") for seed in (1, 2)]
    merged = RoadworkModel.merge(models)
    z = torch.stack([model.log_odds(model(batch)) for model in models]).mean(dim=0)
    torch.testing.assert_close(merged.log_odds(merged(batch)), z)
    only = RoadworkModel.merge(models[:1])
    assert torch.equal(only(batch).logits, models[0](batch).logits)
