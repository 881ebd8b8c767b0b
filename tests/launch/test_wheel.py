"""The wheel: what is in it, and the command `roadwork` of it, in an empty folder where no checkout can be imported."""

import csv
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.small_run import make_backbone, make_model, noisy_photo

ROOT = Path(__file__).parents[2]
SOURCES = ("pipeline", "data_prep", "accelerate_configs", "ds_configs")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "launch.sh", "constraints.txt")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy, since building leaves a folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / "copy" / name)
    words = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", folder / "dist", folder / "copy"]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def roadwork(wheel, tmp_path_factory):
    """The command of the wheel, in an environment that has the dependencies but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A line of a .pth file adds a folder but does not read that one's .pth files, by which a checkout is imported.
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    words = ["--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", "--no-compile", "-q", wheel]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)

    def run(*words, cwd, status=0):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [folder / "bin" / "roadwork", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert str(ROOT / "pipeline") not in done.stderr
        return done

    return run


def test_the_wheel_has_all_that_its_commands_read_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    found = {name for name in names if not name.startswith(f"{info}/")}
    wanted = {path.relative_to(ROOT) for name in SOURCES for path in (ROOT / name).rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    outside = SOURCES[2:]
    assert found == {f"pipeline/{path}" if path.parts[0] in outside else str(path) for path in wanted}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names


def test_it_introduces_itself_as_roadwork(roadwork, tmp_path):
    assert "usage: roadwork COMMAND" in roadwork("--help", cwd=tmp_path).stdout
    assert roadwork("--version", cwd=tmp_path).stdout.startswith("roadwork ")
    error = roadwork("trian", cwd=tmp_path, status=2).stderr
    assert error == "error: unknown command 'trian'; did you mean 'train'? (`roadwork --help` lists them)\n"
    error = roadwork("evaluate", "--runs", "x", cwd=tmp_path, status=2).stderr
    assert error == "error: unknown option 'runs'; did you mean 'run'?\n"
    assert "usage: roadwork prep scenes" in roadwork("prep", "scenes", "--help", cwd=tmp_path).stdout


def test_a_dry_run_of_training_finds_configurations_by_their_names_in_a_checkout(roadwork, tmp_path):
    """Both the one that is given, and the DeepSpeed file that it names."""
    one = ("--config_file", "accelerate_configs/cpu_1.yaml")
    done = roadwork("train", "demo", "--dry-run", *one, "--train.batch_size", "4", cwd=tmp_path)
    assert "stage 0" in done.stderr
    assert not list(tmp_path.iterdir())


def test_predictions_of_an_exported_model(roadwork, tmp_path):
    make_model(make_backbone(tmp_path / "backbone")).save_pretrained(tmp_path / "model")
    (tmp_path / "photo.jpg").write_bytes(noisy_photo(0))
    words = ("--model", "model", "--input", "photo.jpg", "--output", "a.csv", "--device", "cpu", "--workers", "0")
    done = roadwork("predict", *words, cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 'a.summary.json'}\n"
    with (tmp_path / "a.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert 0 < float(row["probability"]) < 1
