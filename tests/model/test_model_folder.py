"""Damaged, incomplete and changed model folders: one sentence, or the same answers."""

import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DINOv3ViTModel

from pipeline.config import Config, DataConfig, to_yaml
from pipeline.errors import UserError
from pipeline.model.backbone import FrozenBackbone
from pipeline.model.config import ModelConfig
from pipeline.model.model_folder import FINGERPRINTS, KEYS
from pipeline.model.pruning import StoppingRule
from pipeline.model.roadwork import RoadworkModel
from tests.fuzz.mutation import mutate
from tests.model.examples import random_photos
from tests.small_run import make_backbone, make_model, noisy_photo, small_config
from tests.warm import python

ROOT = Path(__file__).parents[2]
SEED = 20
DEEP = json.loads("[" * 300 + "]" * 300)
# Nothing that a key of config.json holds is equal to any of these, but where the type says so.
WRONG = (
    None,
    True,
    "",
    "no such word",
    -1,
    0,
    7,
    10**12,
    10**30,
    0.3,
    -1e30,
    [],
    [0],
    ["gps", 3],
    {},
    {"cut": 0},
    DEEP,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A backbone, a saved model with a stopping rule, and some photos with the model's answers."""
    folder = tmp_path_factory.mktemp("world")
    model = make_model(make_backbone(folder / "backbone"), pruning="dynamic")
    model.config.stopping = {"cut": 0.0, "margins_none": [9.0] * 3, "margins_roadwork": [9.0] * 3}
    model.save_pretrained(folder / "model")
    photos = random_photos()
    with torch.no_grad():
        return folder, photos, model(photos).logits


@pytest.fixture
def folder(world, tmp_path):
    return shutil.copytree(world[0] / "model", tmp_path / "model")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))


def unsealed(folder):
    """Take the fingerprint of the head away, as in folders of older programs."""
    write(folder, {key: value for key, value in config_of(folder).items() if key != "head_sha256"})


def refusal(folder, **options):
    """The sentence that the folder is refused with; None if it loads."""
    sentence = None
    try:
        RoadworkModel.from_pretrained(folder, **options)
    except UserError as error:
        sentence = str(error)
    assert sentence is None or ("\n" not in sentence and 20 < len(sentence) < 600)
    return sentence


@torch.no_grad()
def answers_as_saved(world, folder):
    return torch.equal(RoadworkModel.from_pretrained(folder)(world[1]).logits, world[2])


def test_config_json_states_every_key_and_both_fingerprints(world, folder):
    values = config_of(folder)
    assert set(KEYS) <= values.keys()
    assert values["backbone_sha256"] == FrozenBackbone(str(world[0] / "backbone")).fingerprint
    assert len(values["head_sha256"]) == 64


@pytest.mark.parametrize("key", [key for key in KEYS if key not in FINGERPRINTS])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_key_that_is_missing_is_named(folder, key, sealed):
    if not sealed:
        unsealed(folder)
    values = config_of(folder)
    del values[key]
    write(folder, values)
    assert f"/config.json: it lacks {key}; " in refusal(folder)


MADE = Path(__file__).parents[1] / "compatibility" / "made_by_14eef39"


def test_a_folder_of_version_1_needs_every_key_of_its_version(tmp_path):
    folder = Path(shutil.copytree(MADE / "exported", tmp_path / "model"))
    values = config_of(folder)
    assert not values.keys() & {"format_version", "evidence", "ensemble", *FINGERPRINTS}
    place = str(MADE / "backbone")
    assert refusal(folder, backbone=place) is None
    own = values.keys() & set(KEYS)
    for key in sorted(own):
        write(folder, {name: value for name, value in values.items() if name != key})
        assert f"it lacks {key}; " in refusal(folder, backbone=place)
    assert len(own) > 25


def equal(value, other):
    """Equal as JSON: 1 is not true."""
    return json.dumps(value) == json.dumps(other)


