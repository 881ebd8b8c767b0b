"""The command `audit`: planted leaks are found and named, a clean set has none, and the numbers are right."""

from __future__ import annotations

import json
import math
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.audit.checks import Distances, near_places
from data_prep.audit.command import audit
from data_prep.audit.job import EXAMPLES
from data_prep.audit.page import PICTURED, metres
from data_prep.shards.command import shard
from pipeline.data.index import read_index
from pipeline.errors import EXIT_AUDIT, EXIT_OK, AuditFailed, UserError
from tests.data_prep.examples import CITIES, city_rows, encode, jpeg, pixels, write_folder, write_table

SPLIT_OF_CITY = dict(zip(CITIES, ["train"] * 5 + ["val"] + ["test"] * 2, strict=True))
PER_CITY = 4
METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of the earth's mean radius
Rows = list[dict[str, Any]]


def clean_rows() -> Rows:
    """Whole cities to each split, 300 m from photo to photo, a video for each."""
    rows = city_rows(PER_CITY)
    for row in rows:
        row.update(split=SPLIT_OF_CITY[row["city_name"]], video=row["file_name"], description="")
    return rows


def row_of(rows: Rows, name: str) -> dict[str, Any]:
    return next(row for row in rows if row["file_name"] == name)


def make_shards(folder: Path, rows: Rows, photos: dict[str, bytes] | None = None) -> Path:
    """Shards of a folder whose own splits are kept, with some photos replaced."""
    source = write_folder(folder / "in", rows)
    for name, data in (photos or {}).items():
        (source / name).write_bytes(data)
    shard(source, folder / "out", splits="keep", val_share=0, workers=1)
    return folder / "out"


def findings(shards: Path, **options: Any) -> dict[str, Any]:
    with pytest.raises(AuditFailed) as caught:
        audit(shards, workers=1, **options)
    return json.loads(caught.value.summary.read_text())


