"""What launch.sh installs and when, with stand-ins for the programs in .venv that note how they are called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/bash
echo "${0##*/} $*" >>{folder}/calls
[[ "$*" != "-m pip config list" ]] || cat {folder}/configuration
[[ "${0##*/} $*" != $(cat {folder}/fails) ]]
"""


class Checkout:
    """A folder with launch.sh and a .venv of stand-ins."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("launch.sh", "constraints.txt", "pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, folder / name)
        (folder / ".venv" / "bin").mkdir(parents=True)
        for name in ("python", "uv", "ruff", "mypy"):
            path = folder / ".venv" / "bin" / name
            path.write_text(STAND_IN.replace("{folder}", str(folder)))
            path.chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self.configure("")
        self.let_fail("nothing")

    def configure(self, text: str) -> None:
        """What `pip config list` prints."""
        (self.folder / "configuration").write_text(text)

    def let_fail(self, pattern: str) -> None:
        """Let calls fail that match a pattern of the shell."""
        (self.folder / "fails").write_text(pattern)

    def run(self, *words: str, status: int = 0) -> list[str]:
        """Run launch.sh; returns what was called to install, without paths."""
        (self.folder / "calls").write_text("")
        command = [self.folder / "launch.sh", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        calls = (self.folder / "calls").read_text().replace(f"{self.folder}/", "").replace(str(self.folder), ".")
        return [call for call in calls.splitlines() if " install " in call]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


UV = "python -m pip install -q --only-binary :all: -c constraints.txt uv"


def by_uv(options="", what="."):
    words = "uv pip install --no-config --python .venv/bin/python --index-strategy unsafe-best-match"
    return [UV, f"{words} {options}-c constraints.txt -e {what}"]


def by_pip(what="."):
    return [f"python -m pip install --disable-pip-version-check -c constraints.txt -e {what}"]


def test_the_tests_packages_come_with_the_first_test_and_stay(checkout):
    assert checkout.run("demo") == by_uv()
    assert checkout.run("train", "demo") == []
    assert checkout.run("test") == by_uv(what=".[dev]")
    assert checkout.run("test") == checkout.run("demo") == checkout.run("setup") == []


def test_test_first_installs_once(checkout):
    assert checkout.run("test") == by_uv(what=".[dev]")
    assert checkout.run("demo") == checkout.run("bench") == []


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "setup.py"])
def test_what_decides_versions_renews_all_that_was_installed(checkout, name):
    checkout.run("setup")
    (checkout.folder / name).open("a").write("\n")
    assert checkout.run("demo") == by_uv()
    checkout.run("test")
    (checkout.folder / name).open("a").write("\n")
    assert checkout.run("demo") == by_uv(what=".[dev]")


def test_uv_is_told_what_pip_is_configured_to(checkout):
    checkout.configure(
        ":env:.find-links='/wheels'\n:env:.disable-pip-version-check='1'\nglobal.find-links='/wheels'\n"
        "global.index-url='https://mirror/simple'\nglobal.extra-index-url='https://a/simple\\nhttps://b/simple'\n"
    )
    told = (
        "--find-links /wheels --find-links /wheels --default-index https://mirror/simple "
        "--index https://a/simple --index https://b/simple "
    )
    assert checkout.run("setup") == by_uv(told)


def test_bytecode_comes_with_the_installation_where_python_may_not_write_it(checkout):
    checkout.environment["PYTHONDONTWRITEBYTECODE"] = "1"
    assert checkout.run("setup") == by_uv("--compile-bytecode ")


@pytest.mark.parametrize(
    "configuration",
    [
        "global.proxy='http://proxy:3128'",
        ":env:.index-url='https://a/simple'\nglobal.index-url='https://b/simple'",
        "global.index-url='https://mirror/simple'\nglobal.find-links='/a folder\\'s'",
        "site.no-index='1'",
    ],
)
def test_pip_installs_where_uv_would_not_know_what_pip_is_configured_to(checkout, configuration):
    checkout.configure(configuration + "\n")
    assert checkout.run("setup") == by_pip()


@pytest.mark.parametrize(("fails", "calls"), [("*install*uv", [UV]), ("uv*", by_uv())])
def test_pip_installs_where_uv_cannot(checkout, fails, calls):
    checkout.let_fail(fails)
    assert checkout.run("setup") == calls + by_pip()
    assert checkout.run("demo") == []


def test_an_installation_that_fails_is_status_one_and_tried_again(checkout):
    checkout.let_fail("*install*")
    assert checkout.run("demo", status=1) == [UV, *by_pip()]
    checkout.let_fail("nothing")
    assert checkout.run("demo") == by_uv()


def test_a_typing_error_installs_nothing(tmp_path):
    """The list of commands needs no installed package."""
    for name in ("launch.sh", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    for words, status in ((["trian"], 2), (["--help"], 0), (["help"], 0), ([], 0)):
        done = subprocess.run([tmp_path / "launch.sh", *words], env=environment, capture_output=True, check=False)
        assert done.returncode == status, done.stderr
    assert not (tmp_path / ".venv").exists()
