"""The whole configuration of a run: one tree of dataclasses; recipes in YAML state only what differs."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import yaml

from pipeline.cli import Parser, underscored, unknown_option
from pipeline.errors import UserError, above, at_least, check_fields, in_checkout, in_range, one_of, require
from pipeline.model.config import DECODE_SCALES, InputSpec, LossConfig, ModelConfig
from pipeline.optim.config import OptimConfig
from pipeline.parsing.typed_json import Malformed, to_type
from pipeline.parsing.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "pipeline" / "recipes"
# Folder of accelerate_configs and ds_configs; a wheel has them in the package, since others share site-packages.
CONFIGURATIONS = ROOT if in_checkout() else ROOT / "pipeline"
ACCELERATE_CONFIGS = CONFIGURATIONS / "accelerate_configs"
SAMPLING = ("weighted", "uniform")
PRECISIONS = ("auto", "bf16", "fp32")
PLACES = ("disk", "host", "device")
USUAL_WORKERS = 4
MOST_WORKERS = 1024
WINDOW = re.compile(r"[0-9]{1,12}:[0-9]{1,12}")
# Keys that a resumed run may change: none of them changes what is computed, but for the random draws of a step, which
# follow the processes and their micro-batches.
FREE_KEYS = {
    "train": {
        "run", "log_every", "wandb", "micro_batch_size", "expert_parallel", "max_minutes", "max_skips", "max_rollbacks",
        "hang_minutes", "profile",
    },
    "data": {"shards", "workers", "features_in"},
}  # fmt: skip
# Short forms on the command line, at any position.
ALIASES = {
    "--epochs": "--train.epochs",
    "--shards": "--data.shards",
    "--run": "--train.run",
    "--resume": "--checkpoint.resume",
    "--max_minutes": "--train.max_minutes",
    "--profile": "--train.profile",
}


@dataclass
class DataConfig:
    """Shards, and the order in which training sees them."""

    shards: str = "data/shards"
    """Folder with index.json and the tars, or its URL: `s3://`, `gs://`, or any other that fsspec knows."""
    features: str = ""
    """Folder of a feature cache, or its URL: train and validate from the backbone's tokens in it instead of the photos.
    `prep features` makes one; if empty, every step computes its tokens."""
    features_in: str = "disk"
    """Where a step finds the tokens of `data.features`: `disk` reads and checks its rows in `data.workers` processes.
    `host` reads all of them once into memory that the processes of a machine share, `device` into each one's GPU, or
    without one into its memory; neither needs workers then. Batches are the same bits. Not measured on a GPU yet."""
    folds: str = ""
    """A file that `crossval` writes, with the part of each photo: train and validate on parts of a fold instead of the
    shards' own splits."""
    fold: int = 0
    """Number of the fold with `data.folds`: this part is held out, the next one validates, and all others train."""
    decode_scale: str = "full"
    """`half` decodes a JPEG at half its size where that is still as large as the views' canvas: 30 % less time, at a
    quality that `python -m benchmarks.views` measures; `full` decodes every pixel."""
    streaming: bool = False
    """Read the tars from end to end instead of photo by photo: faster from URLs, but the order is less random."""
    shuffle_buffer: int = 128
    """Undecoded samples that each worker holds while streaming, to draw the next one from."""
    sampling: str = "weighted"
    """`weighted` shows each photo in proportion to its weight in the shards, `uniform` all equally often."""
    epoch_share: float = 0.8
    """Samples of one epoch, as a share of the photos of the training split."""
    max_repeats: int = 4
    """The most often that an epoch shows one photo. What this takes from the heaviest photos goes to the others."""
    augment_share: float = 0.0
    """Share of training samples that are a mild copy of the photo: a part of it, perhaps mirrored, in another light."""
    streetvision_share: float = 0.0
    """Share of training samples in the older form of the NATIX challenge, which stopped sending work in May 2026:
    224 px, at one of four levels of degradation, without metadata."""
    allow_leaks: bool = False
    """Train on metadata fields even if they leak the label according to the shards' index."""
    workers: int | None = None
    """Processes per rank that read, decode and cut views; 0 does it in the training process. By default 4 on a CPU, and
    where a GPU computes one for each core but one, up to 16."""

    def __post_init__(self) -> None:
        share = in_range("[0, 1]")
        check_fields(
            "data", self, fold=at_least(0), decode_scale=one_of(DECODE_SCALES), shuffle_buffer=at_least(1),
            sampling=one_of(SAMPLING), epoch_share=in_range("(0, 1]"), max_repeats=at_least(1), augment_share=share,
            streetvision_share=share, features_in=one_of(PLACES),
        )  # fmt: skip
        fits = self.workers is None or 0 <= self.workers <= MOST_WORKERS
        require(fits, "data.workers", self.workers, f"0 or more, and at most {MOST_WORKERS}")
        held = self.features_in != "disk" and not self.features
        require(not held, "data.features_in", self.features_in, "disk without data.features")
        require(not self.fold or bool(self.folds), "data.fold", self.fold, "0 without data.folds")
        both = self.augment_share + self.streetvision_share
        require(both <= 1, "data.streetvision_share", self.streetvision_share, "at most 1 - data.augment_share")
        streams = self.features and self.streaming
        require(not streams, "data.streaming", self.streaming, "false with data.features, which needs no photos")
        streams = self.folds and self.streaming
        require(not streams, "data.streaming", self.streaming, "false with data.folds, which takes a part of each tar")


