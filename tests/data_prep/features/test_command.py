"""The command `features`: one cache, however it was made and however often it was cut off."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.features import writer as feature_writer
from data_prep.features.command import features
from data_prep.features.extraction import Extractor, decoding_workers, pack
from data_prep.features.options import ModelChoice, Options
from data_prep.scenes.data_set import scenes
from data_prep.shards.command import shard
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import open_split
from pipeline.data.features import open_cache, read_features
from pipeline.data.index import read_index
from pipeline.devices import spare_cores
from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone, vith16plus_config
from pipeline.training.throughput import flops_per_view
from tests.feature_cache import ROW_BYTES, make_cache
from tests.small_run import make_backbone, make_shards, small_config
from tests.warm import python

ROOT = Path(__file__).parents[3]
PHOTOS = 10
SPEC = small_config("backbone").input_spec("full")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, a backbone and the cache that an uninterrupted process makes."""
    folder = tmp_path_factory.mktemp("world")
    make_shards(folder / "shards", {"train": [0, 1] * (PHOTOS // 2), "val": [0, 1, 0]})
    make_backbone(folder / "backbone")
    make(folder, folder / "whole")
    return folder


def make(world, out, **options):
    return make_cache(out, world / "shards", str(world / "backbone"), **{"copies": 1, **options})


def contents(folder):
    """Hash of every file but the summary, which holds times."""
    files = sorted(path for path in folder.iterdir() if path.name != "summary.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(world, out):
    """The command in a process of its own, with the options of `make`."""
    recipe, size = world / "whole.yaml", str(4.5 * ROW_BYTES / 1e6)
    words = ["--recipe", str(recipe), "--out", str(out), "--copies", "1", "--shard_mb", size, "--workers", "0"]
    return [python(), "-m", "data_prep", "features", *words]


def test_every_photo_has_its_rows_and_the_summary_counts_them(world):
    summary = json.loads((world / "whole" / "summary.json").read_text())
    index = read_features(world / "whole")
    assert (summary["photos"], summary["copies"], summary["processes"]) == (PHOTOS + 3, 1, 1)
    assert summary["files"] == len(index.shards) == 6  # two photos of two rows in each of train's, four rows in val's
    assert summary["bytes"] == sum((world / "whole" / shard.name).stat().st_size for shard in index.shards)
    rows = {s.name.split("-")[0]: {len(photo.checksums) for photo in s.photos} for s in index.shards}
    assert rows == {"train": {2}, "val": {1}}
    hashes = {ShardDataset(world / "shards", read_index(world / "shards"), "val", SPEC).record(1).sha256}
    assert hashes == {photo.sha256 for s in index.shards for photo in s.photos if photo.key == "val_1"}


def test_the_same_command_again_keeps_what_is_finished(world, capsys):
    before = contents(world / "whole")
    make(world, world / "whole")
    assert "finished already" in capsys.readouterr().err
    assert contents(world / "whole") == before
    assert not (world / ".whole.partial").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"copies": 2}, "made with --copies 1, not 2"),
        ({"model": ModelChoice(view_side=48)}, "made with the view side 32, and not 48"),
        ({"model": ModelChoice(backbone="scenes-tiny")}, r"made with the backbone .* and not scenes-tiny \("),
    ],
)
def test_other_features_are_not_put_in_the_place_of_finished_ones(world, options, named):
    before = contents(world / "whole")
    with pytest.raises(UserError, match=f"holds features {named}.*; choose another --out or remove it"):
        make(world, world / "whole", **options)
    assert contents(world / "whole") == before


