"""Cached features in memory give the batches that their files give, bit for bit, or one sentence that says why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import islice
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from data_prep.features.options import ModelChoice
from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from pipeline.config import Config, DataConfig, TrainConfig
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_memory import FeatureMemory
from pipeline.data.features import open_cache
from pipeline.data.folds import Folds, deal
from pipeline.data.index import read_index
from pipeline.devices import CPU_ONLY
from pipeline.errors import UserError
from pipeline.training import placement
from pipeline.training.loader import open_loader, place_split
from pipeline.training.validation import Validation
from tests.checkpoints.examples import process_group
from tests.feature_cache import make_cache
from tests.small_run import make_backbone, make_model, small_config
from tests.warm import python

ROOT = Path(__file__).parents[2]
SIDE, CPU = 144, torch.device("cpu")  # a copy of this size has fewer useful views than its photo
MIXTURE = {"augment_share": 0.4, "streetvision_share": 0.3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, some without masks or metadata, and a cache of them with two copies of each training photo."""
    folder = tmp_path_factory.mktemp("world")
    scenes(folder / "scenes", 16, "320x240", seed=3, workers=1)
    table = pd.read_csv(folder / "scenes" / "metadata.csv")
    table.loc[::3, "mask"] = None
    table.to_csv(folder / "scenes" / "metadata.csv", index=False)
    shard(folder / "scenes", folder / "shards", workers=1, val_share=0.25, test_share=0.0, splits="random")
    backbone = make_backbone(folder / "backbone")
    make_cache(folder / "cache", folder / "shards", backbone, copies=2, model=ModelChoice(view_side=SIDE))
    return folder


@pytest.fixture(autouse=True)
def group(tmp_path):
    with process_group(tmp_path / "store"):
        yield


def config_of(world, place, cache=None, head="roadwork", **data):
    data = {"features_in": place, "workers": 0, "epoch_share": 1.0, **MIXTURE, **data}
    return Config(
        data=DataConfig(shards=str(world / "shards"), features=str(cache or world / "cache"), **data),
        train=TrainConfig(batch_size=4),
        model=small_config(str(world / "backbone"), view_side=SIDE, head=head),
    )


