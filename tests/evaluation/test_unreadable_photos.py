"""Photos that `predict` cannot read: each has its row, with the reason."""

from __future__ import annotations

import os

import pytest

from pipeline.evaluation.photo_list import photos_of
from pipeline.evaluation.prediction import PhotoFiles
from pipeline.model.config import InputSpec

REASONS = {
    "IMG_1.HEIC": "HEIC; convert it to JPEG",
    "page.jpg": "not an image",
    "pipe.jpg": "a FIFO and not a file",
    "zero.jpg": "a device and not a file",
    "gone.png": "cannot be read: No such file or directory",
    "old.gif": "GIF; convert it to JPEG",
}


@pytest.mark.parametrize("way", ["folder", "pattern"])
def test_every_photo_of_a_folder_has_an_answer_or_a_reason(tmp_path, way):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "page.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "old.gif").write_bytes(b"GIF89a")
    (tmp_path / "a folder.jpg").mkdir()
    (tmp_path / "notes.txt").write_text("")
    name = str(tmp_path) if way == "folder" else str(tmp_path / "*.*g*")
    found = sorted(path for path in map(tmp_path.joinpath, photos_of(name)) if path.name in REASONS)
    assert {path.name for path in found} >= (REASONS.keys() if way == "folder" else {"old.gif", "pipe.jpg"})
    photos = PhotoFiles(found, InputSpec(192, 12, 0, "full"))
    assert [photos[row] for row in range(len(found))] == [(None, REASONS[path.name]) for path in found]
