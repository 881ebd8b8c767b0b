"""The arms of the trainer benchmark take the same steps on the same photos."""

import shutil

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import trainer_arms
from benchmarks.trainer import Plan, prepare
from benchmarks.trainer_revision import Revision
from pipeline.config import ROOT, find_recipe, read_config
from pipeline.errors import UserError

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


def test_the_head_of_another_revision_trains_in_a_python_of_its_own(tmp_path):
    """Here that revision is a copy of this one, whose recipe has other sizes."""
    project = tmp_path / "revision"
    for folder in ("benchmarks", "data_prep", "ds_configs", "accelerate_configs", "pipeline"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    recipe = project / "pipeline" / "recipes" / "demo.yaml"
    recipe.write_text(recipe.read_text().replace("width: 128", "width: 64"))
    place = tmp_path / "place"
    place.mkdir()
    other = Revision(project, place, images=32, seed=0)
    sizes = read_config(other.data / "recipe.yaml").model
    assert sizes == read_config(find_recipe("demo")).model
    (rate,) = other.rates(steps=1, rounds=1)
    assert rate > 0
    with pytest.raises(UserError, match=r"--against .*: no revision of this project"):
        Revision(tmp_path, place, images=32, seed=0)
