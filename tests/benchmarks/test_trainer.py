"""The arms of the trainer benchmark take the same steps on the same photos."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import trainer_arms
from benchmarks.trainer import Plan, prepare
from pipeline.config import read_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("trainer")
    prepare(Plan(images=32, steps=1, rounds=1, starts=1), place, seed=0)
    return place


def test_the_plain_loop_and_that_of_transformers_take_steps_of_the_whole_batch(folder):
    """Counted at the optimizer, and in the photos that the head sees."""
    config = read_config(folder / "recipe.yaml")
    for arm in ("plain", "hugging_face"):
        work = trainer_arms.ARMS[arm](config, folder / arm)
        seen, steps = [], []
        head = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(1) if type(module).__name__ == "RoadworkModel" else None
        )
        step = register_optimizer_step_post_hook(lambda *args, steps=steps: steps.append(1))
        work(2)
        head.remove()
        step.remove()
        assert (len(seen), len(steps)) == (4, 2), arm  # two micro-batches of 16 for each step
