"""Answers that are kept until all are there, whatever ends the work before."""

from __future__ import annotations

import errno
import fcntl
import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.kept_answers import KeptAnswers

PLAN = {"--model": "a", "--batch_size": 3}


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(10):
        (tmp_path / "photos" / f"{number}.jpg").touch()
    return tmp_path / "photos"


def begin(folder: Path, photos: Path, plan: dict = PLAN) -> tuple[KeptAnswers, tuple[int, int]]:
    kept = KeptAnswers(folder / "x.csv", 3)
    with kept.locked():
        return kept, kept.begin(plan, [str(photos)], None, 1)


def answer(kept: KeptAnswers, rank: int, world_size: int, batches: int, word: str) -> None:
    """Answer some batches of a process's share with a word and the path."""
    share = kept.missing(10, rank, world_size)
    rows = [{"error": f"{word} {kept.photos[row].name}"} for row in share]
    found = [(int(n), rows[3 * i : 3 * i + 3]) for i, n in enumerate(share.numbers)]
    kept.keep(rank, found[:batches])


def words(kept: KeptAnswers) -> list[str]:
    found = list(kept.rows())
    assert [row["error"].split()[1] for _, row in found] == [path.name for path, _ in found]
    return [row["error"].split()[0] for _, row in found]


def test_batches_of_several_processes_and_attempts_come_together_in_order(photos, tmp_path):
    kept, counts = begin(tmp_path, photos)
    assert counts == (10, 0)
    answer(kept, 0, 2, 9, "a")
    answer(kept, 1, 2, 1, "b")
    kept, counts = begin(tmp_path, photos)
    assert counts == (10, 9)
    for rank in range(3):  # of which two find nothing to do
        answer(kept, rank, 3, 9, "c")
    assert words(kept) == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["c"]
    kept.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_that_a_kill_cut_off_is_answered_again(photos, tmp_path, cut):
    kept, _ = begin(tmp_path, photos)
    answer(kept, 0, 1, 2, "a")
    part = kept.folder / "part-00000.jsonl"
    part.write_bytes(part.read_bytes()[:-cut])
    kept, counts = begin(tmp_path, photos)
    assert counts == (10, 3 if cut > 1 else 6)  # the end of a line is no part of an answer
    answer(kept, 0, 1, 9, "b")
    assert words(kept).count("a") == counts[1]


def test_answers_that_were_taken_twice_count_once(photos, tmp_path):
    """As where a kill came after the answers of a part were taken, and before it was removed."""
    kept, _ = begin(tmp_path, photos)
    answer(kept, 0, 1, 2, "a")
    shutil.copy(kept.folder / "part-00000.jsonl", tmp_path / "part")
    kept, _ = begin(tmp_path, photos)
    shutil.copy(tmp_path / "part", kept.folder / "part-00000.jsonl")
    kept, counts = begin(tmp_path, photos)
    assert counts == (10, 6)


def test_photos_that_come_later_are_left_to_another_prediction(photos, tmp_path, capsys):
    kept, _ = begin(tmp_path, photos)
    answer(kept, 0, 1, 1, "a")
    (photos / "00.jpg").touch()
    kept, counts = begin(tmp_path, photos)
    assert counts == (10, 3)
    assert "resuming: 3 of 10 photos, as listed at the first start, have an answer" in capsys.readouterr().err


@pytest.mark.parametrize(("plan", "different"), [
    ({**PLAN, "--model": "b"}, "--model"), ({"--model": "b", "--batch_size": 4}, "--model and --batch_size"),
])  # fmt: skip
def test_another_plan_starts_anew_and_says_why(photos, tmp_path, capsys, plan, different):
    kept, _ = begin(tmp_path, photos)
    answer(kept, 0, 1, 9, "a")
    kept, counts = begin(tmp_path, photos, plan)
    assert counts == (10, 0)
    said = capsys.readouterr().err
    assert f"starting anew: the answers in {kept.folder} were made with another {different}\n" in said
    assert len(kept.missing(10, 0, 1)) == 10


def test_a_list_that_was_not_finished_is_made_again(photos, tmp_path):
    def interrupted():
        yield str(photos)
        raise KeyboardInterrupt

    kept = KeptAnswers(tmp_path / "x.csv", 3)
    with kept.locked(), pytest.raises(KeyboardInterrupt):
        kept.begin(PLAN, interrupted(), None, 1)
    assert kept.database.exists()
    (photos / "00.jpg").touch()
    assert begin(tmp_path, photos)[1] == (11, 0)
    kept.database.write_bytes(b"damage" * 1000)
    assert begin(tmp_path, photos)[1] == (11, 0)


def test_two_at_a_time_are_refused(photos, tmp_path):
    kept, _ = begin(tmp_path, photos)
    with kept.locked(), pytest.raises(UserError, match=r"another process .* is writing .*x\.csv at this moment"):
        begin(tmp_path, photos)
    begin(tmp_path, photos)


def test_a_disk_without_locks_is_no_obstacle_and_is_told_of(photos, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    kept, _ = begin(tmp_path, photos)
    assert f"see to it that nothing else is writing {kept.output}" in capsys.readouterr().err
    answer(kept, 0, 1, 9, "a")
    assert len(words(kept)) == 10


def test_the_folder_goes_with_its_last_answers(photos, tmp_path):
    kept = KeptAnswers(tmp_path / "x.csv", 3)
    with kept.locked():
        kept.begin(PLAN, [str(photos)], None, 1)
        kept.remove()
    assert not kept.folder.exists()
    assert begin(tmp_path, photos)[1] == (10, 0)


def test_the_first_process_makes_the_files_of_all(photos, tmp_path):
    """Over NFS it may not see names that others have just made."""
    kept = KeptAnswers(tmp_path / "x.csv", 3)
    for processes in (3, 2):
        with kept.locked():
            kept.begin(PLAN, [str(photos)], None, processes)
        assert len(list(kept.folder.glob("part-*.jsonl"))) == processes
