"""WebDataset tars as a source: members by key, labels from where people put them, and no trust in names and sizes."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_prep.sources.content import Location
from data_prep.sources.opening import open_source
from pipeline.data.photo import BadPhoto
from pipeline.errors import UserError
from tests.data_prep.examples import encode, jpeg

Member = tuple[str, bytes] | tarfile.TarInfo


def write_tar(path: Path, members: list[Member], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of members: a name and bytes, or a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            tar.addfile(header, io.BytesIO(member[1]))
    return path


def header(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """The header of a link, a device or a folder."""
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def text(values: Any) -> bytes:
    """A member in JSON."""
    return json.dumps(values).encode()


def items_of(folder: Path) -> list[Any]:
    """The inputs, after their number was checked."""
    source = open_source(folder)
    items = list(source)
    assert source.total == len(items)
    return items


def bytes_of(item: Any) -> bytes:
    """The photo of an input, which lies in a tar."""
    assert isinstance(item.photo, Location)
    return item.photo.read()


@pytest.mark.parametrize("seed", range(10))
def test_samples_agree_with_webdatasets_own_reader(tmp_path, seed):
    pick = random.Random(seed)
    for tar in range(3):
        members: list[Member] = []
        for number in range(pick.randint(1, 8)):
            key = f"{pick.choice(['', 'a/', 'b c/d/'])}{tar}-{number}"
            members.append((f"{key}.{pick.choice(['jpg', 'JPG', 'jpeg', 'png', 'webp'])}", jpeg(number)))
            members.append((f"{key}.json", text({"label": number % 2, "city": f"c{number}"})))
            if pick.random() < 0.5:
                members.append((f"{key}.mask.png", encode(np.zeros((64, 96), np.uint8), "PNG")))
        write_tar(tmp_path / f"{tar}.tar", members, pick.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]))
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    reference = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    items = items_of(tmp_path)
    assert [item.name.partition("#")[2] for item in items] == [sample["__key__"] for sample in reference]
    for item, sample in zip(items, reference, strict=True):
        told = json.loads(sample["json"])
        (photo,) = (sample[end] for end in ("jpg", "jpeg", "png", "webp") if end in sample)
        assert (bytes_of(item), item.fields) == (photo, {"label": told["label"], "city": told["city"]})
        assert (item.mask and item.mask.read()) == sample.get("mask.png")


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"json": text({"label": 1})}, 1),
        ({"json": text({"Class": "roadwork"})}, "roadwork"),
        ({"json": text({"cls": 0, "weather": "wet"})}, 0),
        ({"json": text({"target": 1, "class": None})}, None),  # the first key decides, even if it is empty
        ({"json": text({"metadata": {"label": 1}})}, 1),
        ({"json": b"1"}, 1),
        ({"json": b"true"}, True),
        ({"cls": b"1\n"}, "1"),
        ({"cls": b"0", "json": text({"city": "Oslo"})}, "0"),
        ({"cls": b"0", "json": text({"label": False})}, False),
        ({"cls": b"1", "json": b"null"}, "1"),
        ({"json": text({"city": "Oslo"})}, None),
    ],
)
def test_the_label_is_in_the_json_or_in_the_class(tmp_path, members, label):
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0)), *((f"a.{end}", data) for end, data in members.items())])
    (item,) = items_of(tmp_path)
    assert (item.problem, item.fields.get("label")) == ("", label)


def test_metadata_are_the_columns_of_a_table_at_the_top_or_below(tmp_path):
    values = {"lat": 1.5, "lng": 2.5, "metadata": {"weather": ["Sunny"], "gps": None}, "url": "x", "mask": "../x.png"}
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0)), ("a.json", text(values))])
    (item,) = items_of(tmp_path)
    assert item.fields == {"gps": None, "latitude": 1.5, "longitude": 2.5, "weather": ["Sunny"]}
    assert item.mask is None


def test_the_split_is_that_of_the_json_or_of_the_tars_name(tmp_path):
    for tar in ("train-0.tar", "validation/0.tar", "0.tar"):
        write_tar(tmp_path / tar, [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.json", text({"split": "test"}))])
    assert [item.fields.get("split") for item in items_of(tmp_path)] == [
        None, "test", "train", "test", "validation", "test",
    ]  # fmt: skip


def test_members_of_a_sample_need_not_lie_together(tmp_path):
    members = [(f"{n}.jpg", jpeg(n)) for n in range(3)] + [(f"{n}.cls", b"01"[n % 2 : n % 2 + 1]) for n in range(3)]
    write_tar(tmp_path / "0.tar", members)
    assert [(item.name, item.fields["label"]) for item in items_of(tmp_path)] == [
        ("0.tar#0", "0"),
        ("0.tar#1", "1"),
        ("0.tar#2", "0"),
    ]


def test_photos_alone_have_no_labels_and_need_no_words(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0)), ("b.left.png", jpeg(1))])
    assert [bytes_of(item) for item in items_of(tmp_path)] == [jpeg(0), jpeg(1)]
    assert open_source(tmp_path).explain_unlabelled() == ""
    assert capsys.readouterr().err == ""


def test_labels_in_members_that_are_not_read_are_a_hint(tmp_path, capsys):
    photo = ("a.jpg", jpeg(0))
    write_tar(tmp_path / "0.tar", [photo, ("a.txt", b"1"), ("a.pyd", b"\x80")])
    with pytest.raises(UserError, match=r"no \.json or a \.cls|has a \.json or a \.cls member.*\.txt.*write the label"):
        open_source(tmp_path)
    write_tar(tmp_path / "0.tar", [photo, ("a.txt", b"1"), ("a.cls", b"1")])
    assert [item.fields for item in items_of(tmp_path)] == [{"label": "1"}]
    assert "members that are not read: .txt (1)" in capsys.readouterr().err


def test_every_member_that_is_no_sample_is_rejected_by_name(tmp_path):
    good = [("ok.jpg", jpeg(0)), ("ok.json", b"{}")]
    members: list[Member] = [
        header("folder", tarfile.DIRTYPE),
        ("folder/._ok.jpg", b"of another system"),
        ("__meta__.json", b"{}"),
        *good,
        header("link.jpg", tarfile.SYMTYPE, "/etc/hostname"),
        header("hard.jpg", tarfile.LNKTYPE, "ok.jpg"),
        header("device.jpg", tarfile.CHRTYPE),
        header("pipe.jpg", tarfile.FIFOTYPE),
        ("README", b"words"),
        ("two.jpg", jpeg(1)), ("two.jpg", jpeg(2)),
        ("both.jpg", jpeg(1)), ("both.png", jpeg(2)),
        ("20.01.jpg", jpeg(1)), ("20.02.jpg", jpeg(1)),
        ("none.json", b"{}"),
        ("torn.jpg", jpeg(1)), ("torn.json", b"{"),
        ("deep.jpg", jpeg(1)), ("deep.json", b'{"a":' * 100 + b"1" + b"}" * 100),
        ("differ.jpg", jpeg(1)), ("differ.json", b"1"), ("differ.cls", b"0"),
        ("long.jpg", jpeg(1)), ("long.cls", b"1" * 2000),
        ("../../escape.jpg", jpeg(3)),
        ("/etc/passwd.jpg", jpeg(3)),
    ]  # fmt: skip
    write_tar(tmp_path / "in" / "0.tar", members)
    before = sorted(os.walk(tmp_path))
    problems = {item.name.removeprefix("0.tar#"): item.problem for item in items_of(tmp_path / "in")}
    assert sorted(os.walk(tmp_path)) == before
    expected = {
        "ok": "", "link": "is a link", "hard": "is a link", "device": "a device", "pipe": "a device",
        "README": "no key and extension", "two": "several members .jpg", "both": "several photos have the same key",
        "20": "several photos have the same key: .01.jpg, .02.jpg; a key ends at the first dot", "none": "no photo",
        "torn": "its .json cannot be read: it is not JSON", "deep": "nested more than", "differ": "its .cls '0'",
        "long": "more than 1,024", "../../escape": "", "/etc/passwd": "",
    }  # fmt: skip
    assert problems.keys() == expected.keys()
    assert [name for name, words in expected.items() if bool(words) != bool(problems[name])] == []
    assert [name for name, words in expected.items() if words not in problems[name]] == []


def test_a_tar_that_is_cut_off_anywhere_is_one_sentence_with_its_name(tmp_path):
    members = [(f"{n}.jpg", jpeg(n)) for n in range(3)] + [(f"{n}.json", b"{}") for n in range(3)]
    path = write_tar(tmp_path / "train-7.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + 512 for member in tar.getmembers())
    for length in [0, 1, 511, 512, 513, *range(600, end, 97), *range(512, end, 512), end]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"the tar .*train-7\.tar is (damaged or )?cut off"):
            open_source(tmp_path)
    path.write_bytes(whole[: end + 512])  # one block of zeros is an end mark
    assert len(items_of(tmp_path)) == 3


def test_joined_and_compressed_tars_are_refused_with_the_way_out(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0))])
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match=r"0\.tar goes on after its end mark"):
        open_source(tmp_path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"0\.tar is compressed; decompress it first"):
        open_source(tmp_path)
    path.rename(tmp_path / "0.tar.gz")
    with pytest.raises(UserError, match=r"compressed tars, such as '0\.tar\.gz'"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="is a file; --source names the folder"):
        open_source(tmp_path / "0.tar.gz")


def test_what_is_called_a_tar_and_is_none_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"0\.tar is not a file"):
        open_source(tmp_path)
    (tmp_path / "0.tar").unlink()
    write_tar(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match="hold no samples"):
        open_source(tmp_path)


def test_tars_beside_photos_are_told_and_a_table_comes_first(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0))])
    (tmp_path / "b.jpg").write_bytes(jpeg(1))
    assert [item.name for item in items_of(tmp_path)] == ["b.jpg"]
    assert "tars and tables beside photos are not read: 1, such as '0.tar'" in capsys.readouterr().err
    (tmp_path / "metadata.csv").write_text("file_name,label\nb.jpg,1\n")
    assert [item.fields for item in items_of(tmp_path)] == [{"label": "1"}]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_headers_that_claim_huge_sizes_take_little_memory(tmp_path, kind):
    made = header("a.jpg", kind)
    made.size = 2**40
    path = tmp_path / "0.tar"
    path.write_bytes(made.tobuf(tarfile.GNU_FORMAT) + jpeg(0))
    os.truncate(path, 2**40 + 4096)  # a file with a hole takes no space
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == tarfile.REGTYPE:
        (item,) = items_of(tmp_path)
        with pytest.raises(BadPhoto, match="larger than 256 MB"):
            bytes_of(item)
    else:
        with pytest.raises(UserError, match=r"0\.tar is damaged or cut off .*: a header that is too long"):
            open_source(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_inputs_or_one_sentence(tmp_path, seed):
    pick = random.Random(seed)
    members: list[Member] = []
    for number in range(4):
        members += [(f"{number}.jpg", b"x" * 700), (f"{number}.json", text({"label": 1, "gps": "1.5, 2.5"}))]
    members.append(("long" * 60 + ".jpg", b"x"))
    path = write_tar(tmp_path / "0.tar", members, pick.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    sound = path.read_bytes()
    for _ in range(25):
        data = bytearray(sound)
        for _ in range(pick.randint(1, 6)):
            place = pick.randrange(len(data) // 512) * 512 + pick.randrange(512)
            data[place] = pick.choice([0, 255, 128, 0x78, pick.randrange(256)])
            if pick.random() < 0.8:  # a header whose sum is right again gets further
                start = place - place % 512
                total = sum(data[start : start + 148]) + 256 + sum(data[start + 156 : start + 512])
                data[start + 148 : start + 156] = b"%06o\0 " % total
        path.write_bytes(data)
        sentence = ""
        try:
            for item in open_source(tmp_path):
                if item.photo is not None:
                    bytes_of(item)
        except UserError as error:
            sentence = str(error)
        assert "\n" not in sentence
