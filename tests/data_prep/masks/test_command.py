"""The command `masks`: what SAM 3 finds becomes one mask per photo, once, and interrupted work resumes."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep.masks.command import look, masks
from data_prep.masks.sam3 import Segmenter
from data_prep.photos.inspection import check_mask
from data_prep.sources.content import Input
from pipeline.cli import commands
from pipeline.errors import UserError
from pipeline.names import MASK_CLASSES
from tests.data_prep.examples import encode, jpeg, pixels
from tests.data_prep.masks.tiny_sam3 import MASK, SCORE, SIDE, write_tiny_sam3

SIZES = {"a.jpg": (480, 640), "b.jpg": (300, 200), "c.jpg": (64, 96), "d.jpg": (121, 333), "e.jpg": (200, 200)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_sam3(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        (folder / name).write_bytes(jpeg(seed, width, height))
    return folder


@pytest.fixture
def run(checkpoint, photos, tmp_path):
    """Runs the command on the photos, and gives the summary."""

    def run(**options: Any) -> dict[str, Any]:
        defaults = {"source": str(photos), "out": tmp_path / "masks", "model": str(checkpoint), "device": "cpu"}
        thresholds = {"score_threshold": SCORE, "mask_threshold": MASK}
        return json.loads(masks(**{**defaults, **thresholds, "workers": 1, **options}).read_text())

    return run


def mask_of(folder: Path, photo: bytes) -> np.ndarray:
    return np.asarray(Image.open(folder / f"{hashlib.sha256(photo).hexdigest()}.png"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_a_mask_is_what_the_segmenter_finds_in_the_photo(run, checkpoint, photos, tmp_path):
    run(batch_size=3)
    segmenter = Segmenter(
        str(checkpoint), MASK_CLASSES, torch.device("cpu"), score_threshold=SCORE, mask_threshold=MASK
    )
    for path in photos.iterdir():
        square = np.array(Image.open(path).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        expected = segmenter(square[None], [SIZES[path.name]])[0]
        got = mask_of(tmp_path / "masks", path.read_bytes())
        assert got.shape == SIZES[path.name]
        assert np.mean(got != expected) < 1e-3


def test_photos_reach_the_model_squeezed_to_a_square_with_antialiasing(tmp_path):
    photo = encode(pixels(3, 700, 400), "PNG")
    prepared = look(Input("x", photo), tmp_path, SIDE)
    whole = torch.from_numpy(pixels(3, 700, 400).copy()).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(whole, (SIDE, SIDE), mode="bilinear", antialias=True)
    assert prepared.size == (400, 700)
    assert np.abs(prepared.pixels - expected[0].permute(1, 2, 0).numpy()).max() <= 1


def test_masks_lie_upright_like_the_photos_that_the_model_is_trained_on(run, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    turned = encode(pixels(1, 96, 64), exif=exif)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "turned.jpg").write_bytes(turned)
    run(source=str(tmp_path / "in"))
    assert mask_of(tmp_path / "masks", turned).shape == (96, 64)


def test_masks_are_those_that_shards_accept(run, tmp_path):
    run()
    for data in files(tmp_path / "masks").values():
        check_mask(data)


def test_a_photo_without_objects_gets_a_mask_of_zeros(run, tmp_path):
    summary = run(score_threshold=0.99)
    assert summary["empty"] == summary["written"] == len(SIZES)
    assert len(files(tmp_path / "masks")) == len(SIZES)
    assert all(not np.asarray(Image.open(path)).any() for path in (tmp_path / "masks").glob("*.png"))


def test_the_summary_counts_what_the_masks_show(run, tmp_path):
    summary = run()
    shown = [np.asarray(Image.open(path)) for path in (tmp_path / "masks").glob("*.png")]
    for number, name in enumerate(MASK_CLASSES, start=1):
        expected = {"photos": sum((mask == number).any() for mask in shown), "pixels": 0}
        expected["pixels"] = sum(int((mask == number).sum()) for mask in shown)
        assert summary["classes"][name] == expected
    assert summary["inputs"] == summary["written"] == len(SIZES)
    assert (summary["skipped"], summary["rejected"]) == (0, {})
    assert summary["images_per_s"] > 0


def test_a_second_run_skips_what_is_done_and_reports_the_same(run, tmp_path, monkeypatch):
    first = run()
    monkeypatch.setattr(Segmenter, "__call__", lambda *given: pytest.fail("nothing was left to segment"))
    monkeypatch.setattr("data_prep.masks.command.decode", lambda data: pytest.fail("nothing was left to decode"))
    second = run()
    assert (second["written"], second["skipped"]) == (0, len(SIZES))
    assert (second["classes"], second["empty"]) == (first["classes"], first["empty"])


def test_work_goes_on_after_an_interruption(run, tmp_path, monkeypatch):
    run(out=tmp_path / "whole", batch_size=2)
    genuine, calls = Segmenter.__call__, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return genuine(self, *given)

    monkeypatch.setattr(Segmenter, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2)
    assert len(files(tmp_path / "masks")) == 2
    summary = run(batch_size=2)
    assert (summary["written"], summary["skipped"]) == (3, 2)
    assert files(tmp_path / "masks") == files(tmp_path / "whole")


def test_identical_photos_share_a_mask_wherever_they_lie(run, photos, tmp_path):
    copies = tmp_path / "in"
    shutil.copytree(photos, copies)
    shutil.copy(photos / "a.jpg", copies / "a2.jpg")  # in the same batch
    shutil.copy(photos / "a.jpg", copies / "z.jpg")  # in a later one
    summary = run(source=str(copies), batch_size=2)
    assert (summary["inputs"], summary["written"], summary["skipped"]) == (7, 5, 2)
    assert len(files(tmp_path / "masks")) == 5
    assert run()["skipped"] == len(SIZES)  # of another folder, and all masks are there


def test_several_processes_give_the_same_masks(run, tmp_path):
    run(out=tmp_path / "one")
    run(out=tmp_path / "two", workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_unusable_photos_are_listed_with_their_reasons(run, photos, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(photos, folder)
    (folder / "cut.jpg").write_bytes(jpeg(1, 400, 300)[:2000])
    (folder / "none.jpg").write_bytes(b"")
    (folder / "small.png").write_bytes(encode(pixels(1, 20, 20), "PNG"))
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    summary = run(source=str(folder))
    assert summary["written"] == len(SIZES)
    assert sum(summary["rejected"].values()) == 4
    assert summary["inputs"] == len(SIZES) + 4
    rejects = [json.loads(line) for line in (tmp_path / "masks" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["path"], reject["stage"]) for reject in rejects] == [
        ("cut.jpg", "decode"),
        ("gone.jpg", "read"),
        ("none.jpg", "decode"),
        ("small.png", "decode"),
    ]
    assert all(reject["reason"] for reject in rejects)


def test_a_row_without_a_photo_is_a_reject(tmp_path):
    reject = look(Input("x.jpg", None, problem="the photo is missing"), tmp_path, SIDE)
    assert (reject.path, reject.reason, reject.stage) == ("x.jpg", "the photo is missing", "source")


def test_a_few_photos_can_be_tried_before_the_rest(run, tmp_path):
    assert run(max_images=2)["written"] == 2
    assert len(files(tmp_path / "masks")) == 2
    assert run()["skipped"] == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"score_threshold": 0.4}, "score_threshold 0.3, not 0.4"),
        ({"mask_threshold": 0.7}, "mask_threshold 0.6, not 0.7"),
        ({"prompts": {"worker": "construction worker"}}, "construction worker"),
    ],
)
def test_a_folder_holds_masks_of_one_making(run, tmp_path, options, named):
    run(max_images=1)
    with pytest.raises(UserError, match=named):
        run(**options)
    assert len(files(tmp_path / "masks")) == 1


def test_other_weights_are_other_making_and_another_place_is_not(run, checkpoint, tmp_path):
    run(max_images=1)
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert run(model=str(tmp_path / "copy"), batch_size=2)["skipped"] == 1
    weights = load_file(checkpoint / "model.safetensors")
    weights["text_projection.bias"][0] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model_sha256"):
        run(model=str(tmp_path / "copy"))


def test_a_class_can_be_asked_for_in_other_words(run, photos, tmp_path):
    run(out=tmp_path / "names")
    run(out=tmp_path / "words", prompts={"worker": "person in a safety vest"})
    settings = json.loads((tmp_path / "words" / "masks.json").read_text())
    assert settings["prompts"] == {**{name: name for name in MASK_CLASSES}, "worker": "person in a safety vest"}
    assert files(tmp_path / "names") != files(tmp_path / "words")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"cone": "orange cone"}, "traffic cone, construction barrier"),
        ({"worker": " "}, "short noun phrase"),
    ],
)
def test_prompts_that_cannot_work_are_refused(run, prompts, message):
    with pytest.raises(UserError, match=message):
        run(prompts=prompts)


@pytest.mark.parametrize(
    "options",
    [{"score_threshold": 1.0}, {"mask_threshold": 0.0}, {"batch_size": 0}, {"workers": -1}, {"max_images": 0}],
)
def test_values_out_of_range_are_refused_by_name(run, options):
    with pytest.raises(UserError, match=f"--{next(iter(options))} is"):
        run(**options)


def test_the_command_line_takes_the_prompts_as_json(checkpoint, photos, tmp_path, monkeypatch, capsys):
    words = ["--source", photos, "--out", tmp_path / "masks", "--model", checkpoint, "--device", "cpu"]
    words += ["--prompts", '{"worker": "construction worker"}', "--max-images=1", "--workers=1"]
    monkeypatch.setattr(sys, "argv", ["data_prep", "masks", *map(str, words)])
    assert commands({"masks": "data_prep.masks.command:masks"}, prog="data_prep", description="") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str((tmp_path / "masks" / "summary.json").resolve())]
    assert json.loads(Path(printed[0]).read_text())["settings"]["prompts"]["worker"] == "construction worker"