def sources(section: dict[str, Any]) -> list[list[str]]:
    return [[photo["source"] for photo in example["photos"]] for example in section["examples"]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("clean"), clean_rows())


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Every leak at once, in a set whose names look like markup."""
    rows = clean_rows()
    seed = rows.index(row_of(rows, "Oslo-2.jpg"))
    for name in ("Oslo-0.jpg", "Oslo-1.jpg", "Delhi-0.jpg"):
        row_of(rows, name)["video"] = "drive <i>7</i>"
    latitude, longitude = CITIES["Lyon"]
    row_of(rows, "Cairo-1.jpg")["gps"] = f"[{latitude + 30 / METRES_PER_DEGREE:.8f}, {longitude}]"
    row_of(rows, "Cairo-2.jpg")["file_name"] = "<b>copy.jpg"
    for row in rows:
        row["description"] = "Cones block a lane." if row["label"] else ""
    photos = {
        "<b>copy.jpg": jpeg(rows.index(row_of(rows, "Lyon-0.jpg"))),
        "Delhi-2.jpg": encode(pixels(seed), quality=40),
        "Lima-1.jpg": encode(pixels(rows.index(row_of(rows, "Lima-0.jpg"))), quality=40),
    }
    return make_shards(tmp_path_factory.mktemp("planted"), rows, photos)


@pytest.fixture(scope="module")
def clean_summary(clean) -> dict[str, Any]:
    return json.loads(audit(clean, workers=1).read_text())


@pytest.fixture(scope="module")
def planted_summary(planted) -> dict[str, Any]:
    return findings(planted)


def test_a_clean_set_has_no_leak(clean, clean_summary):
    summary = clean_summary
    assert (summary["leaks"], summary["samples"]) == ([], 32)
    for name in ("videos", "places", "copies", "look_alikes", "label_conflicts"):
        assert summary[name] == {"count": 0, "examples": []}
    assert (clean / "audit" / "findings.jsonl").read_text() == ""
    assert "leak found in 32 photos" in (clean / "audit" / "audit.html").read_text()


def test_geographic_splits_of_the_same_photos_have_no_leak(tmp_path):
    shard(write_folder(tmp_path / "in", city_rows(3)), tmp_path / "out", workers=1)
    assert json.loads(audit(tmp_path / "out", workers=1).read_text())["leaks"] == []


def test_all_planted_leaks_are_found_and_named(planted_summary):
    summary = planted_summary
    assert summary["leaks"] == [
        "1 video has frames in several splits",
        "1 photo lies within 100 m of a photo of another split",
        "1 file is in several splits",
        "1 set of look-alikes lies in two splits",
        "the field description tells the label: known exactly where the label is roadwork (MCC 1.00)",
    ]
    assert sorted(sources(summary["videos"])[0])[0] == "Delhi-0.jpg"
    assert summary["videos"]["examples"][0]["note"] == "video drive <i>7</i>: 2 in train, 1 in test"
    assert sources(summary["places"]) == [["Lyon-0.jpg", "Cairo-1.jpg"]]
    assert summary["places"]["examples"][0]["distance_m"] == pytest.approx(30, abs=0.1)
    assert sources(summary["copies"]) == [["Lyon-0.jpg", "<b>copy.jpg"]]
    assert sources(summary["look_alikes"]) == [["Oslo-2.jpg", "Delhi-2.jpg"]]
    assert summary["look_alikes"]["examples"][0]["note"].startswith("1 in train, 1 in test; these two differ in ")


def test_each_finding_says_where_its_photos_are(planted, planted_summary):
    samples = {s.key: (name, s.label) for name, split in read_index(planted).splits.items() for s in split.samples}
    for name in ("videos", "places", "copies", "look_alikes"):
        for photo in planted_summary[name]["examples"][0]["photos"]:
            assert samples[photo["key"]] == (photo["split"], photo["label"])


def test_look_alikes_inside_a_split_are_counted_apart_from_those_across(planted_summary):
    counts = {name: split["look_alikes"] for name, split in planted_summary["splits"].items()}
    assert counts == {"train": 2, "val": 0, "test": 0}


def test_pictures_with_both_labels_are_shown_but_are_no_leak(planted_summary):
    summary = planted_summary
    assert summary["label_conflicts"]["count"] == 1
    assert sorted(sources(summary["label_conflicts"])[0]) == ["Lima-0.jpg", "Lima-1.jpg"]
    assert not any("both labels" in leak for leak in summary["leaks"])


def test_an_unlabelled_copy_does_not_hide_that_two_labels_disagree(tmp_path):
    cities = ("Oslo", "Lyon", "Lima", "Perth")  # several, for the order in which copies come is drawn
    rows, same = clean_rows(), {}
    for seed, city in enumerate(cities):
        for number, label in enumerate((0, "", 1)):
            row_of(rows, f"{city}-{number}.jpg")["label"] = label
            same[f"{city}-{number}.jpg"] = jpeg(100 + seed)
    summary = json.loads(audit(make_shards(tmp_path, rows, same), workers=1).read_text())
    assert sorted(sorted(pair) for pair in sources(summary["label_conflicts"])) == sorted(
        [f"{city}-0.jpg", f"{city}-2.jpg"] for city in cities
    )


def test_an_accepted_field_is_no_leak_and_stays_named(tmp_path):
    rows = clean_rows()
    for row in rows:
        row["description"] = "Cones." if row["label"] else ""
    shards = make_shards(tmp_path, rows)
    assert findings(shards)["fields"]["description"]["accepted"] is False
    summary = json.loads(audit(shards, accept=["description"], workers=1).read_text())
    assert summary["leaks"] == []
    assert summary["fields"]["description"]["accepted"] is True
    assert "roadwork" in summary["fields"]["description"]["leaks"]


def test_a_leaking_field_of_the_source_alone_is_named_and_is_no_leak(tmp_path):
    rows = clean_rows()
    for row in rows:
        row["travel_alteration"] = "['Lane Shift']" if row["label"] else "['Open']"
    shards = make_shards(tmp_path, rows)
    index = json.loads((shards / "index.json").read_text())
    field = {"null_rate": 0.0, "null_mcc": None, "cramers_v": 1.0, "leaks": "its values tell the label"}
    (shards / "index.json").write_text(json.dumps({**index, "fields": {"travel_alteration": field}}))
    summary = json.loads(audit(shards, workers=1).read_text())
    assert summary["leaks"] == []
    assert summary["fields"]["travel_alteration"]["leaks"] == "its values tell the label"
    assert summary["fields"]["travel_alteration"]["in_shards"] is False
    page = (shards / "audit" / "audit.html").read_text()
    assert "the source has it, the shards do not" in page


def test_accepting_a_field_that_does_not_exist_is_refused(clean):
    with pytest.raises(UserError, match="--accept 'descripton' is no field of these shards; there are gps, weather"):
        audit(clean, accept=["descripton"], workers=1)


def haversine(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Metres, by the chord through the earth."""
    vectors = []
    for degrees in (first, second):
        latitude, longitude = np.radians(degrees)
        vectors.append(np.array([math.cos(longitude), math.sin(longitude), 0]) * math.cos(latitude))
        vectors[-1][2] = math.sin(latitude)
    return 2 * 6_371_008.8 * math.asin(np.linalg.norm(vectors[0] - vectors[1]) / 2)


