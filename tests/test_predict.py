import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import command
from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.errors import Stopped, UserError
from pipeline.evaluation.prediction import csv_writer, jsonl_writer
from pipeline.model.config import InputSpec
from pipeline.model.roadwork import RoadworkModel
from pipeline.names import VIEW_NAMES
from pipeline.predict import predict
from tests.small_run import make_backbone, make_model, noisy_photo


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    make_model(make_backbone(folder / "backbone")).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def photos(tmp_path):
    """Five photos, of which one is truncated, one no image and one a grey PNG, beside a text file."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(noisy_photo(0))
    (folder / "b.JPG").write_bytes(noisy_photo(1)[:400])
    (folder / "c[1].jpeg").write_bytes(noisy_photo(2, 64, 160))
    (folder / "deep" / "d.jpg").write_bytes(b"no image")
    Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (60, 1))).save(folder / "deep" / "e.png")
    (folder / "notes.txt").write_text("no photo")
    return folder


def read_csv(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_photo_gets_one_row_in_order_and_broken_ones_an_error(model_folder, photos, tmp_path):
    summary = predict(model_folder, tmp_path / "out" / "x.csv", input=[str(photos)], batch_size=2, workers=1)
    rows = read_csv(tmp_path / "out" / "x.csv")
    names = ["a.jpg", "b.JPG", "c[1].jpeg", "deep/d.jpg", "deep/e.png"]
    assert [row["path"] for row in rows] == [str(photos / name) for name in names]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True, False]
    assert all(row["probability"] == row["label"] == row["kept_views"] == "" for row in rows if row["error"])
    values = json.loads(summary.read_text())
    assert summary == (tmp_path / "out" / "x.summary.json").resolve()
    assert (values["photos"], values["failed"]) == (5, 2)
    assert sum(values["labels"].values()) == 3


def test_answers_are_the_models_own_without_metadata(model_folder, photos, tmp_path):
    predict(model_folder, tmp_path / "x.csv", input=[str(photos)], workers=0)
    model = RoadworkModel.from_pretrained(model_folder).eval()
    for row in (row for row in read_csv(tmp_path / "x.csv") if not row["error"]):
        views = collate([prepare(Path(row["path"]).read_bytes(), InputSpec(32))])
        with torch.no_grad():
            output = model(views, null_metadata=True)
        log_odds = float(output.logits[0, 1] - output.logits[0, 0])
        assert float(row["probability"]) == pytest.approx(1 / (1 + np.exp(-log_odds)), abs=1e-5)
        assert row["label"] == ("Roadwork" if log_odds > 0 else "None")
        expected = [VIEW_NAMES[i] for i in output.view_indices[0] if output.view_mask[0].all()]
        assert row["kept_views"].split(";") == expected


def test_views_that_do_not_exist_are_not_named(model_folder, tmp_path):
    (tmp_path / "small.jpg").write_bytes(noisy_photo(0, 32, 32))
    predict(model_folder, tmp_path / "x.csv", input=[str(tmp_path / "small.jpg")], workers=0)
    assert read_csv(tmp_path / "x.csv")[0]["kept_views"] == "global"


def test_jsonl_holds_the_same_as_csv(model_folder, photos, tmp_path):
    predict(model_folder, tmp_path / "x.csv", input=[str(photos)], workers=0)
    predict(model_folder, tmp_path / "y.jsonl", input=[str(photos)], workers=0)
    lines = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    for line, row in zip(lines, read_csv(tmp_path / "x.csv"), strict=True):
        flat = {**line, "kept_views": ";".join(line["kept_views"] or [])}
        assert {key: "" if value is None else str(value) for key, value in flat.items()} == row


def test_one_half_counts_as_none(tmp_path):
    model = make_model(make_backbone(tmp_path / "backbone"), evidence=False)
    with torch.no_grad():
        for parameter in model.head.binary.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jpg").write_bytes(noisy_photo(0))
    predict(tmp_path / "model", tmp_path / "x.csv", input=[str(tmp_path / "a.jpg")], workers=0)
    row = read_csv(tmp_path / "x.csv")[0]
    assert (row["probability"], row["label"]) == ("0.5", "None")


def test_an_answer_that_is_not_a_number_is_a_row_with_an_error_and_valid_json(model_folder, photos, tmp_path):
    model = RoadworkModel.from_pretrained(model_folder)
    with torch.no_grad():
        next(model.head.parameters()).fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    inputs = [str(photos / "a.jpg"), str(photos / "b.JPG")]
    for name in ("x.csv", "x.jsonl"):
        summary = predict(tmp_path / "broken", tmp_path / name, input=inputs, workers=0)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    broken, truncated = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert broken["error"] == "the model's answer is not a number"
    assert broken["probability"] is broken["label"] is broken["kept_views"] is None
    assert truncated["error"] not in (None, broken["error"])
    assert [row["label"] for row in read_csv(tmp_path / "x.csv")] == ["", ""]
    values = json.loads(summary.read_text(), parse_constant=pytest.fail)
    assert (values["failed"], values["labels"]) == (2, {})


def test_a_model_without_calibration_says_so_and_an_exported_one_does_not(model_folder, photos, tmp_path, capsys):
    summary = predict(model_folder, tmp_path / "x.csv", input=[str(photos / "a.jpg")], workers=0)
    assert json.loads(summary.read_text())["calibrated"] is False
    assert "its probabilities are not calibrated, and 0.5 may not be the best cut; run `" in capsys.readouterr().err
    model = RoadworkModel.from_pretrained(model_folder)
    model.config.decision_bias, model.config.decision_slope = 0.3, 2.0
    model.save_pretrained(tmp_path / "exported")
    summary = predict(tmp_path / "exported", tmp_path / "x.csv", input=[str(photos / "a.jpg")], workers=0)
    assert json.loads(summary.read_text())["calibrated"] is True
    assert "calibrated" not in capsys.readouterr().err


def test_the_decision_bias_moves_the_probability(model_folder, photos, tmp_path):
    model = RoadworkModel.from_pretrained(model_folder)
    model.config.decision_bias = 100.0
    model.save_pretrained(tmp_path / "biased")
    predict(tmp_path / "biased", tmp_path / "x.csv", input=[str(photos / "a.jpg")], workers=0)
    assert float(read_csv(tmp_path / "x.csv")[0]["probability"]) < 1e-6


def test_wrong_input_is_one_sentence_and_leaves_nothing(model_folder, photos, tmp_path):
    (photos / "empty").mkdir()
    out = tmp_path / "out"
    wrong = [
        (model_folder, [str(photos / "empty")], "x.csv", "leads to no photo"),
        (model_folder, [str(photos / "*.gif")], "x.csv", "leads to no photo"),
        (model_folder, [], "x.csv", "--input"),
        (model_folder, [str(photos)], "x.parquet", "--output"),
        (tmp_path / "nowhere", [str(photos)], "x.csv", "no model in"),
    ]
    for model, inputs, name, message in wrong:
        with pytest.raises(UserError, match=message):
            predict(model, out / name, input=inputs, workers=0)
    assert not out.exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(model_folder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.evaluation.prediction.score", lambda *_: pytest.fail("worked"))
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    for output, message in (("folder.csv", "and this is a folder"), ("file/x.csv", "not a directory; fix that")):
        with pytest.raises(UserError, match=message):
            predict(model_folder, tmp_path / output, input=[str(photos)], workers=0)


def test_the_same_command_after_the_end_answers_anew(model_folder, photos, tmp_path):
    for photo in ("a.jpg", "c[1].jpeg"):
        os.replace(photos / photo, photos / "a.jpg")
        summary = predict(model_folder, tmp_path / "x.csv", input=[str(photos / "a.jpg")], workers=0)
        assert json.loads(summary.read_text())["resumed"] == 0
        answer = read_csv(tmp_path / "x.csv")[0]["probability"]
        predict(model_folder, tmp_path / "alone.csv", input=[str(photos / "a.jpg")], workers=0)
        assert read_csv(tmp_path / "alone.csv")[0]["probability"] == answer
    assert not list(tmp_path.glob(".*"))


MEASURED = """
import resource, sys
from pathlib import Path
from pipeline.predict import predict
model, photos, output = map(Path, sys.argv[1:])
predict(model, output, input=[str(photos)], batch_size=50, workers=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_thousand_photos_take_the_memory_of_a_thousand(model_folder, tmp_path):
    peaks = []
    for number in (1_000, 10_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        first = folder / "0.png"
        Image.new("RGB", (32, 32), (90, 160, 20)).save(first)
        for row in range(1, number):
            os.link(first, folder / f"{row}.png")
        words = [str(model_folder), str(folder), str(tmp_path / f"{number}.csv")]
        done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(read_csv(tmp_path / f"{number}.csv")) == number
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 24, peaks  # MiB


def test_an_interrupted_prediction_leaves_the_old_file(model_folder, photos, tmp_path, monkeypatch):
    (tmp_path / "x.csv").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.evaluation.prediction.score", interrupt)
    with pytest.raises(Stopped, match="the answers so far are kept; the same command goes on after them"):
        predict(model_folder, tmp_path / "x.csv", input=[str(photos)], workers=0)
    assert (tmp_path / "x.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.csv.partial", "photos", "x.csv"]


def test_the_command_line_takes_several_inputs(model_folder, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "x.csv"
    flags = ["--model", str(model_folder), "--input", str(photos / "a.jpg"), str(photos / "deep")]
    more = [f"--input={photos / 'c[1].jpeg'}", "--output", str(output), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["predict", *flags, *more])
    assert command(predict) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str((tmp_path / "x.summary.json").resolve())
    assert [row["path"][-5:] for row in read_csv(output)] == ["a.jpg", "d.jpg", "e.png", ".jpeg"]
    monkeypatch.setattr(sys, "argv", ["predict", "--model", str(tmp_path), "--input", "--output", str(output)])
    assert command(predict) == 2


@pytest.mark.parametrize("seed", range(5))
def test_any_name_reads_back_from_both_formats_and_none_is_a_formula(tmp_path, seed):
    draw = random.Random(seed)
    names = ["=1+1.jpg", "+x", "-2", "@SUM(A1)", "\tx", "a\rb", "\r=2", "a\nb", 'a"b', "a,b", "x\udce4y", " ", "./=x"]
    names += [
        "".join(draw.choices("=+-@\r\n\t,;\"' ab\udcff\u00e9\U0001f6a7", k=draw.randint(1, 8))) for _ in range(200)
    ]
    with (tmp_path / "x.csv").open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        write = csv_writer(stream)
        for number, name in enumerate(names):
            write(Path(name), {"probability": number / 8, "label": "none", "kept_views": ["0", "3"]})
    with (tmp_path / "x.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [Path(row["path"]) for row in rows] == [Path(name) for name in names]  # `./` is no part of a path
    assert [float(row["probability"]) for row in rows] == [number / 8 for number in range(len(names))]
    assert not [row["path"] for row in rows if row["path"].startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    stream = io.StringIO()
    write = jsonl_writer(stream)
    for name in names:
        write(Path(name), {"error": "x"})
    assert [json.loads(line)["path"] for line in stream.getvalue().splitlines()] == [str(Path(name)) for name in names]
