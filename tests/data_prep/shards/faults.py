"""A data set in which everything is wrong that is wrong in real ones, and what must become of each input."""

from __future__ import annotations

import csv
import io
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.scenes.data_set import scenes

BOMB_SIDE = 40_000
SWAPPED = "out of range, perhaps latitude and longitude are swapped"


@dataclass
class Expected:
    """What the rows and files of the set must become."""

    inputs: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Stage to number."""
    gps: Counter[str] = field(default_factory=Counter)
    """Why coordinates are dropped."""
    formats: dict[str, str] = field(default_factory=dict)
    """Path to the extension that its content has, where its name says something else."""
    turned: set[str] = field(default_factory=set)
    """Photos that EXIF turns by a quarter."""


class Rows:
    """The rows of the table, handed out a few at a time, no row twice."""

    def __init__(self, rows: list[dict[str, str]], each: int):
        self.rows, self.each, self.taken = rows, each, 0

    def take(self) -> list[dict[str, str]]:
        """The next rows, to be spoilt."""
        self.taken += self.each
        assert self.taken <= len(self.rows), "more faults than photos"
        return self.rows[self.taken - self.each : self.taken]


def make_faulty_set(folder: Path, images: int, each: int) -> Expected:
    """Draw scenes and spoil some: `each` of every kind of fault.

    Args:
        folder: To make.
        images: Scenes to begin with, enough for all faults.
        each: Inputs with each fault.
    """
    scenes(folder, images=images, size="320x240", seed=8)
    with (folder / "metadata.csv").open(newline="") as stream:
        rows = Rows(list(csv.DictReader(stream)), each)
    for row in rows.rows:
        row["gps"] = "[59.91, 10.75]"  # scenes have some faults of their own here
    expected = Expected()
    _spoil_files(folder, rows, expected)
    _rename(folder, rows)
    _spoil_gps(rows, expected)
    for row in rows.take():
        row["label"] = "maybe"
    table = [
        *rows.rows,
        *(dict(row) for row in rows.take()),  # twice the same photo
        *({**row, "file_name": f"images/gone-{n}.jpg", "mask": ""} for n, row in enumerate(rows.take())),
        *({**row, "file_name": f"images/{'n' * 300}{n}.jpg", "mask": ""} for n, row in enumerate(rows.take())),
    ]
    for number in range(each):  # no row names them
        (folder / "images" / f"unnamed-{number}.png").write_bytes(_png(Image.new("RGB", (64, 64))))
    # Twice the same, gone, gone with a long name, and two kinds of files that no row names: one is the masks of photos
    # that EXIF turns, since a mask has no EXIF.
    expected.rejected.update(source=5 * each, metadata=each)
    expected.inputs = len(table) + 2 * each
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return expected


def _spoil_files(folder: Path, rows: Rows, expected: Expected) -> None:
    def path_of(row: dict[str, str]) -> Path:
        return folder / row["file_name"]

    for row in rows.take():
        data = path_of(row).read_bytes()
        path_of(row).write_bytes(data[: len(data) // 2])
    for row in rows.take():
        path_of(row).write_bytes(b"")
    for row in rows.take():
        path_of(row).write_bytes(_png(Image.new("RGB", (1, 1))))
    for row in rows.take():
        path_of(row).write_bytes(_png_header(BOMB_SIDE))
    for row in rows.take():
        path_of(row).write_bytes(_jpeg_of_size(path_of(row).read_bytes(), BOMB_SIDE))
    expected.rejected["decode"] += 5 * rows.each
    for row in rows.take():
        path_of(row).write_bytes(_png(Image.open(path_of(row))))
        expected.formats[row["file_name"]] = "png"
    for row in rows.take():
        Image.open(path_of(row)).convert("CMYK").save(path_of(row), "JPEG")
    for row in rows.take():
        grey = np.asarray(Image.open(path_of(row)).convert("L")).astype(np.uint16) * 257
        path_of(row).write_bytes(_png(Image.fromarray(grey)))
        expected.formats[row["file_name"]] = "png"
    for row in rows.take():
        exif = Image.Exif()
        exif[274] = 6
        Image.open(path_of(row)).save(path_of(row), "JPEG", exif=exif)
        row["mask"] = ""
        expected.turned.add(row["file_name"])


def _rename(folder: Path, rows: Rows) -> None:
    for number, row in enumerate(rows.take()):
        name = f"images/Straße 東京 é{number}.jpg"
        (folder / row["file_name"]).rename(folder / name)
        row["file_name"] = name
    deep = Path("images") / ("d" * 120) / ("e" * 120)
    (folder / deep).mkdir(parents=True)
    for number, row in enumerate(rows.take()):
        name = f"{deep}/{'f' * 80}{number}.jpg"
        (folder / row["file_name"]).rename(folder / name)
        row["file_name"] = name


def _spoil_gps(rows: Rows, expected: Expected) -> None:
    for value, reason in (
        ("nan", ""),
        ("[nan, nan]", ""),
        ("", ""),
        ("(0, 0)", "zero"),
        ("['0.0', '0.0']", "zero"),
        ("[91.0, 10.0]", SWAPPED),
        ("[91.0, 110.0]", "out of range"),
        ("[139.6917, 35.6895]", SWAPPED),
        ("somewhere", "unreadable"),
        ("[inf, 4.0]", "not finite"),
    ):
        for row in rows.take():
            row["gps"] = value
            if reason:
                expected.gps[reason] += 1


def _png(image: Image.Image) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, "PNG")
        return stream.getvalue()


def _png_header(side: int) -> bytes:
    """A file of a few bytes that promises side x side pixels."""
    header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _jpeg_of_size(data: bytes, side: int) -> bytes:
    """The same JPEG, whose frame header promises side x side pixels."""
    start = data.index(b"\xff\xc0")  # SOF0: marker, length, precision, height, width
    return data[: start + 5] + struct.pack(">HH", side, side) + data[start + 9 :]