def test_distances_between_splits_are_those_of_a_plain_search(clean_summary):
    places: dict[str, list[tuple[float, float]]] = {}
    for row in clean_rows():
        places.setdefault(row["split"], []).append(tuple(json.loads(row["gps"])))
    assert [(d["from"], d["to"]) for d in clean_summary["distances"]] == [
        ("val", "train"),
        ("test", "train"),
        ("test", "val"),
    ]
    for described in clean_summary["distances"]:
        nearest = [min(haversine(a, b) for b in places[described["to"]]) for a in places[described["from"]]]
        assert described["photos"] == len(nearest)
        assert described["within"] == 0
        assert described["min_m"] == pytest.approx(min(nearest), rel=1e-5)
        assert described["p25_m"] == pytest.approx(np.quantile(nearest, 0.25), rel=1e-5)
        assert described["median_m"] == pytest.approx(np.median(nearest), rel=1e-5)


def test_the_distance_decides_which_photos_are_too_near(tmp_path):
    rows = clean_rows()
    row_of(rows, "Oslo-0.jpg")["split"] = "test"  # the next photo of Oslo is 300 m away
    shards = make_shards(tmp_path, rows)
    assert json.loads(audit(shards, distance_m=299, workers=1).read_text())["places"]["count"] == 0
    summary = findings(shards, distance_m=301)
    assert sources(summary["places"]) == [["Oslo-1.jpg", "Oslo-0.jpg"]]
    assert summary["leaks"] == ["1 photo lies within 301 m of a photo of another split"]


def test_a_photo_near_two_splits_is_shown_with_the_nearest_photo_of_both():
    row = np.array([5])
    to_train = Distances("test", "train", row, nearest=np.array([0]), metres=np.array([3.0]))
    to_val = Distances("test", "val", row, nearest=np.array([2]), metres=np.array([8.0]))
    for pairs in ((to_train, to_val), (to_val, to_train)):
        (finding,) = near_places(pairs, 10.0)
        assert (finding.rows, finding.distance_m) == ((0, 5), 3.0)


def test_splits_fields_and_clusters_are_counted(tmp_path):
    rows = clean_rows()
    for number, row in enumerate(rows):
        row["weather"] = "Sunny" if number % 4 else ""
        row["label"] = "" if row["file_name"] == "Delhi-3.jpg" else row["label"]
    row_of(rows, "Delhi-0.jpg")["gps"] = ""
    row_of(rows, "Delhi-1.jpg")["video"] = row_of(rows, "Delhi-0.jpg")["video"]
    same = {"Cairo-1.jpg": jpeg(rows.index(row_of(rows, "Cairo-3.jpg")))}
    summary = json.loads(audit(make_shards(tmp_path, rows, same), workers=1).read_text())
    test = summary["splits"]["test"]
    counted = ("samples", "roadwork", "none", "unlabelled", "videos", "cities", "look_alikes")
    assert [test[name] for name in counted] == [8, 3, 4, 1, 7, 2, 2]
    assert test["roadwork_share"] == pytest.approx(3 / 7, abs=1e-4)
    assert test["groups"] == 6  # the copies of Cairo are one, and the frames of Delhi another
    assert summary["fields"]["weather"]["null_rate"] == 0.25
    assert summary["fields"]["weather"]["null_rates"] == {"train": 0.25, "val": 0.25, "test": 0.25}
    assert summary["fields"]["gps"]["null_rates"]["test"] == 1 / 8
    clusters = summary["clusters"]
    assert clusters[0]["samples"] == {"train": 0, "val": 0, "test": 1}
    assert clusters[0]["mean_weight"] is None
    assert sum(sum(cluster["samples"].values()) for cluster in clusters) == 32
    index = read_index(tmp_path / "out")
    trained = [sample for sample in index.splits["train"].samples if sample.cluster == 1]
    assert clusters[1]["mean_weight"] == pytest.approx(np.mean([sample.weight for sample in trained]), abs=1e-4)