def test_any_change_of_config_json_is_refused_or_changes_no_answer(world, folder):
    """Every key, of ours and of transformers, with every wrong value, and with another number in its place."""
    values, rng, refused = config_of(folder), random.Random(SEED), 0
    for key, value in values.items():
        others = [*WRONG, *([value + 1, value * 2, -value, str(value)] if isinstance(value, int | float) else [])]
        for other in [other for other in others if not equal(value, other)]:
            write(folder, {**values, key: other})
            sentence = refusal(folder)
            refused += sentence is not None
            own = key in KEYS and key not in ("backbone", *FINGERPRINTS)
            assert sentence is not None or not own or (key == "head_sha256" and other is None), (key, other)
            if sentence is None and rng.random() < 0.2:
                assert answers_as_saved(world, folder), (key, other)
    assert refused > 400


def test_without_the_seal_what_cannot_be_is_still_refused_in_one_sentence(folder):
    """A value that could be is another model, and is loaded if the weights fit."""
    unsealed(folder)
    values, kinds = config_of(folder), {}
    for key in KEYS:
        for other in WRONG:
            write(folder, {**values, key: other})
            kinds[key, json.dumps(other)[:20]] = refusal(folder)
    sizes = {
        "view_side": ("0", "7", '"no such word"'), "width": ("-1", "0.3", "1000000000000"), "layers": ("null", "7"),
        "pruning": ('""', "null", "[]"), "metadata": ("null", '["gps", 3]', "[0]"), "decision_slope": ("0", "-1"),
        "stopping": ('{"cut": 0}', "[]", '"no such word"', "true"), "ensemble": ("7", "0", "1000000000000"),
        "backbone_dim": ("7", "0.3"), "evidence": ("0", "null"), "backbone_sha256": ("7", '""'),
    }  # fmt: skip
    assert [(key, other) for key, others in sizes.items() for other in others if kinds[key, other] is None] == []


@pytest.mark.parametrize(
    "stopping",
    [
        {"cut": 0.0, "margins_none": [1.0] * 3},
        {"cut": 0.0, "margins_none": [1.0] * 3, "margins_roadwork": [1.0] * 2},
        {"cut": 0.0, "margins_none": [1.0] * 3, "margins_roadwork": [1.0] * 3, "hidden": 1},
        {"cut": "0", "margins_none": [1.0] * 3, "margins_roadwork": [1.0] * 3},
        {"cut": 0.0, "margins_none": [1.0, None, 1.0], "margins_roadwork": [1.0] * 3},
    ],
)
def test_another_stopping_rule_is_refused_with_its_place(folder, stopping):
    unsealed(folder)
    write(folder, {**config_of(folder), "stopping": stopping})
    assert "stopping" in refusal(folder)


NOT_OURS = (
    "", "{", "null", "[]", "3", '"roadwork"', "{}", "[" * 100_000, '{"a":' * 100_000,
    '{"view_side": 32, "view_side": 48}', '{"dropout": NaN}', '{"width": 1e999}', b"\xff\xfe", b"\x00" * 100,
    " " * (2 << 20), '{"model_type": "dinov3_vit"}',
)  # fmt: skip


