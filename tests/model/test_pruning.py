import pytest
import torch
from scipy import stats

from pipeline.model.pruning import ViewPruner, choose_views
from tests.model.reference import silu


def all_views(batch, views=12):
    return torch.ones(batch, views, dtype=torch.bool)


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def test_score_is_a_perceptron_on_region_cls_and_view_embedding():
    torch.manual_seed(0)
    pruner = ViewPruner(dim=10, views=5).double()
    for norm in (pruner.region_norm, pruner.cls_norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    regions, cls = torch.randn(2, 5, 10).double(), torch.randn(2, 10).double()
    scores = pruner(regions, cls)
    assert scores.shape == (2, 5)
    first, last = pruner.mlp[0], pruner.mlp[2]
    for image in range(2):
        for view in range(5):
            parts = [layer_norm(regions[image, view], pruner.region_norm)]
            parts += [layer_norm(cls[image], pruner.cls_norm), pruner.view_embedding.weight[view]]
            hidden = silu(first.weight @ torch.cat(parts) + first.bias)
            torch.testing.assert_close(scores[image, view], last.weight[0] @ hidden + last.bias[0])


def test_gradient_reaches_every_part_of_the_scorer():
    torch.manual_seed(0)
    pruner = ViewPruner(dim=10, views=5)
    pruner(torch.randn(2, 5, 10), torch.randn(2, 10)).sigmoid().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pruner.parameters())


def test_keeps_the_global_view_and_the_best_of_the_others_in_their_own_order():
    scores = torch.tensor([[-9.0, 0.1, 0.9, 0.3, 0.8], [9.0, 5.0, 4.0, 3.0, 2.0]])
    kept = choose_views(scores, all_views(2, 5), keep=3, mode="scored", explore=False)
    assert kept.tolist() == [[0, 2, 4], [0, 1, 2]]


@pytest.mark.parametrize(("mode", "keep"), [("off", 3), ("scored", 5), ("random", 5)])
def test_nothing_is_pruned_when_off_or_when_all_are_kept(mode, keep):
    kept = choose_views(torch.randn(2, 5), all_views(2, 5), keep=keep, mode=mode, explore=True)
    assert kept.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("mode", ["scored", "random"])
def test_views_that_do_not_exist_come_last(mode):
    mask = torch.tensor([[True, False, True, False, True, True]]).expand(50, -1)
    kept = choose_views(torch.tensor([[0.0, 9, 1, 9, 2, 3]]).expand(50, -1), mask, 4, mode, explore=True)
    assert kept.tolist() == [[0, 2, 4, 5]] * 50


def test_without_exploration_the_choice_is_the_same_every_time():
    scores = torch.randn(20, 12)
    choices = [choose_views(scores, all_views(20), 8, "scored", explore=False) for _ in range(2)]
    assert torch.equal(*choices)


def test_exploration_draws_views_in_proportion_to_the_exponential_of_their_score():
    torch.manual_seed(1)
    scores = torch.tensor([0.0, -1.0, 0.5, 1.5])
    draws = 20_000
    kept = choose_views(scores.expand(draws, -1), all_views(draws, 4), 2, "scored", explore=True)
    counts = kept[:, 1].bincount(minlength=4)[1:]
    assert stats.chisquare(counts, draws * scores[1:].double().softmax(0).numpy()).pvalue > 0.01


def test_random_choice_ignores_the_scores():
    torch.manual_seed(2)
    draws = 20_000
    scores = torch.linspace(-5, 5, 12).expand(draws, -1)
    kept = choose_views(scores, all_views(draws), 8, "random", explore=False)
    assert (kept[:, 0] == 0).all()
    assert (kept.diff(dim=1) > 0).all()
    frequency = kept.flatten().bincount(minlength=12)[1:] / draws
    # 7 of 11 are drawn; six standard errors
    torch.testing.assert_close(frequency, torch.full((11,), 7 / 11), rtol=0, atol=6 * 0.0034)
