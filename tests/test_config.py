from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from pipeline.config import ALIASES, Config, parse_config, read_config, to_yaml
from pipeline.distributed.settings import read_deepspeed
from pipeline.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "pipeline" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_states_only_what_differs(path):
    config = asdict(read_config(path))
    defaults = asdict(Config())
    for room, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items():
            assert config[room][key] == value
            assert value != defaults[room][key] or (room, key) in {("train", "epochs"), ("train", "batch_size"),
                ("train", "micro_batch_size"), ("data", "shards"), ("model", "backbone")}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_configuration_names_a_deepspeed_file(path):
    settings = yaml.safe_load(path.read_text())
    assert settings["distributed_type"] == "DEEPSPEED"
    assert not settings["use_cpu"]  # Accelerate would turn DeepSpeed off
    read_deepspeed(ROOT / settings["deepspeed_config"]["deepspeed_config_file"])


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_deepspeed_file_leaves_nothing_to_be_guessed(path):
    settings = read_deepspeed(path)
    assert "auto" not in str(settings)
    assert settings["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero").removesuffix("_offload"))


def test_overrides_win_wherever_the_recipe_stands():
    recipe = ["--config", str(ROOT / "pipeline" / "recipes" / "demo.yaml")]
    for words in (["--epochs", "3", *recipe], [*recipe, "--epochs", "3"], ["--epochs=3", *recipe]):
        config, dry_run = parse_config(words, "train")
        assert (config.train.epochs, config.model.backbone, dry_run) == (3, "scenes-tiny", False)


def test_the_last_override_wins():
    assert parse_config(["--train.epochs", "3", "--epochs", "4"], "train")[0].train.epochs == 4


def test_a_resolved_configuration_reads_back_the_same(tmp_path):
    config, _ = parse_config(["--model.metadata", "[gps]", "--train.seed", "7", "--dry-run"], "train")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_every_short_form_stands_for_a_key():
    rooms = {room.name: room.default_factory for room in fields(Config)}
    for long in ALIASES.values():
        room, key = long.removeprefix("--").split(".")
        assert key in {entry.name for entry in fields(rooms[room])}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--train.epoch", "3"], "did you mean 'train.epochs'"),
        (["--optim.learning_rate", "1"], "unknown option 'optim.learning_rate'"),
        (["--train.epochs", "0"], "train.epochs is 0, but must be 1 or more"),
        (["--train.epochs", "many"], r"train.epochs: expected a int"),
        (["--model.view_side", "518"], "model.view_side is 518.* like 512"),
        (["--model.metadata", "[gps, name]"], r"model.metadata is \['name'\]"),
        (["--data.decode_scale", "third"], "data.decode_scale is 'third', but must be one of full, half"),
        (["--data.augment_share", "1.5"], r"data.augment_share is 1.5, but must be in \[0, 1\]"),
        (["--data.streetvision_share", "-0.1"], r"data.streetvision_share is -0.1, but must be in \[0, 1\]"),
        (
            ["--data.augment_share", "0.7", "--data.streetvision_share", "0.5"],
            r"data.streetvision_share is 0.5, but must be at most 1 - data.augment_share",
        ),
        (["--data.sampling", "best"], "data.sampling is 'best', but must be one of weighted, uniform"),
        (["--config", "absent.yaml"], "No such file"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(words, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        parse_config(words, "train")
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_a_file_gets_the_nearest_known_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("train:\n  epocs: 3\n")
    with pytest.raises(UserError, match=r"did you mean 'train\.epochs'"):
        read_config(path)


@pytest.mark.parametrize(("text", "said"), [
    ("train:\n", "train has no keys with values"), ("train: [1]\n", "train has no keys with values"),
    ("train:\n  epochs:\n", "train.epochs: expected int, got null"),
    ("train:\n  epochs: true\n", "train.epochs: expected int, got bool"),
    ("train:\n  epochs: '3'\n", "train.epochs: expected int, got str"),
    ("train:\n  epochs: 3.5\n", "train.epochs: expected int, got float"),
    ("train:\n  run: 7\n", "train.run: expected str, got int"),
    ("model:\n  metadata: null\n", "model.metadata: expected array, got null"),
    ("model:\n  metadata: gps\n", "model.metadata: expected array, got str"),
    ("model:\n  fixed_views: [1, x]\n", r"model.fixed_views: \[1\]: expected int, got str"),
    ("data:\n  shards: null\n", "data.shards: expected str, got null"),
    ("optim:\n  lr: {a: 1}\n", "optim.lr: expected float, got object"),
    ("train:\n  epochz: 3\n", "unknown option 'train.epochz'; did you mean 'train.epochs'"),
    ("trian:\n  epochs: 3\n", "unknown option 'trian'; did you mean 'train'"),
    ("config: /etc/passwd\n", "unknown option 'config'"), ("1: 2\n", "unknown option '1'"),
])  # fmt: skip
def test_a_recipe_with_another_value_is_one_sentence_with_file_and_key(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path}/r.yaml: {said}") as raised:
        read_config(tmp_path / "r.yaml")
    assert "\n" not in str(raised.value)
    assert "root:x" not in str(raised.value)


@pytest.mark.parametrize(("text", "key"), [
    ("train: {seed: 100000000000}", "train.seed"), ("data: {workers: 100000000}", "data.workers"),
    ("train: {batch_size: 1000000000000}", "train.batch_size"), ("train: {heads: 100000}", "train.heads"),
    ("loss: {segmentation: .inf}", "loss.segmentation"), ("loss: {segmentation: .nan}", "loss.segmentation"),
    ("optim: {lr: .inf}", "optim.lr"), ("model: {metadata: [gps, gps]}", "model.metadata"),
    ("model: {width: 1000000000}", "model.width"), ("model: {layers: 1000000000}", "model.layers"),
    ("model: {view_side: 1600000}", "model.view_side"), ("train: {run: /}", "train.run"),
    ("train: {run: ''}", "train.run"), ("train: {run: ..}", "train.run"),
    ("train: {run: \"a\\0b\"}", "train.run"), ("train: {profile: '²:³'}", "train.profile"),
    ("checkpoint: {sync: 'http://[x'}", "checkpoint.sync"),
])  # fmt: skip
def test_a_value_beyond_all_bounds_is_refused_by_its_key(tmp_path, text, key):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=f"^{key} "):
        read_config(tmp_path / "r.yaml")


def test_later_recipes_win_key_by_key_and_sections_take_no_files(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {epochs: 3, seed: 4}\nmodel: {metadata: [gps]}\n")
    (tmp_path / "b.yaml").write_text("train: {epochs: 5}\n")
    config = parse_config(["--config", f"{tmp_path}/a.yaml", f"--config={tmp_path}/b.yaml"], "train")[0]
    assert (config.train.epochs, config.train.seed, config.model.metadata) == (5, 4, ("gps",))
    for word in ("--train", "--model=x.yaml"):
        with pytest.raises(UserError, match="needs a key, such as"):
            parse_config([word, f"{tmp_path}/a.yaml"], "train")
