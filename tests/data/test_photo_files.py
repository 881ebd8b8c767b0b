"""Files of photos: only regular ones are opened, and no more is read than a photo may have."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pipeline.data import photo_files
from pipeline.data.photo_files import is_photo_name, read_file
from pipeline.data.photo_parts import BadPhoto


@pytest.mark.parametrize(("arguments", "expected"), [((), b"0123456789"), ((7,), b"789"), ((2, 3), b"234")])
def test_a_file_is_read_whole_or_in_part_and_links_are_followed(tmp_path, arguments, expected):
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file", *arguments) == expected
    assert read_file(str(tmp_path / "link"), *arguments) == expected


@pytest.fixture
def odd(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("FIFO")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    Path("device").symlink_to("/dev/zero")
    Path("link").symlink_to("FIFO")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("FIFO", "FIFO"), ("link", "FIFO"), ("folder", "folder"), ("socket", "socket"), ("device", "device")],
)
def test_what_is_no_file_is_refused_without_opening_it(odd, name, kind, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("was opened"))
    with pytest.raises(BadPhoto, match=f"^a {kind} and not a file$"):
        read_file(odd / name)


def test_a_fifo_that_takes_the_place_of_a_file_is_not_waited_for(odd, monkeypatch):
    looked = os.stat
    (odd / "file").write_bytes(b"")
    monkeypatch.setattr(os, "stat", lambda path: looked(odd / "file"))
    with pytest.raises(BadPhoto, match="a FIFO and not a file"):
        read_file(odd / "FIFO")


@pytest.mark.parametrize("size", [None, 11])
def test_a_file_over_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path, size, monkeypatch):
    monkeypatch.setattr(photo_files, "MAX_FILE_BYTES", 10)
    (tmp_path / "file").write_bytes(bytes(10))
    assert len(read_file(tmp_path / "file")) == 10
    (tmp_path / "file").write_bytes(bytes(11))
    with pytest.raises(BadPhoto, match="larger than"):
        read_file(tmp_path / "file", 0, size)


def test_files_of_unknown_length_are_read_to_their_end_or_to_the_limit(monkeypatch):
    assert b"processor" in read_file("/proc/cpuinfo")
    monkeypatch.setattr(photo_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(BadPhoto, match="larger than"):
        read_file("/proc/cpuinfo")


def test_a_file_that_is_gone_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "is_photo"),
    [
        ("a.jpg", True),
        ("a.JFIF", True),
        ("b/IMG_1.HEIC", True),
        ("a.gif", True),
        ("a.dng", True),
        ("a.txt", False),
        ("jpg", False),
    ],
)
def test_photos_that_are_not_read_are_photos_by_their_names(name, is_photo):
    assert is_photo_name(name) is is_photo
