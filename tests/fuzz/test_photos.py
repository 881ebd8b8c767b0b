"""Damaged photos: what is accepted has the pixels of the good photo where only metadata changed, else one BadPhoto."""

from __future__ import annotations

import os
import random
import warnings
from functools import cache

import numpy as np
from PIL import Image

from data_prep.photos.inspection import exif_gps
from pipeline.data.photo import BadPhoto, decode, decode_mask, open_header, probe
from tests.fuzz.mutation import mutate
from tests.fuzz.photos import HEIGHT, METADATA, WIDTH, bases, exif_block, with_metadata, with_size
from tests.fuzz.workers import failures

CASES = int(os.environ.get("ROADWORK_FUZZ_CASES", "3000"))
SEED = int(os.environ.get("ROADWORK_FUZZ_SEED", "20"))
# Turns a stored picture upright, by orientation: EXIF 2.32, section 4.6.4.
UPRIGHT = {
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1), 6: lambda p: np.rot90(p, -1), 7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}  # fmt: skip


@cache
def stored_pixels(number: int) -> np.ndarray:
    return decode(bases()[number].data)


def check_metadata(rng: random.Random) -> None:
    """Damage only metadata: the photo is accepted, with the same pixels, turned at most."""
    number = rng.randrange(len(bases()))
    data = with_metadata(bases()[number], rng, rng.choice(METADATA)(exif_block(rng), rng))
    header = open_header(data)
    assert header.orientation == pillows_orientation(data, header.orientation)
    pixels = decode(data)
    assert probe(data) == (pixels.shape[1], pixels.shape[0])
    np.testing.assert_array_equal(pixels, UPRIGHT[header.orientation](stored_pixels(number)))
    gps = exif_gps(header)
    assert gps is None or (abs(gps[0]) <= 90 and abs(gps[1]) <= 180)


def pillows_orientation(data: bytes, ours: int) -> int:
    """What Pillow reads, where it finds one; else ours, since it gives up at the first tag that lies outside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = Image.Exif()
            exif.load(open_header(data).parts.exif)
            theirs = exif.get(274)
    except Exception:
        return ours
    return theirs if isinstance(theirs, int) and 1 <= theirs <= 8 else ours


def check_anything(rng: random.Random) -> None:
    """Damage any bytes, or the size: a photo as its header says, or one reason."""
    base = bases()[rng.randrange(len(bases()))]
    if rng.random() < 0.1:
        data = with_size(base, rng)
    elif rng.random() < 0.2:
        data = mutate(base.data[:64], rng) + base.data[64:]
    else:
        data = mutate(with_metadata(base, rng, exif_block(rng)), rng)
    for decoder in (decode, lambda data: decode(data, at_least_px=rng.choice((20, 40)))):
        try:
            size = probe(data)
            exif_gps(open_header(data))
            pixels = decoder(data)
        except BadPhoto as bad:
            check_reason(bad)
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert decoder is not decode or size == (pixels.shape[1], pixels.shape[0])
    try:
        assert decode_mask(data).ndim == 2
    except BadPhoto as bad:
        check_reason(bad)


def check_reason(bad: BadPhoto) -> None:
    assert 0 < len(str(bad)) < 160
    assert "\n" not in str(bad)


def check_case(number: int) -> None:
    rng = random.Random(f"{SEED} {number}")
    (check_metadata if number % 2 else check_anything)(rng)


def test_damaged_photos_are_accepted_rightly_or_refused_with_a_reason():
    for number in range(len(bases())):
        assert stored_pixels(number).shape == (HEIGHT, WIDTH, 3)  # before the fork, so that all workers have them
    found = failures(check_case, range(CASES))
    report = "\n".join(f"case {number} of seed {SEED}: {problem}" for number, problem in sorted(found.items())[:5])
    assert not found, f"{len(found)} of {CASES}:\n{report}"


def test_the_bases_are_good_photos_with_and_without_metadata():
    rng = random.Random(1)
    for number, base in enumerate(bases()):
        block = exif_block(rng)
        data = with_metadata(base, rng, block)
        exif = Image.Exif()
        exif.load(block)
        header = open_header(data)
        assert header.orientation == exif[274]
        assert header.stored_size == (WIDTH, HEIGHT)
        np.testing.assert_array_equal(decode(data), UPRIGHT[header.orientation](stored_pixels(number)))
        assert exif_gps(header) == (39.7716111, -86.18825)
