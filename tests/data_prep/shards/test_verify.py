"""The command `verify`: whole shards pass, and every kind of damage is named."""

from __future__ import annotations

import errno
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.command import shard
from data_prep.shards.verify import verify
from pipeline.data.index import read_index
from pipeline.errors import EXIT_AUDIT, EXIT_USER, AuditFailed, UserError, run
from pipeline.files import sha256_of
from tests.data.tampering import TAMPERED, edit_split, plain, read_members, special, swapped_bit, tamper
from tests.data_prep.examples import city_rows, encode, write_folder
from tests.small_run import make_shards


@pytest.fixture
def shards(tmp_path) -> Path:
    source = write_folder(tmp_path / "in", city_rows(3, 4))
    shard(source, tmp_path / "out", workers=1, shard_mb=0.01)
    return tmp_path / "out"


def problems(shards: Path) -> list[str]:
    with pytest.raises(AuditFailed) as caught:
        verify(shards, workers=1)
    return json.loads(caught.value.summary.read_text())["problems"]


def test_whole_shards_pass(shards, tmp_path):
    summary = json.loads(verify(shards, tmp_path / "report", workers=1).read_text())
    assert (summary["samples"], summary["problems"]) == (12, [])
    assert summary["shards"] == sum(len(split.shards) for split in read_index(shards).splits.values())
    assert verify(shards, workers=1) == (shards / "verify" / "summary.json").resolve()


def test_one_flipped_bit_in_a_photo_is_found_twice(shards):
    sample = read_index(shards).splits["train"].samples[0]
    path = shards / "train-00000.tar"
    data = bytearray(path.read_bytes())
    data[sample.members["jpg"][0] + 100] ^= 1
    path.write_bytes(data)
    assert problems(shards) == [
        "train-00000.tar has another sha256 than the index says",
        f"train-00000.tar, {sample.key}: the photo is not the one of its record",
    ]


def test_a_photo_swapped_together_with_the_shards_hash_is_found(shards):
    path = shards / "train-00000.tar"
    sample = read_index(shards).splits["train"].samples[0]
    data = bytearray(path.read_bytes())
    data[sample.members["jpg"][0] + 100] ^= 1
    path.write_bytes(data)
    edit_split(shards, "train", lambda split: split["shards"][0].update(sha256=sha256_of(path)))
    assert problems(shards) == [f"train-00000.tar, {sample.key}: the photo is not the one of its record"]


def test_a_cut_or_absent_tar_is_found(shards):
    (shards / "train-00000.tar").write_bytes((shards / "train-00000.tar").read_bytes()[:-512])
    (shards / "train-00001.tar").unlink()
    found = problems(shards)
    assert "bytes long" in found[0]
    assert found[1] == "train-00001.tar is missing"


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_tar_is_found_with_shard_and_member_named(tmp_path, kind):
    """Also where the hash in the index was changed along."""
    make_shards(tmp_path / "made", {"train": [0, 1, 0]})
    change, words = TAMPERED[kind]
    tamper(tmp_path / "made" / "train-00000.tar", change)
    found = problems(tmp_path / "made")
    assert any(re.search(rf"^train-00000\.tar.*{words}", problem) for problem in found), found


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (special("x", tarfile.SYMTYPE), "train-00000.tar holds 'x', which the index does not name"),
        (special("x", tarfile.CHRTYPE), "train-00000.tar holds 'x', which the index does not name"),
        (special("__x__", tarfile.LNKTYPE), "train-00000.tar holds '__x__', which the index does not name"),
        (special("train_0.jpg", tarfile.LNKTYPE), "train-00000.tar, train_0: train_0.jpg is there twice"),
    ],
)
def test_what_a_streaming_reader_would_skip_is_found_too(tmp_path, member, words):
    make_shards(tmp_path / "made", {"train": [0, 1, 0]})
    tamper(tmp_path / "made" / "train-00000.tar", lambda members: [*members, member])
    assert problems(tmp_path / "made") == [words]


def test_a_photo_that_became_a_link_is_called_one(tmp_path):
    make_shards(tmp_path / "made", {"train": [0, 1, 0]})
    change, _ = TAMPERED["a photo that became a link"]
    tamper(tmp_path / "made" / "train-00000.tar", change)
    assert problems(tmp_path / "made")[0] == (
        "train-00000.tar, train_1: train_1.jpg is not a file, but a link, a folder or a device"
    )


def test_a_tar_that_is_none_is_found(tmp_path):
    make_shards(tmp_path / "made", {"train": [0, 1, 0]})
    path = tmp_path / "made" / "train-00000.tar"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert problems(tmp_path / "made")[1].startswith("train-00000.tar is no readable tar behind its first 0 members")


@pytest.mark.parametrize(
    ("kind", "data"), [(tarfile.XHDTYPE, b"19 GNU.sparse.size=x\n"), (tarfile.GNUTYPE_LONGNAME, b"x")]
)
def test_headers_that_extend_the_format_are_strangers_and_not_obeyed(tmp_path, kind, data):
    make_shards(tmp_path / "made", {"train": [0, 1, 0]})
    tamper(tmp_path / "made" / "train-00000.tar", lambda members: [special("x", kind, data), *members])
    found = problems(tmp_path / "made")
    assert "train-00000.tar holds 'x', which the index does not name" in found
    assert not any("missing" in problem for problem in found)


