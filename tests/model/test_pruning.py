import pytest
import torch
from scipy import stats

from pipeline.errors import UserError
from pipeline.model.config import ModelConfig
from pipeline.model.pruning import ViewPruner, choose_views, draw_keep, rank_views, rounds_up_to
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


def test_fixed_views_are_the_same_for_every_photo_whatever_the_scores():
    kept = choose_views(torch.randn(20, 12), all_views(20), 4, "fixed", explore=True, fixed_views=(9, 2, 5, 1))
    assert kept.tolist() == [[0, 2, 5, 9]] * 20


def test_a_fixed_view_that_a_photo_lacks_gives_way_to_the_next():
    mask = all_views(1)
    mask[0, 9] = False
    kept = choose_views(torch.zeros(1, 12), mask, 4, "fixed", explore=False, fixed_views=(9, 2, 5, 1))
    assert kept.tolist() == [[0, 1, 2, 5]]


@pytest.mark.parametrize("views", [(0, 1, 2), (1, 1, 2), (12, 1, 2), (1,)])
def test_fixed_views_that_make_no_sense_are_refused(views):
    with pytest.raises(UserError, match=r"model\.fixed_views"):
        ModelConfig(pruning="fixed", keep_views=4, fixed_views=views)


def test_views_are_ranked_by_score_after_the_global_one_and_before_those_that_do_not_exist():
    mask = all_views(1, 5)
    mask[0, 3] = False
    assert rank_views(torch.tensor([[-9.0, 1, 3, 9, 2]]), mask, "scored", explore=False).tolist() == [[0, 2, 4, 1, 3]]


def test_rounds_end_with_the_most_views_that_are_kept():
    assert rounds_up_to(12) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
    assert rounds_up_to(8) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert rounds_up_to(9) == (1, 2, 3, 4, 5, 6, 7, 8, 9)


def test_training_draws_every_round_alike():
    torch.manual_seed(0)
    drawn = torch.tensor([draw_keep(4) for _ in range(4000)])
    assert stats.chisquare(drawn.bincount()[1:]).pvalue > 0.01