@pytest.mark.parametrize("text", NOT_OURS, ids=range(len(NOT_OURS)))
def test_a_config_json_that_is_none_is_one_sentence(folder, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.monotonic()
    assert "/config.json: " in refusal(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("sealed", [True, False])
def test_random_damage_of_either_file_is_one_sentence_or_changes_no_answer(world, folder, sealed):
    if not sealed:
        unsealed(folder)
    rng, refused = random.Random(SEED + sealed), 0
    for name, count in (("config.json", 150), ("model.safetensors", 150)):
        whole = (folder / name).read_bytes()
        for case in range(count):
            (folder / name).write_bytes(mutate(whole, rng))
            sentence = refusal(folder)
            refused += sentence is not None
            if sentence is None and sealed:
                values = config_of(folder)  # the fingerprint's key may be what was damaged
                assert "head_sha256" not in values or answers_as_saved(world, folder), (name, case)
        (folder / name).write_bytes(whole)
    assert refused > (230 if sealed else 100)


def without(name):
    return lambda tensors: tensors.pop(name)


WEIGHTS = {
    "missing": (without("head.norm.weight"), "head.norm.weight"),
    "extra": (lambda tensors: tensors.update(other=torch.ones(2)), "other"),
    "another shape": (lambda t: t.update({"head.norm.weight": t["head.norm.weight"][:-1]}), "head.norm.weight"),
    "whole numbers": (lambda t: t.update({"head.norm.weight": t["head.norm.weight"].long()}), "torch.int64"),
    "none": (lambda tensors: tensors.clear(), "head."),
}


@pytest.mark.parametrize(("change", "named"), WEIGHTS.values(), ids=WEIGHTS)
def test_other_weights_are_refused_by_name(folder, change, named):
    unsealed(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert named in refusal(folder) or named == "head."


def test_pickled_weights_are_never_opened(world, folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("pytorch_model.bin", "model.safetensors"):
        torch.save({"trap": Trap()}, folder / name)
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
        assert "/model.safetensors: " in refusal(folder)
    backbone = Path(shutil.copytree(world[0] / "backbone", tmp_path / "backbone"))
    weights = load_file(backbone / "model.safetensors")
    (backbone / "model.safetensors").unlink()
    for pickled in ({"trap": Trap()}, weights):
        torch.save(pickled, backbone / "pytorch_model.bin")
        with pytest.raises(UserError, match="incomplete or damaged"):
            FrozenBackbone(str(backbone))
    assert not (tmp_path / "sprung").exists()


@torch.no_grad()
def test_a_loaded_model_answers_alike_when_its_file_is_overwritten(world, folder):
    model, path = RoadworkModel.from_pretrained(folder), folder / "model.safetensors"
    with path.open("r+b") as stream:
        stream.write(b"\xff" * path.stat().st_size)
    assert torch.equal(model(world[1]).logits, world[2])


def test_every_bit_of_the_weights_counts(folder):
    whole = (folder / "model.safetensors").read_bytes()
    rng = random.Random(SEED)
    for _ in range(40):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / "model.safetensors").write_bytes(data)
        assert refusal(folder) is not None


def test_a_key_that_was_changed_to_another_possible_value_is_noticed(folder):
    """Answers would change without a word: from 0.13 to 0.43 in one case of `view_side`."""
    values = config_of(folder)
    for key, value in {"view_side": 48, "keep_views": 3, "pruning": "scored", "decision_bias": 1.0}.items():
        write(folder, {**values, key: value})
        assert "model.safetensors or config.json has changed since the model was saved" in refusal(folder)


def test_a_folder_of_an_older_version_loads_with_a_line_that_says_it_was_not_checked(world, folder, capsys):
    assert answers_as_saved(world, folder)
    assert capsys.readouterr().err.count("not checked") == 0
    write(folder, {key: value for key, value in config_of(folder).items() if key not in FINGERPRINTS})
    assert answers_as_saved(world, folder)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "fingerprints" in line]
    assert line.endswith("holds no fingerprints: whether it has changed was not checked")
    RoadworkModel.from_pretrained(folder).save_pretrained(folder)
    capsys.readouterr()
    assert answers_as_saved(world, folder)
    assert "not checked" not in capsys.readouterr().err


def change_weights(place):
    model = DINOv3ViTModel.from_pretrained(place)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    model.save_pretrained(place)


def change_config(place):
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 50.0}))


@pytest.mark.parametrize("change", [change_weights, change_config])
def test_another_backbone_of_the_same_shapes_is_refused(world, folder, tmp_path, change):
    place = Path(shutil.copytree(world[0] / "backbone", tmp_path / "backbone"))
    assert refusal(folder, backbone=str(place)) is None
    change(place)
    assert "has other weights or another configuration than the one this head was trained on" in refusal(
        folder, backbone=str(place)
    )
    write(folder, {**config_of(folder), "backbone": str(place)})  # it may move, but stays the same
    assert "has other weights" in refusal(folder)


def test_a_backbone_that_moved_is_found_by_its_new_place(world, folder, tmp_path):
    write(folder, {**config_of(folder), "backbone": str(tmp_path / "gone")})
    assert "--backbone (a folder, a hub id or scenes-tiny)" in refusal(folder)
    assert "has width 96" in refusal(folder, backbone="scenes-tiny")
    with torch.no_grad():
        model = RoadworkModel.from_pretrained(folder, backbone=str(world[0] / "backbone"))
        assert torch.equal(model(world[1]).logits, world[2])


