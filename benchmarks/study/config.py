"""A study's recipe: which scenes are drawn, which arms are trained on them, how often and how long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.scenes.data_set import scenes
from pipeline.cli import Parser
from pipeline.errors import UserError, require
from pipeline.model.config import LossConfig, ModelConfig
from pipeline.names import NUM_VIEWS
from pipeline.optim.config import OptimConfig

RECIPES = Path(__file__).parent / "recipes"
QUICK_SCENES = {"images": 240, "size": "640x480"}
QUICK_PLAN: dict[str, Any] = {"seeds": 2, "folds": 2, "steps": 10, "validations": 2}
QUICK_ARMS = ("heads", "uniform", "gps_permuted")


@dataclass
class PlanConfig:
    """The plan of the trainings. All values are the same for every arm, except `head_lrs`."""

    arms: list[str] = field(default_factory=lambda: ["all"])
    """Names of arms, of their groups, or `all`; `complete`, which the others stand against, is always among them."""
    seeds: int = 3
    """Trainings of each arm in each fold: weights, order of photos and dropout differ."""
    parts: int = 4
    """Parts that the places are divided into: one tests, one validates, the others train."""
    folds: int = 2
    """How many of the parts test in turn."""
    steps: int = 300
    """Optimizer steps of one training."""
    batch_size: int = 32
    """Photos of a step."""
    lrs: list[float] = field(default_factory=lambda: [1e-3, 3e-3])
    """Peak learning rates that every arm tries in every fold with the first seed; the best on validation trains all."""
    head_lrs: list[float] = field(default_factory=list)
    """Peak learning rates that the simpler heads try, which cost little; empty means `lrs`."""
    epoch_share: float = 0.8
    """Share of the training photos that an epoch draws; see `data.epoch_share`."""
    temper: float = 0.5
    """How far GPS weights even out the clusters, from 0 to 1; see `data_prep shard --temper`."""
    distil_every: int = 4
    """See `train.distil_every`."""
    validations: int = 10
    """Number of times that the validation loss is measured during a training, evenly spread."""
    asks_views: bool = False
    """Ask `complete` for its answers from fewer views as well, see `benchmarks.pruning`."""

    def __post_init__(self) -> None:
        for key in ("seeds", "steps", "batch_size", "validations", "folds"):
            require(getattr(self, key) >= 1, f"plan.{key}", getattr(self, key), "1 or more")
        require(self.parts >= 3, "plan.parts", self.parts, "3 or more: for training, validation and test")
        require(self.folds <= self.parts, "plan.folds", self.folds, f"at most the {self.parts} parts (plan.parts)")
        require(self.validations <= self.steps, "plan.validations", self.validations, f"at most {self.steps} (steps)")
        require(bool(self.lrs), "plan.lrs", self.lrs, "one or more rates")
        for key, lrs in (("lrs", self.lrs), ("head_lrs", self.head_lrs)):
            require(min(lrs, default=1) > 0, f"plan.{key}", lrs, "rates above 0")
            require(len(set(lrs)) == len(lrs), f"plan.{key}", lrs, "different rates")
        require(0 < self.epoch_share <= 1, "plan.epoch_share", self.epoch_share, "in (0, 1]")
        require(0 <= self.temper <= 1, "plan.temper", self.temper, "in [0, 1]")
        require(self.distil_every >= 0, "plan.distil_every", self.distil_every, "0 or more")


@dataclass(frozen=True)
class StudyConfig:
    """The content of a recipe."""

    name: str
    scenes: dict[str, Any]
    """Arguments of `python -m data_prep scenes`, for a study without photos of its own."""
    plan: PlanConfig
    model: ModelConfig
    """The model of the arm `complete`; other arms change it."""
    loss: LossConfig
    optim: OptimConfig
    """The optimizer without `lr`, which is one of `plan.lrs`."""

    def without(self, leaks: Iterable[str]) -> StudyConfig:
        """This recipe without the given metadata fields, which give the label away."""
        left = tuple(name for name in self.model.metadata if name not in leaks)
        return replace(self, model=replace(self.model, metadata=left))

    def quick(self, arms: Sequence[str] = QUICK_ARMS) -> StudyConfig:
        """This recipe, so small that it ends in two minutes on two cores and its figures say nothing."""
        plan = replace(self.plan, arms=list(arms), lrs=self.plan.lrs[:1], head_lrs=self.plan.head_lrs[:1], **QUICK_PLAN)
        return replace(self, plan=plan, scenes={**self.scenes, **QUICK_SCENES})


def read_recipe(name: str) -> StudyConfig:
    """Read a recipe by its name in `benchmarks/study/recipes`, or from a YAML file.

    Raises:
        UserError: There is no such recipe, or a key or value in it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise UserError(f"no study recipe {name!r}; there are {known}, or name a YAML file that exists")
    parser = Parser(prog="study")
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(scenes, "scenes", skip={"out", "format", "workers"}, as_positional=False)
    rooms = {"plan": PlanConfig, "model": ModelConfig, "loss": LossConfig, "optim": OptimConfig}
    for room, kind in rooms.items():
        parser.add_class_arguments(kind, room)
    values: Any = parser.instantiate(parser.parse_args(["--config", str(path)]))
    model, optim = values.model, values.optim
    require("text" not in model.metadata, "model.metadata", model.metadata, "without text in a study")
    usual, given = (optim.name, optim.lr) == ("adamw", OptimConfig().lr), f"{optim.name} with lr {optim.lr:g}"
    require(usual, "optim", given, "without name and lr: optimizers are arms, and plan.lrs has the rates")
    answered = not values.plan.asks_views or model.keep_views == NUM_VIEWS
    wanted = f"{NUM_VIEWS} with plan.asks_views, which asks after all of them"
    require(answered, "model.keep_views", model.keep_views, wanted)
    require(model.head == "roadwork", "model.head", model.head, "roadwork: other heads are arms")
    return StudyConfig(path.stem, dict(values.scenes), **{room: values[room] for room in rooms})
