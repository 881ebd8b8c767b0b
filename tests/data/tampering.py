"""Tars that were changed after they were written, some of them with an index that was changed along."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from pipeline.data.index import Split, read_index
from pipeline.files import sha256_of, write_json

Member = tuple[tarfile.TarInfo, bytes]


def read_members(path: Path) -> list[Member]:
    """Headers and data of a tar, in order."""
    with tarfile.open(path) as tar:
        files = [(member, tar.extractfile(member)) for member in tar]
        return [(member, file.read() if file else b"") for member, file in files]


def write_members(path: Path, members: list[Member]) -> list[int]:
    """Write a tar; returns the offsets of the data."""
    offsets = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(member, io.BytesIO(data))
    return offsets


def plain(name: str, data: bytes = b"x") -> Member:
    """A regular member."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header, data


def special(name: str, kind: bytes, data: bytes = b"") -> Member:
    """A link or a device, which usually has no data."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.size = kind, "/etc/passwd", len(data)
    return header, data


def edit_split(folder: Path, split: str, edit: Callable[[dict], object]) -> None:
    """Change a split in the index."""
    values = json.loads((folder / "index.json").read_text())
    edit(values["splits"][split])
    write_json(folder / "index.json", values)


def tamper(path: Path, change: Callable[[list[Member]], list[Member]]) -> None:
    """Change the members of a tar, and its length and hash in the index with them."""
    write_members(path, change(read_members(path)))

    def follow(split: dict) -> None:
        shard = next(shard for shard in split["shards"] if shard["name"] == path.name)
        shard.update(bytes=path.stat().st_size, sha256=sha256_of(path))

    edit_split(path.parent, path.name.split("-")[0], follow)


def distribute(folder: Path, split: str, tars: int) -> Split:
    """Deal the samples of a split's only tar out to several tars, as equal in number as can be."""
    first = folder / f"{split}-00000.tar"
    members: dict[str, list[Member]] = {}
    for member, data in read_members(first):
        members.setdefault(member.name.split(".")[0], []).append((member, data))

    def deal(values: dict) -> None:
        total, samples, shards = len(values["samples"]), [], []
        for number in range(tars):
            part = values["samples"][number * total // tars : (number + 1) * total // tars]
            path = folder / f"{split}-{number:05d}.tar"
            files = [file for sample in part for file in members[sample["key"]]]
            places = dict(zip((file[0].name for file in files), write_members(path, files), strict=True))
            for sample in part:
                sample["shard"] = number
                for extension, place in sample["members"].items():
                    place[0] = places[f"{sample['key']}.{extension}"]
            samples += part
            shards.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path),
                           "samples": len(part)})  # fmt: skip
        values.update(samples=samples, shards=shards)

    edit_split(folder, split, deal)
    return read_index(folder).split(split)


def without(name: str) -> Callable[[list[Member]], list[Member]]:
    """A change that drops a member."""
    return lambda members: [member for member in members if member[0].name != name]


def without_hashes(split: dict) -> None:
    """A change of a split in the index, to what it was in shards of before December 2026."""
    for sample in split["samples"]:
        sample["record_sha256"] = None


def swapped_bit(name: str) -> Callable[[list[Member]], list[Member]]:
    """A change of one bit in the middle of a member."""

    def swap(member: Member) -> Member:
        data = bytearray(member[1])
        data[len(data) // 2] ^= 1
        return member[0], bytes(data) if member[0].name == name else member[1]

    return lambda members: [swap(member) for member in members]


# What a hostile or broken tar of train_0, train_1, ... may hold, and the words that name it.
TAMPERED = {
    "a path that leads outside": (lambda m: [*m, plain("../../x")], r"'\.\./\.\./x'"),
    "an absolute path": (lambda m: [*m, plain("/tmp/x")], "'/tmp/x'"),
    "a member twice": (lambda m: [*m, m[0]], r"train_0\.jpg"),
    "a stranger": (lambda m: [*m, plain("train_99.jpg")], r"train_99\.jpg"),
    "a missing photo": (without("train_1.jpg"), r"train_1\b"),
    "a missing record": (without("train_1.json"), r"train_1\b"),
    "another photo": (swapped_bit("train_1.jpg"), "train_1: .*the photo is not the one of its record"),
    "a record with a byte more": (
        lambda m: [plain(x[0].name, x[1] + b" ") if x[0].name == "train_1.json" else x for x in m],
        r"train_1\.json is \d+ bytes",
    ),
    "samples in another order": (lambda m: m[2:] + m[:2], r"train_[01]\b"),
    "a photo that became a link": (
        lambda m: [special(x[0].name, tarfile.SYMTYPE, x[1]) if x[0].name == "train_1.jpg" else x for x in m],
        r"train_1\b",
    ),
}