def test_bytes_behind_the_end_are_found(tmp_path):
    make_shards(tmp_path / "made", {"train": [0, 1, 0]})
    path = tmp_path / "made" / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-512] + b"x" * 512)
    edit_split(path.parent, "train", lambda split: split["shards"][0].update(sha256=sha256_of(path)))
    assert problems(path.parent) == ["train-00000.tar: bytes that belong to no member follow the last one"]


class Broken(io.BytesIO):
    """A file on a disk that fails."""

    def read(self, size=-1):
        raise OSError(errno.EIO, "Input/output error")


def deny(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("opened", "reason"), [(deny, "Permission denied"), (lambda *_, **__: Broken(), "Input/output error")]
)
def test_a_tar_that_may_not_be_read_is_no_damage(shards, monkeypatch, capsys, opened, reason):
    """Nothing is known about its bytes: the user must see to it."""
    usual = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *r, **o: (opened if path.suffix == ".tar" else usual)(path, *r, **o))
    assert run(lambda: verify(shards, workers=1)) == EXIT_USER
    assert f"{shards} cannot be used: {reason}; check its name, your rights to it" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_the_work(shards):
    (shards / "verify").write_text("in the way")
    (shards / "train-00000.tar").unlink()  # not even looked for
    with pytest.raises(UserError, match=r"the report cannot be written to .*/verify \(.*\); choose .* with --out"):
        verify(shards, workers=1)
    with pytest.raises(UserError, match="cannot be written to /proc/self"):  # it is there, and takes no file
        verify(shards, Path("/proc/self"), workers=1)


def test_a_mask_of_another_size_than_its_photo_is_found(tmp_path):
    make_shards(tmp_path / "made", {"train": [0, 1]})
    path = tmp_path / "made" / "train-00000.tar"
    mask = encode(np.zeros((9, 7), dtype=np.uint8), "PNG")
    offset = 512 + sum(512 + -(-len(data) // 512) * 512 for _, data in read_members(path)[:4])
    tamper(path, lambda members: [*members, plain("train_1.mask.png", mask)])
    place = {"mask.png": [offset, len(mask)]}
    edit_split(path.parent, "train", lambda split: split["samples"][1]["members"].update(place))
    assert "train_1: the mask is of another size: 7x9, the photo is" in problems(path.parent)[0]


def test_every_damaged_sample_is_listed_and_not_only_the_first(tmp_path):
    make_shards(tmp_path / "made", {"train": [0, 1, 0], "val": [1]})
    path = tmp_path / "made" / "train-00000.tar"
    tamper(path, swapped_bit("train_0.jpg"))
    tamper(path, swapped_bit("train_2.jpg"))
    (tmp_path / "made" / "val-00000.tar").write_bytes(bytes((tmp_path / "made" / "val-00000.tar").stat().st_size))
    hashes, missing = "another sha256 than the index says", "is missing"
    assert problems(tmp_path / "made") == [
        "train-00000.tar, train_0: the photo is not the one of its record",
        "train-00000.tar, train_2: the photo is not the one of its record",
        f"val-00000.tar has {hashes}",
        f"val-00000.tar, val_0: val_0.jpg {missing}",
        f"val-00000.tar, val_0: val_0.json {missing}",
    ]


def test_a_mask_that_is_no_mask_is_found(tmp_path):
    make_shards(tmp_path / "made", {"train": [0, 1]})
    path = tmp_path / "made" / "train-00000.tar"
    offset = 512 + sum(512 + -(-len(data) // 512) * 512 for _, data in read_members(path)[:4])
    tamper(path, lambda members: [*members, plain("train_1.mask.png", b"no image")])
    edit_split(path.parent, "train", lambda split: split["samples"][1]["members"].update({"mask.png": [offset, 8]}))
    assert problems(path.parent) == ["train-00000.tar, train_1: the mask is not an image"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda split: split["samples"][0].update(label=1 - split["samples"][0]["label"]), "the index differ in label"),
        (lambda split: split["samples"][0].update(weight=7.5), "the index differ in weight"),
        (lambda split: split["samples"][0].update(group=77, cluster=5), "the index differ in group, GPS cluster"),
        (lambda split: split["samples"].pop(0), "the index lists 2 of its 3 samples"),
        (lambda split: split["samples"][0]["members"].update(json=[512, 100]), "does not follow the member before it"),
    ],
)
def test_an_index_that_says_something_else_is_found(shards, edit, expected):
    edit_split(shards, "train", edit)
    assert expected in problems(shards)[0]


def test_shards_at_a_url_are_verified_as_they_lie(shards, tmp_path):
    summary = json.loads(verify(f"file://{shards}", tmp_path / "report", workers=2).read_text())
    assert (summary["samples"], summary["problems"]) == (12, [])
    with pytest.raises(UserError, match="--out"):
        verify(f"file://{shards}", workers=1)


def test_findings_end_with_status_3_and_the_summarys_path(shards, capsys):
    (shards / "train-00000.tar").unlink()
    assert run(lambda: verify(shards, workers=1)) == EXIT_AUDIT
    out, err = capsys.readouterr()
    assert out.strip() == str((shards / "verify" / "summary.json").resolve())
    assert "train-00000.tar is missing" in err