def test_a_damaged_backbone_is_one_sentence_and_no_weight_of_it_is_drawn_at_random(world, folder, tmp_path):
    place = Path(shutil.copytree(world[0] / "backbone", tmp_path / "backbone"))
    tensors = load_file(place / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    assert "its weights lack norm.weight" in refusal(folder, backbone=str(place))
    rng = random.Random(SEED)
    for name in ("config.json", "model.safetensors"):
        whole = (world[0] / "backbone" / name).read_bytes()
        for data in (b"", b"[" * 100_000, whole[: len(whole) // 2], *(mutate(whole, rng) for _ in range(15))):
            shutil.copytree(world[0] / "backbone", place, dirs_exist_ok=True)
            (place / name).write_bytes(data)
            refusal(folder, backbone=str(place))
    values = json.loads((world[0] / "backbone" / "config.json").read_text())
    shutil.copytree(world[0] / "backbone", place, dirs_exist_ok=True)
    for key, wrong in [
        ("num_hidden_layers", 10**9),
        ("hidden_size", "32"),
        ("hidden_act", "no such"),
        ("rope_theta", None),
    ]:
        (place / "config.json").write_text(json.dumps({**values, key: wrong}))
        assert "cannot load the backbone" in refusal(folder, backbone=str(place))


def test_the_rule_that_early_exit_writes_is_the_one_that_is_checked():
    """Otherwise a saved rule could be refused, or a wrong one read."""
    assert list(StoppingRule.__dataclass_fields__) == ["cut", "margins_none", "margins_roadwork"]
    assert set(ModelConfig.__dataclass_fields__) < set(KEYS)


DOOR = {
    "cut short": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-100]
    ),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "null": lambda folder: write(folder, {**config_of(folder), "width": None}),
    "no backbone": lambda folder: write(folder, {**config_of(folder), "backbone": "/nowhere"}),
}


def ended(folder, *words):
    """A command as people type it; its status, and what it printed on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("change", DOOR.values(), ids=DOOR)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_damaged_folder_is_status_2_and_one_sentence(world, folder, tmp_path, command, change):
    change(folder)
    (tmp_path / "a.jpg").write_bytes(noisy_photo(0))
    config = Config(data=DataConfig(shards="nowhere"), model=small_config(str(world[0] / "backbone")))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    options = {"predict": (f"--model={folder}", "--input=a.jpg", "--output=x.csv"), "evaluate": (f"--run={tmp_path}",)}
    status, lines = ended(tmp_path, python(), "-m", "pipeline", command, *options[command], "--workers=0")
    assert (status, [line[:7] for line in lines]) == (2, ["error: "]), lines
    assert not (tmp_path / "x.csv").exists()


def test_predict_through_the_door_names_a_flipped_bit_and_finds_a_backbone_that_moved(world, folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(noisy_photo(0))
    words = (str(ROOT / "launch.sh"), "predict", f"--model={folder}", "--input=a.jpg", "--workers=0")
    write(folder, {**config_of(folder), "backbone": "/nowhere"})
    status, lines = ended(tmp_path, *words, "--output=x.csv", f"--backbone={world[0] / 'backbone'}")
    assert (status, (tmp_path / "x.csv").exists()) == (0, True), lines
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    status, lines = ended(tmp_path, *words, "--output=y.csv")
    assert (status, len(lines)) == (2, 1)
    assert "model.safetensors or config.json has changed since the model was saved" in lines[0]


@pytest.mark.parametrize("value", [torch.nan, 3e38])
def test_answers_that_are_not_numbers_are_rows_with_an_error_through_the_door(world, tmp_path, value):
    """By weights that are not finite, and by finite ones that overflow."""
    model = make_model(str(world[0] / "backbone"))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.fill_(value)
    model.save_pretrained(tmp_path / "model")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(noisy_photo(0))
    words = (python(), "-m", "pipeline", "predict", "--model=model", "--input", "a.jpg", "b.jpg", "--workers=0")
    for name in ("x.csv", "x.jsonl"):
        status, lines = ended(tmp_path, *words, f"--output={name}")
        assert status == 0, lines
        text = (tmp_path / name).read_text()
        assert text.count("the model's answer is not a number") == 2
        assert "nan" not in text.lower()
        assert "None" not in text
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(row["probability"], row["label"]) for row in rows] == [(None, None)] * 2
