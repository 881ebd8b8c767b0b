"""Saving and restoring: what is kept, what is fallen back to, what is refused, and a disk without room."""

from __future__ import annotations

import errno
import json
import resource
from functools import partial

import pytest

from pipeline.checkpoints import checkpoints, files
from pipeline.checkpoints.checkpoints import check_tensors
from pipeline.checkpoints.files import OPTIMIZER, STATE, WEIGHTS
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.optim.config import OptimConfig
from tests.checkpoints.examples import Run, names, process_group, tensors_of, write


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run in the same folder again."""
    with process_group(tmp_path / "store"):
        yield lambda **settings: Run(tmp_path / "checkpoints", monkeypatch, **settings)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_what_is_restored_is_what_was_saved_last(start):
    run = start()
    assert run.state is None
    run.save(1)
    run.save(2)
    again = start()
    assert (again.state["step"], again.state["wall_s"]) == (2, 1.5)
    assert again.holds(2)


def test_no_random_state_and_nothing_of_the_processes_is_in_a_checkpoint(start, folder):
    start().save(1)
    state = (folder / "step-00000001" / STATE).read_text()
    assert not any(word in state for word in ("rng", "random", "world", "rank", "micro_batch", "workers", "shards"))


def test_old_checkpoints_go_and_last_and_best_have_names(start, folder):
    run = start(keep=2, keep_every=4)
    for step in range(1, 8):
        run.save(step, best=min(step, 3))
    assert names(folder) == [f"step-{step:08d}" for step in (3, 4, 6, 7)]
    assert json.loads((folder / "names.json").read_text()) == {"last": "step-00000007", "best": "step-00000003"}
    start(keep=1).save(8)
    assert "step-00000003" not in names(folder)


def test_a_resumed_run_still_knows_its_best(start, folder):
    run = start(keep=1)
    for step in (1, 2):
        run.save(step, best=1)
    again = start(keep=1)
    assert again.checkpoints.best_average().keys() == again.average.tensors.keys()
    again.save(3, best=1)
    assert names(folder) == ["step-00000001", "step-00000003"]


def test_the_newest_valid_one_is_used_and_the_damaged_are_named(start, folder, capsys):
    run = start(keep=4)
    for step in (1, 2, 3, 4):
        run.save(step)
    path = folder / "step-00000004" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "step-00000003" / OPTIMIZER).unlink()
    again = start(keep=4)
    assert again.state["step"] == 2
    assert again.holds(2)
    told = capsys.readouterr().err
    assert f"checkpoint {folder}/step-00000004 is damaged (weights.safetensors has " in told
    assert f"checkpoint {folder}/step-00000003 is damaged (optimizer.safetensors is missing)" in told
    again.save(3)
    assert start().state["step"] == 3
    assert (folder / "step-00000004.damaged").is_dir()


def test_a_save_that_was_cut_off_is_no_checkpoint(start, folder):
    start().save(1)
    (folder / "step-00000001").rename(folder / ".step-00000001.tmp")
    assert start().state is None
    assert list(folder.glob(".*")) == []


def test_a_step_that_is_saved_again_is_replaced(start, folder):
    run = start()
    run.save(1)
    run.save(2)
    run.save(2, best=1)
    assert start().state["best"] == {"step": 1}
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_another_models_checkpoint_is_one_sentence_and_sets_nothing(start):
    start().save(1)
    with pytest.raises(UserError, match=r"weights\.safetensors is of another model \(a\.weight is \[4, 3\] in it and"):
        start(width=6)


def test_another_optimizers_checkpoint_is_one_sentence(folder):
    path = write(folder, 1)[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(1)[WEIGHTS].items()}
    check_tensors(path, shapes, "adamw")
    with pytest.raises(
        UserError, match=r"optimizer\.safetensors is of another optimizer \(a\.weight/exp_avg_sq is only"
    ):
        check_tensors(path, shapes, "sophia_h")


def test_a_run_with_another_optimizer_is_not_gone_on_with(start, monkeypatch):
    start().save(1)
    monkeypatch.setattr("tests.checkpoints.examples.Config", partial(Config, optim=OptimConfig(name="sophia_g")))
    with pytest.raises(UserError, match=r"state\.json is of a run with optim\.name=adamw \(now sophia_g\)"):
        start()


def test_a_checkpoint_older_than_some_keys_had_their_defaults(start):
    """And the rates of its optimizer as numbers, where they are now left open."""
    run = start()
    written = run.checkpoints.run
    written["optim"] = {
        **{key: value for key, value in written["optim"].items() if key not in {"name", "gamma", "hessian_every"}},
        "beta1": 0.9, "beta2": 0.99, "eps": 1e-8,
    }  # fmt: skip
    del written["loss"]["mixup_alpha"], written["data"]["augment_share"]
    run.save(1)
    assert start().state["step"] == 1
    with pytest.raises(UserError, match=r"is of a run with train\.seed=0 \(now 1\)"):
        start(seed=1)
    written["optim"]["beta1"] = 0.8
    run.save(2)
    with pytest.raises(UserError, match=r"is of a run with optim\.beta1=0\.8 \(now 0\.9\)"):
        start()


@pytest.mark.parametrize("written", [None, checkpoints.VERSION - 1, checkpoints.VERSION + 1])
def test_a_run_whose_epochs_had_another_order_is_not_gone_on_with(start, folder, monkeypatch, written):
    """Before anything else is compared, since its model may be older, too."""
    run = start()
    if written is not None:
        monkeypatch.setattr(checkpoints, "VERSION", written)
    else:
        monkeypatch.setattr(checkpoints, "write_checkpoint", without_sampler)
    run.save(1)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"state\.json is of a run .* another order; finish it with that version, or"):
        start(width=6)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def without_sampler(folder, step, tensors, state):
    """Write a checkpoint as versions did that knew one order only."""
    files.write_checkpoint(folder, step, tensors, {key: value for key, value in state.items() if key != "sampler"})


def test_another_runs_checkpoint_is_one_sentence(start):
    start().save(1)
    with pytest.raises(UserError, match=r"state\.json is of a run with train\.seed=0 \(now 1\)"):
        start(seed=1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_costs_a_checkpoint_and_no_more(start, folder, monkeypatch, capsys, number):
    run = start(keep=1)
    run.save(1)
    real = files._write

    def fail(path, parts):
        if path.name == OPTIMIZER:
            path.write_bytes(next(parts)[:10])
            raise OSError(number, "No room")
        return real(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", fail)
        run.save(2)
    assert names(folder) == ["step-00000001"]
    assert list(folder.glob(".*")) == []
    told = "the checkpoint of step 2 is not saved (no room); the newest checkpoint is that of step 1"
    assert capsys.readouterr().err.splitlines() == [told]
    run.checkpoints.close()
    assert "the state of step 2 is not saved; the newest checkpoint is that of step 1" in capsys.readouterr().err
    run.save(3)
    run.checkpoints.close()
    assert capsys.readouterr().err == ""
    assert start().state["step"] == 3


def test_a_file_that_the_system_lets_grow_no_further_is_no_end_either(start, folder, capsys):
    """The real thing without a full disk: `ulimit -f`."""
    run = start()
    run.save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        run.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the checkpoint of step 2 is not saved (file too large)" in capsys.readouterr().err
    assert names(folder) == ["step-00000001"]
    assert start().state["step"] == 1


def test_a_folder_without_rights_is_the_users_to_mend(start, monkeypatch):
    run = start()

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x")

    monkeypatch.setattr(checkpoints, "write_checkpoint", refuse)
    with pytest.raises(UserError, match="runs/x: permission denied"):
        run.save(1)