@dataclass
class TrainConfig:
    """The training loop."""

    run: str = "runs/train"
    """Run folder. If it holds an unfinished run of the same configuration, that run resumes."""
    epochs: int = 30
    """Epochs to train; `data.epoch_share` says how many samples one has."""
    batch_size: int = 64
    """Samples per optimizer step, over all processes. Without `data.streaming` the world size does not change which
    samples a step has; it changes the speed, and the random draws of dropout (of metadata, too), mixup and
    exploration."""
    micro_batch_size: int = 16
    """Largest number of samples of one process in one forward pass; accumulation follows from it."""
    expert_parallel: int = 1
    """Processes that share the experts of a layer; 1 gives every process all of them, as does a run of one process."""
    grouped_mm: bool = False
    """Multiply by the weights of all experts of a layer in one call (`torch.nn.functional.grouped_mm`) where a process
    has them whole, so that the host never waits for their numbers of tokens. Estimates of sophia_h do without. Not
    measured on a GPU yet."""
    heads: int = 1
    """Heads that are trained at once on the same backbone, photos and kept views. They answer with the mean of their
    log-odds; each costs as much as a head costs alone, which is little beside the backbone."""
    precision: str = "auto"
    """`bf16`, `fp32`, or `auto`: bf16 where a GPU computes in it."""
    deterministic: bool = False
    """Take kernels that add in a fixed order where a GPU has such, so that the same run gives the same bits; slower.
    What has none is named in a warning. Not measured on a GPU yet; a CPU's are fixed anyway."""
    seed: int = 0
    """Seed of the weights, the order of samples, dropout and exploration."""
    log_every: int = 10
    """Optimizer steps between log lines."""
    validations_per_epoch: int = 1
    """Validations per epoch, evenly spread; the last step always has one."""
    patience: int = 8
    """Validations without a lower loss before the run ends early; 0 never ends it early."""
    ema_decay: float = 0.9999
    """Largest decay of the weight average that is validated and exported; 0 uses the weights themselves."""
    distil_every: int = 4
    """Every n-th step keeps all views, so that fusion's importance teaches the pruner; 0 never does."""
    wandb: bool = True
    """Log to Weights & Biases: online with a key, offline in the run folder without one."""
    max_minutes: float = 0.0
    """Minutes from the launcher's start after which the run saves and ends with status 75; 0 is no limit."""
    max_skips: int = 5
    """Skipped steps in a row, whose loss or gradient was not finite, before the run rolls back to its last
    checkpoint."""
    max_rollbacks: int = 3
    """Roll-backs in all before the run gives up."""
    hang_minutes: float = 30.0
    """Minutes without progress after which a process writes its stacks and ends with status 1."""
    profile: str = ""
    """Steps to trace with torch's profiler, as FIRST:LAST; if empty, none."""

    def __post_init__(self) -> None:
        positive, counted = at_least(1), at_least(0)
        check_fields(
            "train", self, epochs=positive, batch_size=at_least(1, 1e6), micro_batch_size=at_least(1, 1e6),
            expert_parallel=positive, heads=at_least(1, 1024), precision=one_of(PRECISIONS),
            seed=at_least(0, 2**32 - 1), log_every=positive,
            validations_per_epoch=positive, patience=counted, ema_decay=in_range("[0, 1)"), distil_every=counted,
            max_minutes=counted, max_skips=positive, max_rollbacks=counted, hang_minutes=above(0),
        )  # fmt: skip
        own = Path(self.run).name not in ("", "..") and "\0" not in self.run
        require(own, "train.run", self.run, "a folder of the run's own, such as runs/first")
        if self.profile:
            profile_window(self.profile)