def test_every_finding_is_listed_beside_the_page_which_shows_some(tmp_path):
    rows = [row | {"split": ("train", "test")[n % 2], "video": f"v{n // 2}"} for n, row in enumerate(clean_rows() * 2)]
    for n, row in enumerate(rows):
        row["file_name"] = f"{n}-{row['file_name']}"
    shards = make_shards(tmp_path, rows)
    summary = findings(shards)
    lines = [json.loads(line) for line in (shards / "audit" / "findings.jsonl").read_text().splitlines()]
    videos = [line for line in lines if line["kind"] == "videos"]
    assert summary["videos"]["count"] == len(videos) == 32 > EXAMPLES == len(summary["videos"]["examples"])
    assert [{"kind": "videos", **example} for example in summary["videos"]["examples"]] == videos[:EXAMPLES]
    page = (shards / "audit" / "audit.html").read_text()
    assert page.count("<figcaption>video v") == PICTURED
    assert f"The first {PICTURED}; <code>findings.jsonl</code>" in page


class Page(HTMLParser):
    """Collects elements, the places they point to, and their text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_asks_for_nothing_from_elsewhere_and_markup_in_the_data_is_text(planted, planted_summary):
    text = (planted / "audit" / "audit.html").read_text()
    page = Page(text)
    assert all(str(link).startswith(("data:image/", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "i"} & set(page.tags)
    assert page.tags.count("b") == 1  # the number of leaks
    assert "@import" not in text
    assert "url(http" not in text
    assert any("<b>copy.jpg" in part for part in page.text)
    assert any("drive <i>7</i>" in part for part in page.text)
    with Image.open(planted / "audit" / "map.png") as image:
        assert image.format == "PNG"


def test_photos_without_gps_or_labels_are_audited_too(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    rows = [{"file_name": f"{n}.jpg", "split": ("train", "test")[n % 2]} for n in range(6)]
    for n, row in enumerate(rows):
        (source / row["file_name"]).write_bytes(jpeg(n))
    write_table(source / "metadata.csv", rows)
    shard(source, tmp_path / "out", splits="keep", val_share=0, workers=1)
    summary = json.loads(audit(tmp_path / "out", workers=1).read_text())
    assert (summary["distances"], summary["leaks"]) == ([], [])
    assert summary["splits"]["train"]["roadwork_share"] is None
    assert "No two splits have photos with GPS" in (tmp_path / "out" / "audit" / "audit.html").read_text()


def cut_the_photo(shards: Path, offset: int, size: int) -> None:
    with (shards / "test-00000.tar").open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\0" * size)


def remove_the_tar(shards: Path, offset: int, size: int) -> None:
    (shards / "test-00000.tar").unlink()


@pytest.mark.parametrize(
    ("member", "damage", "reason"),
    [
        ("jpg", cut_the_photo, "audited: "),
        ("json", cut_the_photo, "record"),
        ("jpg", remove_the_tar, "the tar is missing"),
    ],
)
def test_damaged_shards_are_refused_with_the_sample_and_the_way_to_find_all(tmp_path, member, damage, reason):
    shards = make_shards(tmp_path, clean_rows())
    sample = read_index(shards).splits["test"].samples[0]
    damage(shards, *sample.members[member])
    with pytest.raises(UserError, match=f"the sample {sample.key} in .*test-00000.tar .*{reason}.*data_prep verify"):
        audit(shards, workers=1)


def data_prep(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("data_prep", run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_exit_status_says_whether_there_is_a_leak(monkeypatch, clean, planted, tmp_path, capsys):
    out = tmp_path / "report"
    assert data_prep(monkeypatch, "audit", "--shards", clean, "--out", out, "--workers", 1) == EXIT_OK
    assert capsys.readouterr().out == f"{(out / 'summary.json').resolve()}\n"
    words = ["--shards", planted, "--out", out, "--workers", 1, "--accept", "description", "city"]
    assert data_prep(monkeypatch, "audit", *words) == EXIT_AUDIT
    captured = capsys.readouterr()
    assert captured.out == f"{(out / 'summary.json').resolve()}\n"
    assert "found: 1 video has frames in several splits; 1 photo lies within 100 m" in captured.err
    assert "description" not in captured.err


@pytest.mark.parametrize(
    ("value", "text"),
    [(31.24, "31.2 m"), (640.2, "640 m"), (12_540, "12.5 km"), (1_340_400, "1,340 km")],
)
def test_distances_are_written_for_people(value, text):
    assert metres(value) == text
