"""The first pass over a source: what it tells the user, and what it keeps for the second."""

from __future__ import annotations

import errno
import hashlib
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.photos.inspection import Scrutiny
from data_prep.shards.intake import Intake, Spool, take_in
from data_prep.sources.content import Location
from data_prep.sources.opening import open_source
from data_prep.work.parallel import Workers
from tests.data_prep.examples import encode, jpeg, jpeg_at, write_folder
from tests.data_prep.sources.annotations import SQUARE, image_of, object_of, write_coco


def intake_of(source: Path, work: Path, metadata: Path | None = None, masks: Path | None = None) -> Intake:
    """What is taken in, by this process."""
    work.mkdir(exist_ok=True)
    scrutiny = Scrutiny(masks=None if masks is None else str(masks))
    return take_in(open_source(source, metadata), work, Workers(1), scrutiny)


def said(captured: Any) -> list[str]:
    """What the user hears beside the progress."""
    return [line for line in captured.readouterr().err.splitlines() if not line.startswith("checking: ")]


def test_a_set_without_labels_is_taken_in_and_the_user_hears_why(tmp_path, capsys):
    source = write_folder(tmp_path / "in", [{"file_name": f"{n}.jpg", "roadwork": n % 2} for n in range(3)])
    assert len(intake_of(source, tmp_path / "work").photos) == 3
    table = source / "metadata.csv"
    columns = "file_name, roadwork"
    assert said(capsys) == [f"no photo has a label: {table} has no column 'label'; its columns are {columns}"]


@pytest.mark.parametrize("label", ["1", "0"])
def test_one_label_is_enough_for_silence(tmp_path, capsys, label):
    rows = [{"file_name": "a.jpg", "label": ""}, {"file_name": "b.jpg", "label": label}]
    intake_of(write_folder(tmp_path / "in", rows), tmp_path / "work")
    assert said(capsys) == []


def test_a_bare_folder_needs_no_words(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg(0))
    intake_of(tmp_path / "in", tmp_path / "work")
    assert said(capsys) == []


def test_unknown_categories_are_among_the_unknown_words(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    categories = [{"id": 18, "name": "Worker"}, {"id": 5, "name": "Dragon"}]
    dragon = {"id": 2, "image_id": 1, "category_id": 5, "segmentation": [SQUARE]}
    annotations = [object_of(2, "Worker", [SQUARE]), dragon, {**dragon, "id": 3}]
    file = write_coco(tmp_path / "in", [image_of(1), image_of(2)], annotations, categories)
    intake = intake_of(tmp_path / "in", tmp_path / "work", file)
    assert intake.unknown_words == {"category": {"Dragon": 2}}
    assert [photo.parsed.label for photo in intake.photos] == [None, 1]
    file = write_coco(tmp_path / "in", [image_of(1)], [dragon], categories)
    (tmp_path / "in" / "2.jpg").unlink()
    capsys.readouterr()
    intake_of(tmp_path / "in", tmp_path / "work", file)
    assert "only objects of unknown categories" in said(capsys)[-1]


def test_a_folder_of_masks_that_fits_no_photo_is_told(tmp_path, capsys):
    source = write_folder(tmp_path / "in", [{"file_name": f"{n}.jpg", "label": n % 2} for n in range(3)])
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "0.png").write_bytes(encode(np.zeros((64, 96), dtype=np.uint8), "PNG"))
    intake_of(source, tmp_path / "work", masks=masks)
    (sentence,) = said(capsys)
    assert sentence.startswith(f"0 of 3 photos have their mask from {masks}")
    name = hashlib.sha256((source / "0.jpg").read_bytes()).hexdigest()
    (masks / "0.png").rename(masks / f"{name}.png")
    intake = intake_of(source, tmp_path / "work", masks=masks)
    assert [photo.mask is not None for photo in intake.photos] == [True, False, False]
    assert said(capsys) == []


def test_a_mask_that_could_not_be_read_is_looked_at_again(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "in", [{"file_name": f"{n}.jpg", "label": n % 2} for n in range(2)])
    masks = tmp_path / "masks"
    mask = masks / f"{hashlib.sha256((source / '0.jpg').read_bytes()).hexdigest()}.png"
    masks.mkdir()
    mask.write_bytes(encode(np.zeros((64, 96), dtype=np.uint8), "PNG"))
    read = Location.read

    def deny(location: Location) -> bytes:
        if location.path == str(mask):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(location)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "read", deny)
        (reject,) = intake_of(source, tmp_path / "work", masks=masks).rejects
    assert (reject.path, reject.reason) == ("0.jpg", "its mask cannot be read: Permission denied")
    intake = intake_of(source, tmp_path / "work", masks=masks)
    assert [photo.mask is not None for photo in intake.photos] == [True, False]


def test_what_a_spool_keeps_is_there_for_other_processes(tmp_path):
    spool = Spool(tmp_path / "spool")
    photos = [jpeg(seed) for seed in range(3)]
    kept = [spool.keep(photo) for photo in photos]
    assert [location.read() for location in kept] == photos  # before the spool is closed
    assert spool.keep(kept[0]) is kept[0]
    spool.close()
    assert [location.read() for location in kept] == photos


def test_a_spool_that_runs_out_of_space_never_keeps_a_part(tmp_path):
    spool = Spool(tmp_path / "spool")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A system that has space for a part of the bytes writes this part, and refuses only the next write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r".*") as caught:
            spool.keep(bytes(1500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    spool.close()


def test_gps_that_cannot_be_read_is_named_with_counts_and_an_example(tmp_path, capsys):
    cells = ["39,7716", "somewhere", "39.77 -86.19", "", "nowhere", "0, 0"]
    rows = [{"file_name": f"{n}.jpg", "label": n % 2, "gps": cell} for n, cell in enumerate(cells)]
    intake = intake_of(write_folder(tmp_path / "in", rows), tmp_path / "work")
    assert [photo.parsed.metadata.gps for photo in intake.photos] == [None, None, (39.77, -86.19), None, None, None]
    assert said(capsys) == [
        "GPS that is read as NULL: 2 unreadable (such as ['somewhere'] of '1.jpg'); 1 with one number instead of two "
        "(such as ['39,7716'] of '0.jpg'); 1 zero (such as ['0, 0'] of '5.jpg')"
    ]
    assert dict(intake.gps.problems) == {"with one number instead of two": 1, "unreadable": 2, "zero": 1}


def test_swapped_columns_are_doubted_by_the_polar_circle_and_by_exif(tmp_path, capsys):
    rows = [{"file_name": f"{n}.jpg", "label": n % 2, "lat": -86.19, "lon": 39.77} for n in range(3)]
    intake_of(write_folder(tmp_path / "in", rows), tmp_path / "work")
    (sentence,) = said(capsys)
    assert "3 of 3 places lie beyond 66 degrees of latitude, perhaps latitude and longitude are swapped" in sentence
    assert "latitude comes first" in sentence
    for row in rows:
        row |= {"lat": 4.84, "lon": 45.76}
    source = write_folder(tmp_path / "lyon", rows)
    for n in range(3):
        (source / f"{n}.jpg").write_bytes(jpeg_at(n, 45.76, 4.84))
    intake_of(source, tmp_path / "work-2")
    (sentence,) = said(capsys)
    assert "3 of 3 places have latitude and longitude swapped, says the photos' EXIF" in sentence