def profile_window(text: str) -> tuple[int, int]:
    """Read a window of steps: `10:13` becomes its first and last step.

    Raises:
        UserError: The text is no window.
    """
    first, _, last = text.partition(":")
    if not (WINDOW.fullmatch(text) and 1 <= int(first) <= int(last)):
        raise UserError(f"train.profile is {text!r}, but must be FIRST:LAST, two step numbers from 1 on, such as 10:13")
    return int(first), int(last)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, which ones stay, and where copies go. No key here changes what is computed."""

    every_steps: int = 0
    """Optimizer steps between checkpoints; 0 leaves them to the clock and the validations."""
    every_minutes: float = 10.0
    """Minutes between checkpoints; 0 turns the clock off."""
    keep: int = 2
    """Latest checkpoints kept, besides the one with the best validation."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none for good."""
    sync: str = ""
    """URL to which finished checkpoints are copied in the background: `s3://`, `gs://`, `file://`, or any other that
    fsspec knows. If it has a newer checkpoint than the run folder, the run resumes from that. Empty copies nothing."""
    sync_wait_s: float = 60.0
    """Seconds that the end of a run, or a stop, waits for the last copy."""
    resume: str = ""
    """URL to fetch the newest valid checkpoint from, if it is newer than the run folder's; empty means `sync`."""

    def __post_init__(self) -> None:
        counted = at_least(0)
        check_fields(
            "checkpoint", self, every_steps=counted, every_minutes=counted, keep=at_least(1), keep_every=counted,
            sync_wait_s=counted,
        )  # fmt: skip
        for key in ("sync", "resume"):
            require_plain_url(f"checkpoint.{key}", getattr(self, key))


def require_plain_url(key: str, value: str) -> None:
    """Refuse a value that is no URL, or a URL with a secret in it: the configuration is written to many files."""
    try:
        parts = urlsplit(value)
    except ValueError as error:
        raise UserError(f"{key} is {value!r}, which is no URL ({error})") from error
    if parts.password is not None or parts.query:
        raise UserError(f"{key} has a password or a signature in it; leave credentials to the driver's environment")
    is_url = bool(parts.scheme) and "://" in value
    require(is_url or not value, key, value, "a URL such as s3://bucket/folder, or empty")


@dataclass
class Config:
    """The complete configuration of a run."""

    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def input_spec(self) -> InputSpec:
        """How photos become the model's input."""
        return self.model.input_spec(self.data.decode_scale)


# Each section's keys with their types.
ROOMS: dict[str, dict[str, Any]] = {room.name: get_type_hints(room.default_factory) for room in fields(Config)}


def parse_config(arguments: list[str], prog: str) -> tuple[Config, bool]:
    """Read a command line: `--config FILE` first, whatever its position, then the overrides in their order.

    Returns:
        The configuration, and whether `--dry-run` was given.

    Raises:
        UserError: A key is unknown, a value is out of its range, or a file cannot be read.
    """
    parser = _parser(f"{prog} [--config RECIPE.yaml] [--epochs N] [--dry-run] [--section.key VALUE ...]")
    files, words = config_first(arguments)
    for word in words:
        if word.partition("=")[0].removeprefix("--") in ROOMS:
            raise UserError(f"{word.partition('=')[0]} needs a key, such as --train.epochs; --config names a file")
    recipes: dict[str, dict[str, Any]] = {}
    for file in files:
        for room, keys in _read_rooms(Path(file), parser).items():
            recipes[room] = recipes.get(room, {}) | keys
    values: Any = parser.parse_args(words, namespace=parser.parse_object(recipes))
    for room, types in ROOMS.items():
        for key, kind in types.items():
            _check_type(f"{room}.{key}", values[room][key], kind)
    values = parser.instantiate(values)
    return Config(**{room.name: values[room.name] for room in fields(Config)}), bool(values.dry_run)


def print_help(prog: str) -> None:
    """Print every configuration key with its meaning and default."""
    print(_parser(f"{prog} [--epochs N] [--dry-run] [--section.key VALUE ...]").format_help())


