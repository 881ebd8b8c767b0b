"""Folders: every photo is an input, be it one that is not read."""

from __future__ import annotations

import json
import os

from data_prep.shards.command import shard
from data_prep.sources.folders import FolderSource
from tests.data_prep.examples import jpeg, write_table

UNREAD = {
    "IMG_1.HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; convert it to JPEG"),
    "a.avif": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF; convert it to JPEG"),
    "b.tif": (b"II*\0\x08\0\0\0", "TIFF; convert it to JPEG"),
    "c.gif": (b"GIF89a", "GIF; convert it to JPEG"),
    "d.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
}


def test_every_photo_of_a_folder_is_written_or_rejected_with_what_to_do(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, (data, _) in UNREAD.items():
        (folder / name).write_bytes(data)
    for name in ("good.jpg", "windows.jfif"):
        (folder / name).write_bytes(jpeg(len(name)))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "notes.txt").write_text("no photo")
    shard(folder, tmp_path / "out", workers=1)
    rejects = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert {reject["path"]: reject["reason"] for reject in rejects} == {
        **{name: reason for name, (_, reason) in UNREAD.items()},
        "pipe.jpg": "a FIFO and not a file",
        "zero.jpg": "a device and not a file",
    }
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["inputs"], summary["written"]) == (9, 2)


def test_a_photo_that_is_not_read_is_a_reject_too_where_a_table_names_it_or_does_not(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(jpeg(0))
    for name in ("named.heic", "unnamed.heic"):
        (folder / name).write_bytes(UNREAD["IMG_1.HEIC"][0])
    write_table(folder / "metadata.csv", [{"file_name": name, "label": 1} for name in ("good.jpg", "named.heic")])
    shard(folder, tmp_path / "out", workers=1)
    rejects = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert {reject["path"]: reject["reason"] for reject in rejects} == {
        "named.heic": "HEIC; convert it to JPEG",
        "unnamed.heic": "no row in metadata.csv",
    }


def test_a_folder_with_nothing_but_such_photos_is_a_source(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(UNREAD["IMG_1.HEIC"][0])
    assert [item.name for item in FolderSource(tmp_path)] == ["IMG_1.HEIC"]