def batches(config, number, start=0, rank=0, world_size=1, index=None):
    index = index or read_index(config.data.shards)
    loader = open_loader(config, index, 2, rank, world_size, open_cache(config.data.features, index))
    return list(islice(loader.placed(config, CPU).batches(start), number))


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert (one[name].dtype, one[name].shape) == (value.dtype, value.shape)
            torch.testing.assert_close(one[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("start", [0, 7])
def test_batches_over_epochs_and_from_the_middle_of_one_are_those_from_the_files(world, place, start):
    wanted = batches(config_of(world, "disk"), 24, start)
    assert len({int(mask.sum()) for batch in wanted for mask in batch["view_mask"]}) > 1
    masks = torch.cat([batch["mask_targets"] for batch in wanted]).flatten(1)
    assert {True, False} == {bool(row.isnan().any()) for row in masks}
    assert torch.cat([batch["null_metadata"] for batch in wanted]).unique().tolist() == [False, True]
    assert torch.cat([batch["weather"] for batch in wanted]).isnan().any()
    same(batches(config_of(world, place), 24, start), wanted)


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_baseline_gets_its_one_view_and_a_fold_its_photos_without_copies(world, place):
    index = read_index(world / "shards")
    keys = [sample.key for name in ("train", "val") for sample in index.splits[name].samples]
    # It trains on photos of both splits, and those of `val` have no copies in the cache.
    folds = Folds(index.source_sha256, 3, {key: min(n // 3, 2) for n, key in enumerate(keys)})
    dealt = deal(index, folds, 0)
    for settings, split in ({"head": "single_view"}, None), ({}, dealt):
        disk, memory = (batches(config_of(world, where, **settings), 16, index=split) for where in ("disk", place))
        same(memory, disk)


@pytest.mark.parametrize("place", ["host", "device"])
def test_validation_scores_are_those_from_the_files(world, place):
    model = make_model(str(world / "backbone"), view_side=SIDE)
    index = read_index(world / "shards")
    scores = []
    for config in (config_of(world, "disk"), config_of(world, place)):
        cache = open_cache(config.data.features, index)
        data = open_split(config.data.shards, index, "val", config.input_spec, cache)
        scores.append(Validation(place_split(config, data, CPU), 3, 0, 0, 1)(model))
    assert scores[0] == scores[1]


@pytest.mark.parametrize("place", ["host", "device"])
def test_once_in_memory_no_file_is_read_again(world, tmp_path, place):
    copy = copy_of(world, tmp_path)
    config = config_of(copy, place)
    index = read_index(copy / "shards")
    loader = open_loader(config, index, 2, 0, 1, open_cache(config.data.features, index)).placed(config, CPU)
    shutil.rmtree(copy)
    same(list(islice(loader.batches(0), 12)), batches(config_of(world, "disk"), 12))


def copy_of(world, tmp_path):
    (tmp_path / "copy").mkdir()
    for name in ("shards", "cache", "backbone"):
        shutil.copytree(world / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.mark.parametrize("place", ["host", "device"])
def test_damage_is_found_while_the_memory_is_filled(world, tmp_path, place):
    copy = copy_of(world, tmp_path)
    path = copy / "cache" / "train-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00001\.safetensors, sample [\w-]+: its bytes have changed"):
        batches(config_of(copy, place), 1)


@pytest.mark.parametrize("place", ["host", "device"])
def test_features_that_do_not_fit_are_refused_in_one_sentence(world, monkeypatch, place):
    memory = psutil.virtual_memory()._replace(available=100_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    pattern = (
        r"of the split 'train' in .*cache take 0\.\d+ GB, and this machine has 0\.00 GB free; train with .*_in disk"
    )
    with pytest.raises(UserError, match=pattern) as caught:
        batches(config_of(world, place), 1)
    assert "\n" not in str(caught.value)


def test_processes_that_take_memory_of_one_machine_must_all_find_room(world, monkeypatch):
    config, index = config_of(world, "device"), read_index(world / "shards")
    data = open_loader(config, index, 2, 0, 1, open_cache(config.data.features, index)).loader.dataset
    size = FeatureMemory(data).bytes
    free = psutil.virtual_memory()._replace(available=3 * size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    taken = []
    monkeypatch.setattr(FeatureMemory, "allocate", lambda *_: taken.append(1))
    monkeypatch.setattr(placement, "read_all", lambda *_: None)
    for processes in (3, 4):
        monkeypatch.setattr(placement, "ranks_of_machine", lambda number=processes: range(number))
        if processes == 4:
            with pytest.raises(UserError, match=r"GB free; train with --data\.features_in disk"):
                placement.place_features(data, "device", CPU, 0)
        else:
            placement.place_features(data, "device", CPU, 0)
        assert len(taken) == 1


def test_a_gpu_whose_free_memory_is_in_pieces_is_named_as_too_small(world, monkeypatch):
    config, index = config_of(world, "device"), read_index(world / "shards")
    data = open_loader(config, index, 2, 0, 1, open_cache(config.data.features, index)).loader.dataset

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(FeatureMemory, "allocate", fail)
    with pytest.raises(UserError, match=r"this GPU has 80\.00 GB free; train with --data\.features_in host or disk"):
        placement.place_features(data, "device", torch.device("cuda"), 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 80 * 10**9))
    with pytest.raises(UserError, match=r"this GPU has 0\.00 GB free"):
        placement.place_features(data, "device", torch.device("cuda"), 0)


def test_processes_that_cannot_open_the_shared_memory_are_told_so(world, monkeypatch):
    real = os.open

    def refuse(path, flags, *more, **options):
        if str(path).startswith("/proc/"):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"cannot share memory \(/proc/\d+/fd/\d+: Permission denied\); .*_in disk"):
        batches(config_of(world, "host"), 1)


def test_views_that_add_nothing_and_absent_classes_take_no_memory(world):
    config, index = config_of(world, "device"), read_index(world / "shards")
    loader = open_loader(config, index, 2, 0, 1, open_cache(config.data.features, index))
    memory = FeatureMemory(loader.loader.dataset)
    files = sum((world / "cache" / s.name).stat().st_size for s in memory.data.reader.index.shards
                if s.name.startswith("train"))  # fmt: skip
    extra = memory.shapes["cls"][1][1] * 2 * (1 + 2 * 4) + 2 * 4 * 4 * 2  # a view, and two masks
    about = len(memory) * (2 * 8 + 8 * 4 + 3 * 8)  # metadata and label
    headers = 600 * len(memory.data.reader.index.shards)
    copies = [(row, copy) for row, count in enumerate(memory.copies) for copy in range(count)]
    files -= sum(len(memory.data.reader.read(*place).record) for place in copies)
    assert files - headers < memory.bytes < files + extra + about + 64 * len(memory.shapes)


def test_memory_is_for_features():
    with pytest.raises(UserError, match=r"data\.features_in is 'host', but must be disk without data\.features"):
        DataConfig(features_in="host")
    with pytest.raises(UserError, match=r"data\.features_in is 'ram', but must be one of disk, host, device"):
        DataConfig(features="cache", features_in="ram")


WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from pipeline.training import placement
from tests.training.test_placement import Path, batches, config_of
take, taken = placement.shared_memory, []
placement.shared_memory = lambda *given: taken.append(take(*given)) or taken[-1]
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/peers", rank=rank, world_size=2)
world, out = Path(sys.argv[1]), Path(sys.argv[2])
for place in ("disk", "host", "device"):
    torch.save(batches(config_of(world, place), 12, 5, rank, 2), out / f"{place}-{rank}.pt")
(out / f"shared-{rank}.json").write_text(json.dumps([
    int(line.split()[4]) for line in open("/proc/self/maps") if "/memfd:roadwork-features" in line
]))
dist.destroy_process_group()
"""


@pytest.mark.dist
@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_get_their_own_batches_from_one_memory_of_their_machine(world, tmp_path, machines):
    base = {**os.environ, **CPU_ONLY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([python(), "-c", WORKER, str(world), str(tmp_path)], stderr=subprocess.PIPE, text=True,
                         env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank if machines == 1 else 0)})
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for rank in range(2):
        wanted = torch.load(tmp_path / f"disk-{rank}.pt")
        for place in ("host", "device"):
            same(torch.load(tmp_path / f"{place}-{rank}.pt"), wanted)
    shared = {tuple(json.loads((tmp_path / f"shared-{rank}.json").read_text())) for rank in range(2)}
    assert all(len(inodes) == 1 for inodes in shared)
    assert len(shared) == machines