def _parser(usage: str) -> Parser:
    parser = Parser(usage=usage, description="Train a roadwork classifier.")
    parser.add_argument("--config", metavar="FILE", help="A recipe: YAML that states what differs from the defaults.")
    parser.add_argument("--dry_run", action="store_true", help="Print the plan, take two steps, write nothing.")
    parser.epilog = "Short forms: " + ", ".join(f"{short} for {long}" for short, long in ALIASES.items())
    for room in fields(Config):
        parser.add_class_arguments(room.default_factory, room.name)
    return parser


def config_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Tell the files of `--config FILE` from the other words, which come after them, and replace the short forms."""
    parts = (underscored(argument).partition("=") for argument in arguments)
    words = iter([ALIASES.get(name, name) + equals + value for name, equals, value in parts])
    files: list[str] = []
    rest: list[str] = []
    for word in words:
        if word == "--config" or word.startswith("--config="):
            files.append(word.removeprefix("--config").removeprefix("=") or next(words, ""))
        else:
            rest.append(word)
    return files, rest


def _read_rooms(path: Path, parser: Parser) -> dict[str, dict[str, Any]]:
    """The sections of a recipe, each value of its key's type.

    Raises:
        UserError: A section or key is unknown, or a value has another type; the message says which.
    """
    rooms = read_yaml(path)
    for room, values in rooms.items():
        if room not in ROOMS:
            raise UserError(f"{path}: {unknown_option(room, list(ROOMS))}")
        if not isinstance(values, dict):
            raise UserError(f"{path}: {room} has no keys with values; write `{room}:` with them below, or leave it out")
        for key, value in values.items():
            if key not in ROOMS[room]:
                raise UserError(f"{path}: {unknown_option(f'{room}.{key}', parser.names)}")
            _check_type(f"{path}: {room}.{key}", value, ROOMS[room][key])
    return rooms


def _check_type(name: str, value: object, kind: Any) -> None:
    try:
        to_type(value, kind)
    except Malformed as error:
        reason = str(error)
        raise UserError(f"{name}: {reason[0].lower()}{reason[1:]}") from error


def read_config(path: Path) -> Config:
    """Read a complete or partial configuration from YAML, such as a run's `config.yaml`.

    Raises:
        UserError: The file cannot be read, or has a key or value that is refused.
    """
    if not path.exists():
        raise UserError(f"no configuration at {path}; name a run folder or a recipe that exists")
    return parse_config(["--config", os.fspath(path)], "config")[0]


def to_yaml(config: Config) -> str:
    """The configuration as YAML: every key with its value, in the order of the dataclasses."""
    values = asdict(config)
    values["model"]["metadata"] = list(values["model"]["metadata"])
    return yaml.safe_dump(values, sort_keys=False)


def find_recipe(name: str | None) -> Path:
    """The path of a recipe that is given by name or path."""
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name is None:
        raise UserError(f"train needs a recipe: one of {', '.join(known)}, or a YAML file")
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no recipe {name!r}; there are {', '.join(known)}, or name a YAML file")
    return path


def find_configuration(path: Path) -> Path:
    """The path of a configuration for accelerate or DeepSpeed, such as `ds_configs/zero2.json`.

    A relative path is looked up from the working directory first, then among the project's own.
    """
    own = CONFIGURATIONS / path
    return own if own.exists() and not path.exists() else path


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys that matter and differ, as `train.epochs=3 (now 5)`.

    Args:
        before: Sections of a configuration; keys that an older version did not know had their defaults.
        now: Sections of a configuration.
    """
    before, now = _complete(before), _complete(now)
    return [
        f"{room}.{key}={before[room][key]} (now {value})"
        for room, values in now.items()
        for key, value in values.items()
        if room != "checkpoint" and key not in FREE_KEYS.get(room, ()) and before[room][key] != value
    ]


def _complete(rooms: dict[str, Any]) -> dict[str, Any]:
    """Every key with its value as JSON has it: absent ones by default, and the optimizer's rates filled in."""
    rooms, defaults = (json.loads(json.dumps(values)) for values in (rooms, asdict(Config())))
    found = {
        room: {key: rooms.get(room, {}).get(key, default) for key, default in keys.items()}
        for room, keys in defaults.items()
    }
    optim = OptimConfig(**found["optim"])
    found["optim"] |= {"beta1": optim.betas[0], "beta2": optim.betas[1], "eps": optim.epsilon}
    return found
