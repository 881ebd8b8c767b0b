"""Receipts: a file is whole if, and only if, it is there as its receipt says."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from data_prep.work.receipts import Receipts, explain_full_disk
from pipeline.errors import UserError

DATA = b"all of it"
RECEIPT = {"bytes": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest(), "members": [{"jpg": [512, 9]}]}


@pytest.fixture
def receipts(tmp_path) -> Receipts:
    (tmp_path / "a.tar").write_bytes(DATA)
    found = Receipts(tmp_path)
    found.write("a.tar", RECEIPT)
    return found


def test_a_file_with_its_receipt_is_whole_and_the_receipt_is_read_back(receipts):
    assert receipts.exists("a.tar")
    assert receipts.is_whole("a.tar")
    assert receipts.read("a.tar") == RECEIPT
    assert receipts.missing(["a.tar"]) == []


@pytest.mark.parametrize("content", [None, b"", DATA + b"!", DATA[::-1]])
def test_a_file_that_is_gone_or_others_bytes_is_not_whole(receipts, content):
    path = receipts.folder / "a.tar"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert receipts.exists("a.tar")
    assert not receipts.is_whole("a.tar")


def test_missing_are_files_without_a_receipt_and_files_of_another_length(receipts):
    (receipts.folder / "b.tar").write_bytes(DATA)
    assert receipts.missing(["b.tar", "a.tar", "c.tar"]) == ["b.tar", "c.tar"]
    (receipts.folder / "a.tar").write_bytes(DATA[1:])
    assert receipts.missing(["a.tar"]) == ["a.tar"]


def test_an_uploaded_file_is_looked_for_where_it_went(receipts, tmp_path):
    bucket = tmp_path / "bucket"
    uploaded = Receipts(tmp_path, f"file://{bucket}")
    assert not uploaded.is_whole("a.tar")
    assert uploaded.missing(["a.tar"]) == ["a.tar"]
    bucket.mkdir()
    (bucket / "a.tar").write_bytes(DATA)
    (tmp_path / "a.tar").unlink()
    assert uploaded.is_whole("a.tar")
    assert uploaded.missing(["a.tar"]) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence(number):
    with pytest.raises(UserError, match="no space is left on the disk of out; the tars that are finished are kept"):
        write_with(number)


def test_other_errors_stay_what_they_are():
    with pytest.raises(PermissionError):
        write_with(errno.EACCES)


def write_with(number: int) -> None:
    with explain_full_disk(Path("out"), "tars"):
        raise OSError(number, "no")