def test_a_folder_that_holds_something_else_is_left_alone(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no finished features"):
        make(world, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"copies": -1}, "--copies is -1"),
        ({"shard_mb": 0.0}, "--shard_mb is 0.0"),
        ({"workers": -1}, "--workers is -1"),
        ({"batch_views": 11}, r"--batch_views is 11, but must be in \[12, 192\]"),
        ({"out": ""}, "--out is ''"),
        ({"device": "cuda:99"}, "--device is 'cuda:99'"),
    ],
)
def test_what_cannot_be_is_refused(world, tmp_path, options, named):
    with pytest.raises(UserError, match=named):
        features(**{"out": tmp_path / "out", "recipe": str(world / "whole.yaml"), **options})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_in_one_sentence_and_keeps_what_is_finished(world, tmp_path, monkeypatch):
    write, written = feature_writer.write_bytes, []

    def full_after_two(path, data):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)
        written.append(path.name)

    with monkeypatch.context() as patch:
        patch.setattr(feature_writer, "write_bytes", full_after_two)
        with pytest.raises(UserError, match=r"no space is left on the disk of .*finished are kept there: free some"):
            make(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    kept = {name: (tmp_path / ".out.partial" / name).stat().st_ino for name in written}
    make(world, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(world / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in written} == kept


def test_a_disk_that_cannot_hold_the_cache_is_refused_before_the_work(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=70_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.07 GB free"):
        make(world, tmp_path / "out", rows_per_file=4, copies=500)


def test_a_run_killed_at_any_moment_goes_on_without_redoing_finished_files(world, tmp_path):
    slow = """if True:
        import runpy, sys, time
        import data_prep.features.writer as writer
        write = writer.write_bytes
        writer.write_bytes = lambda path, data: (write(path, data), time.sleep(0.5))
        sys.argv = sys.argv[1:]
        runpy.run_module("data_prep", run_name="__main__")
    """
    words = command(world, tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-c", slow, *words[2:]], cwd=ROOT, stderr=subprocess.DEVNULL)
    receipts = tmp_path / ".out.partial" / "receipts"
    while len(list(receipts.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.partial" / ".train-00003.safetensors.1.tmp").write_bytes(b"half")
    done = {path.stem: (path.parents[1] / f"{path.stem}.safetensors").stat().st_ino for path in receipts.glob("*.json")}
    make(world, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(world / "whole")
    assert {name: (tmp_path / "out" / f"{name}.safetensors").stat().st_ino for name in done} == done


def test_a_finished_file_that_was_damaged_is_made_again(world, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("enough")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.features.job.Job.finish", fail)
        with pytest.raises(UserError, match="enough"):
            make(world, tmp_path / "out")
    plan = json.loads((tmp_path / ".out.partial" / "plan.json").read_text())
    assert list(plan) == ["format", "key", "dim", "source_sha256", "copies", "precision", "version", "shards", "tars"]
    assert list(plan["shards"][0]) == ["name", "split", "first", "photos", "copies"]
    path = tmp_path / ".out.partial" / "train-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    make(world, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(world / "whole")


def test_a_run_cut_off_before_its_last_renaming_is_only_renamed(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", cut_off_folders(os.replace))
        with pytest.raises(KeyboardInterrupt):
            make(world, tmp_path / "out")
    assert not (tmp_path / ".out.partial" / "plan.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(
            "data_prep.features.extraction.Extractor.run", lambda *_: pytest.fail("nothing is left to compute")
        )
        make(world, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(world / "whole")


def cut_off_folders(replace):
    def cut_off(source, target):
        if Path(source).is_dir():
            raise KeyboardInterrupt
        replace(source, target)

    return cut_off


def test_a_half_finished_cache_of_other_features_is_not_mixed_in(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.features.job.Job.finish", lambda *_: (_ for _ in ()).throw(UserError("enough")))
        with pytest.raises(UserError, match="enough"):
            make(world, tmp_path / "out", model=ModelChoice(view_side=48))
    make(world, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(world / "whole")


@pytest.mark.dist
def test_two_processes_under_accelerate_make_the_same_bytes_as_one(world, tmp_path):
    launch = [python(), "-m", "pipeline.launch.launcher", "prep", "features"]
    config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2.yaml")]
    words = [*launch, *config, *command(world, tmp_path / "out")[4:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out' / 'summary.json'}\n"
    assert contents(tmp_path / "out") == contents(world / "whole")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert 0 < summary["rank_zero"]["rows"] < 2 * PHOTOS + 3


def test_another_batch_and_other_processes_for_decoding_change_nothing_beyond_rounding(world, tmp_path):
    make(world, tmp_path / "out", batch_views=17, workers=1)
    rows = [open_train(world, place) for place in (tmp_path / "out", world / "whole")]
    for number in range(2 * PHOTOS):
        ours, theirs = (data[number]["cells"].float() for data in rows)
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5)


def open_train(world, cache):
    index = read_index(world / "shards")
    return open_split(world / "shards", index, "train", SPEC, open_cache(str(cache), index))


def test_views_that_add_nothing_cost_neither_the_backbone_nor_room(tmp_path):
    make_shards(tmp_path / "shards", {"train": [0, 1]})
    backbone = make_backbone(tmp_path / "backbone")
    small, large = (
        json.loads((make_cache(tmp_path / f"cache{side}", tmp_path / "shards", backbone,
                               model=ModelChoice(view_side=side)) / "summary.json").read_text())
        for side in (96, 32)
    )  # fmt: skip
    assert small["rank_zero"]["views"] == 2  # a photo of 96x64 px has no more pixels than its global view
    assert large["rank_zero"]["views"] == 24
    assert small["bytes"] < large["bytes"] / 3


def test_masks_follow_the_copies_into_training(tmp_path):
    scenes(tmp_path / "scenes", 12, "320x240", seed=3, workers=1)
    shard(tmp_path / "scenes", tmp_path / "shards", workers=1)
    make_cache(tmp_path / "cache", tmp_path / "shards", make_backbone(tmp_path / "backbone"), copies=2)
    data = open_train(tmp_path, tmp_path / "cache")
    masked = [row for row in range(len(data)) if data[row]["mask_targets"].sum() > 0]
    assert 0 < len(masked) < len(data)
    index = read_index(tmp_path / "shards")
    online = ShardDataset(tmp_path / "shards", index, "train", SPEC)
    for row in range(len(data)):  # float16 has 11 digits
        torch.testing.assert_close(data[row]["mask_targets"], online[row]["mask_targets"], rtol=2**-11, atol=0)
    plain, client, mild = (
        torch.stack([data[copy * len(data) + row]["mask_targets"] for row in masked]) for copy in range(3)
    )
    assert not torch.equal(client, plain)
    assert not torch.equal(mild, plain)
    assert not (client.isnan() | mild.isnan()).any()


def test_batches_are_full_as_far_as_whole_rows_go():
    generator = np.random.default_rng(0)
    rows = [{"views": torch.zeros(int(number))} for number in generator.choice([1, 10, 12], size=300)]
    packs = list(pack(rows, 48))
    assert [row for one in packs for row in one] == rows
    sizes = [sum(len(row["views"]) for row in one) for one in packs]
    assert max(sizes) <= 48
    assert min(sizes[:-1]) > 48 - 12
    ones = [{"views": torch.zeros(1)}] * 600
    assert [len(one) for one in pack(ones, 4000)] == [256, 256, 88]


def test_a_compiled_pass_always_has_the_same_number_of_views(tmp_path):
    backbone = FrozenBackbone(make_backbone(tmp_path))
    extractor = Extractor(backbone, 2, Options("cpu", 0, 24, compile=True, attention="auto", shard_mb=1.0), 0)
    extractor.on_gpu = True
    seen, call = [], backbone.model.forward
    backbone.model.forward = lambda pixel_values: (seen.append(len(pixel_values)), call(pixel_values=pixel_values))[1]
    views = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    whole, part = extractor.full_pass(views), extractor.full_pass(views[:7])
    assert seen == [24, 24]
    for ours, theirs in zip(part, whole, strict=True):
        torch.testing.assert_close(ours, theirs[:7])
    extractor.compiled = False  # where it failed, nothing is left to gain
    extractor.full_pass(views[:7])
    assert seen == [24, 24, 7]


def test_a_views_operations_are_those_of_the_published_backbone():
    tokens, width, hidden = 1 + 4 + 32 * 32, 1280, 5120
    matrices = 4 * width * width + 3 * width * hidden
    layer = 2 * tokens * matrices + 4 * tokens * tokens * width
    embedding = 2 * 32 * 32 * (16 * 16 * 3) * width
    assert flops_per_view(vith16plus_config(), 512) == pytest.approx(32 * layer + embedding, rel=1e-3)


def test_a_gpu_leaves_all_cores_but_one_to_decoding_and_a_cpu_needs_them_itself(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (spare_cores(torch.device("cuda")), spare_cores(torch.device("cpu"))) == (7, 1)
    assert (decoding_workers(torch.device("cuda")), decoding_workers(torch.device("cpu"))) == (7, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert (spare_cores(torch.device("cuda")), spare_cores(torch.device("cpu"))) == (1, 0)
