"""Folders of this machine and behind URLs behave alike."""

from __future__ import annotations

import os
import pickle
import uuid

import fsspec
import pytest

from pipeline.data import storage
from pipeline.data.storage import open_folder
from pipeline.errors import UserError


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path):
    places = {"local": tmp_path / "new" / "out", "file": f"file://{tmp_path}/new/out/",
              "memory": f"memory://{uuid.uuid4().hex}"}  # fmt: skip
    return open_folder(places[request.param])


@pytest.fixture
def local(tmp_path):
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    return path


def test_what_is_put_can_be_read_whole_in_part_and_as_a_stream(folder, local):
    assert not folder.exists("a.tar")
    folder.put(local, "a.tar")
    assert folder.exists("a.tar")
    assert folder.size("a.tar") == 10
    assert folder.sizes(["a.tar", "b.tar"]) == [10, None]
    assert folder.read("a.tar") == b"0123456789"
    assert folder.read_range("a.tar", 2, 5) == b"234"
    assert folder.read_range("a.tar", 8, 99) == b"89"
    with folder.stream("a.tar") as stream:
        assert (stream.read(3), stream.read()) == (b"012", b"3456789")


def test_a_put_replaces_and_a_delete_may_come_twice(folder, local, tmp_path):
    folder.put(local, "a.tar")
    assert folder.read_range("a.tar", 0, 3) == b"012"
    other = tmp_path / "other"
    other.write_bytes(b"abc")
    folder.put(other, "a.tar")
    assert folder.read_range("a.tar", 0, 3) == b"abc"
    for _ in range(2):
        folder.delete("a.tar")
    assert not folder.exists("a.tar")
    with pytest.raises(FileNotFoundError):
        folder.read("a.tar")


def test_a_folder_can_be_sent_to_another_process(folder, local):
    folder.put(local, "a.tar")
    assert folder.read_range("a.tar", 0, 1) == b"0"
    assert pickle.loads(pickle.dumps(folder)).read("a.tar") == b"0123456789"


@pytest.mark.parametrize("kind", ["local", "file"])
def test_an_interrupted_put_leaves_nothing_of_it(kind, local, tmp_path, monkeypatch):
    folder = open_folder(tmp_path / "out" if kind == "local" else f"file://{tmp_path}/out")
    folder.put(local, "a.tar")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)  # the last step of a local put
    monkeypatch.setattr("shutil.move", fail)  # and of a put through fsspec
    other = tmp_path / "other"
    other.write_bytes(b"abc")
    with pytest.raises(UserError, match="No space left"):
        folder.put(other, "a.tar")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tar"]
    assert folder.read("a.tar") == b"0123456789"


def test_an_upload_that_arrives_short_is_found(local, monkeypatch):
    folder = open_folder(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "size", lambda *_: 9)
    with pytest.raises(UserError, match="9 of 10 bytes"):
        folder.put(local, "a.tar")


def test_an_object_store_gets_the_final_name_at_once(local, monkeypatch):
    """There a move is a copy, and an upload appears whole."""
    folder = open_folder(f"memory://{uuid.uuid4().hex}")
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "protocol", ("s3", "s3a"))
    monkeypatch.setattr(memory, "mv", None)
    folder.put(local, "a.tar")
    assert folder.read("a.tar") == b"0123456789"


def test_a_bucket_that_does_not_exist_is_one_sentence_when_something_is_put_there(local, monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError("The specified bucket does not exist")

    folder = open_folder("memory://bucket")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
    with pytest.raises(UserError, match="memory://bucket cannot be used: The specified bucket does not exist"):
        folder.put(local, "a.tar")


def test_many_files_of_a_folder_do_not_stay_open(local, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MOST_OPEN_FILES", 3)
    folder = open_folder(tmp_path / "out")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(9):
        folder.put(local, f"{number}.tar")
    for number in [*range(9), *range(9)]:
        assert folder.read_range(f"{number}.tar", 1, 2) == b"1"
    assert len(os.listdir("/proc/self/fd")) - before == 3
    del folder
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("url", ["nonsense://bucket/shards", "hdfs3://bucket/shards"])
def test_a_url_without_a_driver_is_one_sentence(url):
    with pytest.raises(UserError, match=f"{url} .*not known"):
        open_folder(url)


def test_a_driver_that_is_not_installed_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match="not installed: Install s3fs"):
        open_folder("s3://bucket/shards")


def test_what_a_driver_raises_becomes_one_sentence(monkeypatch, local):
    """Drivers have exceptions of their own kind, over many lines."""

    class NoCredentialsError(Exception):
        pass

    def refuse(*_, **__):
        raise NoCredentialsError("Unable to locate credentials\nat line 7")

    folder = open_folder("memory://bucket")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
    with pytest.raises(UserError, match="memory://bucket cannot be used: Unable to locate credentials; check"):
        folder.read("index.json")
