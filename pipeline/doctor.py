"""Look at the machine, the installation, the configurations and the data before anything runs."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from pipeline.cli import command
from pipeline.config import Config, read_config
from pipeline.data.dataset import ShardDataset
from pipeline.data.index import Index, read_index
from pipeline.data.inputs import check_inputs, fields_read, leaking_inputs
from pipeline.data.photo import simplejpeg
from pipeline.data.storage import is_url
from pipeline.distributed.startup import read_ds_config
from pipeline.errors import AuditFailed, UserError
from pipeline.files import write_summary
from pipeline.launcher import ACCELERATE_CONFIGS, RECIPES, ROOT, find_recipe
from pipeline.model.backbone import SCENES_TINY
from pipeline.plan import describe_schedule, plan_batches, plan_schedule

GOOD, NOTE, BAD = "good", "note", "bad"
COLOURS = {GOOD: "green", NOTE: "yellow", BAD: "red"}
SMALL_DISK_GB = 5


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    verdict: str
    """good, note (works, but look) or bad (will fail)."""
    about: str
    text: str


def doctor(recipe: str = "demo", shards: str | None = None, out: Path | None = None) -> Path:
    """Check machine, installation, configurations and data, and say what a recipe would do here.

    Args:
        recipe: A name in pipeline/recipes, or a YAML file.
        shards: Folder of shards, or its URL; by default the recipe's.
        out: Folder for summary.json; by default a temporary one.

    Raises:
        AuditFailed: Something would fail; the table says what.
    """
    config = read_config(find_recipe(recipe))
    if shards is not None:
        config.data.shards = str(shards)
    findings = [*machine(), *installation(), *configurations(), *backbone(config), *data(config), *plan(config)]
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        colour = COLOURS[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/]", finding.about, finding.text)
    Console(stderr=True, width=None if os.isatty(2) else 160).print(table)
    folder = out or Path(tempfile.mkdtemp(prefix="roadwork-doctor-"))
    summary = write_summary(folder, {"recipe": recipe, "findings": [vars(finding) for finding in findings]})
    wrong = [finding.about for finding in findings if finding.verdict == BAD]
    if wrong:
        raise AuditFailed(f"{len(wrong)} of {len(findings)} checks failed: {', '.join(wrong)}", summary)
    return summary


def machine() -> Iterator[Finding]:
    """Cores, memory, GPUs, disk."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    yield Finding(
        GOOD, "machine", f"{cores} cores, {memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"
    )
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield Finding(GOOD, "gpu", f"{card.name}, {card.total_memory / 2**30:.0f} GiB")
    else:
        yield Finding(
            NOTE, "gpu", "none: training runs on the CPU over gloo; enough for scenes-tiny, not for ViT-H/16+"
        )
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding(GOOD if free_gb > SMALL_DISK_GB else NOTE, "disk", f"{free_gb:.0f} GB free in {Path.cwd()}")


def installation() -> Iterator[Finding]:
    """Python, and every dependency against what pyproject.toml asks for."""
    yield Finding(GOOD, "python", platform.python_version())
    wrong = []
    for line in requires("roadwork") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
    text = "; ".join(wrong) or f"complete (torch {torch.__version__}, deepspeed {version('deepspeed')})"
    yield Finding(BAD if wrong else GOOD, "packages", text + ("; ./launch.sh setup installs them" if wrong else ""))
    if simplejpeg is None:
        yield Finding(NOTE, "jpeg", "simplejpeg is missing: Pillow decodes, at about half the speed")


def configurations() -> Iterator[Finding]:
    """Every file in accelerate_configs, ds_configs and recipes."""
    problems = []
    for path in sorted(ACCELERATE_CONFIGS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        try:
            read_ds_config(ROOT / settings["deepspeed_config"]["deepspeed_config_file"])
        except (UserError, KeyError) as error:
            problems.append(f"{path.name}: {error}")
    recipes = sorted(RECIPES.glob("*.yaml"))
    for path in recipes:
        try:
            read_config(path)
        except UserError as error:
            problems.append(f"{path.name}: {error}")
    yield Finding(
        BAD if problems else GOOD,
        "configs",
        "; ".join(problems) or f"all load; recipes: {', '.join(p.stem for p in recipes)}",
    )


def backbone(config: Config) -> Iterator[Finding]:
    """Whether the recipe's weights are at hand, without loading or fetching them."""
    name = config.model.backbone
    folder = SCENES_TINY if name == "scenes-tiny" else Path(name)
    if (folder / "config.json").is_file():
        yield Finding(GOOD, "backbone", f"{name}: weights in {folder}")
    elif isinstance(try_to_load_from_cache(name, "config.json"), str):
        yield Finding(GOOD, "backbone", f"{name}: weights in the hub cache")
    else:
        yield Finding(
            NOTE, "backbone",
            f"{name}: not on this machine; it is fetched at the start, which for gated weights needs their licence "
            "accepted and `hf auth login`",
        )  # fmt: skip


def data(config: Config) -> Iterator[Finding]:
    """The index, and one sample of each split through decoding and views."""
    folder = config.data.shards
    if not is_url(folder) and not Path(folder).exists():
        yield Finding(NOTE, "data", f"no shards at {folder} yet; `./launch.sh prep shard` makes them from photos")
        return
    try:
        index = read_index(folder)
        for name, split in index.splits.items():
            if split.samples:
                sizes = config.model.view_side, config.model.num_views, config.model.mask_side
                _ = ShardDataset(folder, index, name, *sizes)[0]
    except UserError as error:
        yield Finding(BAD, "data", str(error))
        return
    counts = ", ".join(f"{name} {len(split.samples)}" for name, split in index.splits.items())
    yield Finding(GOOD, "data", f"{folder}: {counts}; a sample of each split decodes")
    yield inputs(config, index)


def inputs(config: Config, index: Index) -> Finding:
    """Whether the shards have the metadata that the model reads, and whether it leaks the label."""
    try:
        check_inputs(index, config.model, config.data.allow_leaks)
    except UserError as error:
        return Finding(BAD, "metadata", str(error))
    leaks = leaking_inputs(index, config.model)
    named = [f"{name} (leaks the label)" if name in leaks else name for name in fields_read(config.model)]
    return Finding(NOTE if leaks else GOOD, "metadata", f"the model reads {', '.join(named) or 'none'}")


def plan(config: Config) -> Iterator[Finding]:
    """What `./launch.sh train` would do with the recipe."""
    world_size = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    try:
        batching = plan_batches(config.train, world_size)
        samples = len(read_index(config.data.shards).split("train").samples)
    except UserError:
        return  # said above
    for line in describe_schedule(config, batching, plan_schedule(config, samples), world_size):
        about, text = line.split(maxsplit=1)
        yield Finding(GOOD, about, text)


if __name__ == "__main__":
    raise SystemExit(command(doctor))
