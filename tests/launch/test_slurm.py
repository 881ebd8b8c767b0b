"""Batch scripts and their submission, with an `sbatch` that only takes notes; `tests/slurm` has a real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.shards.slurm import main
from pipeline.errors import UserError
from pipeline.launch.slurm import Job, Resources, script_of, submit
from tests.data_prep.examples import city_rows, write_folder

ODD = """it's "my" 50% $HOME `photos` #1"""
ONE_CORE = Resources(1)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def login_node(tmp_path, monkeypatch) -> Path:
    """A folder to work in, where `sbatch` and `scancel` write what they are told into `calls`.

    Jobs have the numbers 101, 102, ...; a script in whose name stands the content of `refuse` is refused.
    """
    note = f"printf '%s\\n' \"$(basename \"$0\") $*\" >>'{tmp_path}/calls'"
    executable(tmp_path / "bin" / "scancel", note)
    executable(
        tmp_path / "bin" / "sbatch",
        f"""{note}
        if [[ -f '{tmp_path}/refuse' && ${{@: -1}} == *$(<'{tmp_path}/refuse')* ]]; then
          echo 'sbatch: error: invalid partition specified: moon' >&2
          echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2
          exit 1
        fi
        echo "$((100 + $(grep -c ^sbatch '{tmp_path}/calls')));cluster" """,
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / ODD, city_rows(1, 3))


def prep(*words: object) -> Path | None:
    return main(list(map(str, words)))


def test_three_jobs_are_submitted_and_each_waits_for_the_one_before(login_node, photos):
    summary = prep("--source", photos, "--out", "out", "--parts", 3)
    folder = login_node / "out.slurm"
    assert calls(login_node) == [
        ["sbatch", "--parsable", f"{folder}/plan.sbatch"],
        ["sbatch", "--parsable", "--dependency=afterok:101", f"{folder}/parts.sbatch"],
        ["sbatch", "--parsable", "--dependency=afterok:102", f"{folder}/merge.sbatch"],
    ]
    assert summary == folder / "summary.json"
    assert json.loads(summary.read_text()) == {
        "jobs": {"plan": "101", "parts": "102", "merge": "103"},
        "scripts": {name: f"{folder}/{name}.sbatch" for name in ("plan", "parts", "merge")},
        "logs": str(folder),
    }
    assert not (login_node / "out").exists()


def test_the_scripts_run_the_commands_with_every_value_as_it_was_given(login_node, photos, monkeypatch):
    """Bash is the judge: what would be Python says its words and its folder."""
    monkeypatch.setattr(sys, "executable", str(executable(login_node / "py'thon" / "py", "pwd; printf '%s\\n' \"$@\"")))
    work = "work; touch hacked"
    prep("--source", photos, "--out", f"out/{ODD}", "--parts=7", "--work", work, "--temper", 0.25, "--max-rejects=0.1")
    task = {**os.environ, "SLURM_ARRAY_TASK_ID": "2", "SLURM_CPUS_PER_TASK": "5"}
    said = {
        name: subprocess.run(
            ["bash", login_node / "out" / f"{ODD}.slurm" / f"{name}.sbatch"],
            env=task, cwd="/", capture_output=True, text=True, check=True,
        ).stdout.splitlines()
        for name in ("plan", "parts", "merge")
    }  # fmt: skip
    start = [str(login_node), "-m", "data_prep"]
    given = [f"--source={photos}", f"--out=out/{ODD}"]
    rest = ["--temper=0.25", "--max_rejects=0.1", f"--work={work}", "--workers=5"]
    assert said["plan"] == [*start, "shard", *given, *rest, "--plan"]
    assert said["parts"] == [*start, "shard", *given, *rest, "--part=2/7"]
    assert said["merge"] == [*start, "merge", f"--out=out/{ODD}", f"--work={work}"]


def directives(path: Path) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_scripts_ask_for_what_the_user_asks_and_leave_the_rest_to_the_cluster(login_node, photos):
    prep("--source", photos, "--out", "out", "--parts", 3)
    common = {"open-mode": "append", "requeue": "", "kill-on-invalid-dep": "yes"}
    folder = login_node / "out.slurm"
    assert directives(folder / "plan.sbatch") == {
        "job-name": "roadwork-plan", "output": f"{folder}/plan-%j.log", "cpus-per-task": "4", **common,
    }  # fmt: skip
    asked = {"mem": "8G", "time": "04:00:00", "partition": "cpu,long", "account": "roads", "qos": "high"}
    flags = [word for name, value in asked.items() for word in (f"--{name}", value)]
    prep("--source", photos, "--out", "out", "--parts", 3, "--cpus-per-task", 16, "--workers", 9, *flags)
    parts = directives(folder / "parts.sbatch")
    assert parts == {
        "job-name": "roadwork-parts", "output": f"{folder}/parts-%A_%a.log",
        "array": "1-3", "cpus-per-task": "16", **asked, **common,
    }  # fmt: skip
    assert re.findall(r"--workers=\S+", (folder / "parts.sbatch").read_text()) == ["--workers=9"]
    merge = directives(folder / "merge.sbatch")
    assert "array" not in merge
    assert (merge["cpus-per-task"], merge["time"]) == ("1", "04:00:00")


def test_a_url_has_its_scripts_where_the_command_was_given(login_node, photos):
    prep("--source", photos, "--out", "s3://bucket/sets/roads/", "--parts", 2)
    assert (login_node / "roads.slurm" / "plan.sbatch").is_file()


def test_a_refusal_is_one_sentence_and_takes_back_what_was_submitted(login_node, photos):
    (login_node / "refuse").write_text("merge")
    with pytest.raises(UserError) as refused:
        prep("--source", photos, "--out", "out", "--parts", 3)
    assert str(refused.value) == (
        f"sbatch refused {login_node}/out.slurm/merge.sbatch and nothing is submitted: "
        "invalid partition specified: moon; Batch job submission failed: Invalid partition name specified"
    )
    assert calls(login_node)[-1] == ["scancel", "101", "102"]
    assert not (login_node / "out.slurm" / "summary.json").exists()


def test_without_sbatch_nothing_is_written_and_dry_run_is_named(tmp_path, photos, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no sbatch on PATH.* --dry_run"):
        prep("--source", photos, "--out", tmp_path / "out", "--parts", 3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_a_dry_run_shows_the_scripts_and_does_nothing(login_node, photos, capsys, flag):
    before = sorted(login_node.rglob("*"))
    assert prep("--source", photos, "--out", "out", "--parts", 3, flag) is None
    out, shown = capsys.readouterr()
    assert out == ""
    assert f"== {login_node}/out.slurm/parts.sbatch, submitted to begin after plan\n#!/bin/bash\n" in shown
    assert '--part="$SLURM_ARRAY_TASK_ID/3"' in shown
    assert sorted(login_node.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shard_md", "9"], "unknown option 'shard_md'; did you mean 'shard_mb'?"),
        (["--part", "1/2"], "unknown option 'part'"),
        (["--plan"], "unknown option 'plan'"),
        (["--val_share", "2"], "--val_share is 2.0, but must be at least 0 and below 1"),
        (["--source", "nowhere"], "the source nowhere is not a folder"),
        (["--metadata", "none.csv"], "the metadata file none.csv does not exist"),
        (["--parts", "0"], "--parts is 0, but must be 1 or more"),
        (["--cpus_per_task", "0"], "--cpus_per_task is 0, but must be 1 or more"),
        (["--time", "1\n2"], "--time is '1\\n2', but must be a single line"),
        (["--out", "a\\b"], "without backslashes"),
    ],
)
def test_a_mistake_is_found_before_anything_is_submitted(login_node, photos, words, sentence):
    with pytest.raises(UserError) as error:
        prep("--source", photos, "--out", "out", "--parts", 3, *words)
    assert sentence in str(error.value)
    assert not (login_node / "calls").exists()
    assert not list(login_node.glob("*.slurm"))


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_the_options_of_both(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--parts" in shown
    assert "--max_rejects" in shown
    assert "--part " not in shown


def test_a_script_says_how_it_is_submitted_by_hand(tmp_path):
    first, second = Job("train-1", "true", ONE_CORE), Job("train-2", "true", ONE_CORE)
    assert "# By hand: sbatch train-1.sbatch\n" in script_of(first, tmp_path)
    assert "# By hand: sbatch --dependency=afterok:ID_OF_TRAIN-1 train-2.sbatch\n" in script_of(second, tmp_path, first)


def test_a_single_job_waits_for_none(login_node):
    submit([Job("alone", "true", ONE_CORE)], Path("here"), dry_run=False)
    assert calls(login_node) == [["sbatch", "--parsable", f"{login_node}/here/alone.sbatch"]]
