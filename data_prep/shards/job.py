"""How the command `shard` makes shards.

There are three steps. The first reads every photo and keeps a few facts of each (`intake`). From these, the second
decides splits, clusters, weights and the tar of every sample, once (`planning`). The third copies bytes (`writer`), on
one machine or in parts on several. If a step is interrupted, what is done is kept.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.decisions.gps import read_target
from data_prep.decisions.maps import draw_map
from data_prep.photos.inspection import LIBRARIES, Scrutiny, write_rejects
from data_prep.shards.intake import Intake, masks_stamp, take_in
from data_prep.shards.merge import finish, tars_of
from data_prep.shards.options import Arguments, Options
from data_prep.shards.plan import Plan, Wanted
from data_prep.shards.planning import decide, write_plan
from data_prep.shards.writer import Job, write_tar
from data_prep.sources.opening import open_source
from data_prep.work.parallel import Workers
from data_prep.work.receipts import Receipts
from data_prep.work.workplace import JOURNAL_NAME, MAP_NAME, REJECTS_NAME, SUMMARY_NAME, Workplace, check_apart
from pipeline.data.index import INDEX_NAME, Index, read_index
from pipeline.data.storage import open_folder
from pipeline.errors import UserError
from pipeline.files import sha256_of, write_json, write_summary
from pipeline.progress import say, track

# Arguments that older indexes lack, with the values that those shards were made with.
BEFORE = {"balance": 1.0}
FEW_BYTES = 64_000_000  # one process writes them before others would have started


def make_shards(source: str | Path, out: str | Path, arguments: Arguments, options: Options) -> Path | str:
    """Make shards, or as much of them as is asked for.

    Args:
        source: See the command `shard`.
        out: See the command `shard`.
        arguments: What decides the content, without the digests of files, which are filled in here.
        options: Where the inputs are, and how the work is done.
    """
    start, workplace = time.monotonic(), Workplace(str(out), options.work)
    arguments = replace(
        arguments,
        target_gps="" if options.target_gps is None else sha256_of(options.target_gps),
        text_encoder=_identify(options, workplace),
    )
    photos = open_source(source, options.metadata, options.revision)
    scrutiny = Scrutiny(arguments.check == "decode", None if options.masks is None else str(options.masks.resolve()))
    stamp = f"{photos.stamp()}{masks_stamp(scrutiny.masks)}"
    check_apart(source, workplace.path, *([] if workplace.upload else [Path(workplace.out)]))
    finished = _read_finished(workplace, arguments)
    if finished is not None and finished["source_stamp"] == stamp:
        say(f"{workplace.out} is finished already: the same source, the same arguments")
        if workplace.path.exists():  # a run was cut off when it cleaned up
            with workplace.locked():
                workplace.remove()
        return workplace.summary_path

    def look(pool: Workers) -> Intake:
        workplace.clear(keep=frozenset({JOURNAL_NAME}))
        return take_in(photos, workplace.path, pool, scrutiny, options.max_rejects)

    share = options.share
    preload = ("data_prep.shards.intake", "data_prep.shards.writer", *LIBRARIES)
    with workplace.locked(shared=share is not None), Workers(options.workers, preload) as pool:
        if finished is not None:
            return _compare(workplace, finished, look(pool), stamp)
        if workplace.is_finished():
            raise UserError(f"another run has just finished {workplace.out}; give the command again to compare")
        named = str(Path(source).resolve() if Path(source).exists() else source)
        wanted = Wanted(arguments, version("roadwork"), named, stamp, options.text_encoder)
        index = workplace.assembled(read_index) if share is None else None
        if index is not None and _is_wanted(workplace, index, wanted):
            return workplace.publish(tars_of(index))
        plan = workplace.planned(Plan.from_json)
        if plan is None or not plan.answers(wanted):
            if share is not None:
                raise UserError(
                    f"no plan of these arguments in {workplace.path}; "
                    "give this command with --plan and without --part first"
                )
            plan = _make_plan(workplace, wanted, look(pool), options.target_gps)
        if options.plan:
            say(f"{workplace.path}: {len(plan.tars)} tars planned; write them with --part 1/n to n/n, then merge")
            return write_summary(workplace.path, plan.summary)
        _write_tars(workplace, plan, share or (1, 1), pool)
        if share is not None:
            return write_summary(workplace.path / f"part-{share[0]}-of-{share[1]}", plan.summary)
        return finish(workplace, plan, time.monotonic() - start)


def kind_of(source: str | Path) -> str:
    """What the photos are: what the summary of the command that made them says, or an index, or just photographs."""
    for name, keys in ((SUMMARY_NAME, ("kind",)), (INDEX_NAME, ("arguments", "source_kind"))):
        with suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads((Path(source) / name).read_text())
            for key in keys:
                value = value[key]
            return str(value)
    return "photographs"


def _identify(options: Options, workplace: Workplace) -> str:
    """The encoder's name and fingerprint; a part, whose node may have no network, takes them from its plan."""
    if not options.text_encoder:
        return ""
    if options.share is not None:
        plan = workplace.planned(Plan.from_json)
        return plan.arguments.text_encoder if plan and plan.text_encoder == options.text_encoder else ""
    from data_prep.photos.text import SentenceEncoder  # transformers: seconds that no other run should wait for

    return SentenceEncoder(options.text_encoder).identity


def _first_difference(index: Index, arguments: Arguments) -> str | None:
    """The first argument whose value differs from the index's; None if all agree."""
    return next((name for name, value in asdict(arguments).items() if _made_with(index, name) != value), None)


def _made_with(index: Index, name: str) -> Any:
    """The value of an argument that shards were made with; None if it is not known."""
    return index.arguments.get(name, BEFORE.get(name))


def _read_finished(workplace: Workplace, arguments: Arguments) -> dict[str, Any] | None:
    """The summary of a finished output; None if there is no output yet.

    Raises:
        UserError: The output has other content, or tars are missing.
    """
    index = workplace.finished(read_index, "shards")
    if index is None:
        return None
    name = _first_difference(index, arguments)
    if name is not None:
        made_with = _made_with(index, name)
        raise workplace.refused(f"holds shards made with --{name} {made_with}, not {getattr(arguments, name)}")
    workplace.check_whole(tars_of(index))
    try:
        summary: dict[str, Any] = json.loads(open_folder(workplace.out).read(SUMMARY_NAME))
        return {**summary, "source_stamp": summary["source_stamp"], "source_sha256": summary["source_sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise workplace.refused(f"is damaged, its {SUMMARY_NAME} cannot be read") from error


def _is_wanted(workplace: Workplace, index: Index, wanted: Wanted) -> bool:
    """Whether an assembled output is the one that a run was asked for."""
    stamp = json.loads((workplace.path / SUMMARY_NAME).read_text()).get("source_stamp")
    same = (index.version, stamp) == (wanted.version, wanted.source_stamp)
    return same and _first_difference(index, wanted.arguments) is None


def _compare(workplace: Workplace, finished: dict[str, Any], intake: Intake, stamp: str) -> Path | str:
    """Check that the photos are still those of the finished output, since the source's files seem to have changed."""
    if finished["source_sha256"] != intake.sha256:
        workplace.remove()
        raise workplace.refused("holds shards of other photos or masks than the source has")
    say(f"{workplace.out} is finished already: the same photos, the same arguments")
    write_json(workplace.path / SUMMARY_NAME, {**finished, "source_stamp": stamp})
    open_folder(workplace.out).put(workplace.path / SUMMARY_NAME, SUMMARY_NAME)
    workplace.remove()
    return workplace.summary_path


def _make_plan(workplace: Workplace, wanted: Wanted, intake: Intake, target_gps: Path | None) -> Plan:
    """Make all decisions, and write them to the disk as a plan."""
    target = None if target_gps is None else read_target(target_gps)
    texts = None
    if wanted.text_encoder:
        from data_prep.photos.text import embed

        texts = embed([photo.parsed.metadata.description for photo in intake.photos], wanted.text_encoder)
    decided = decide(intake.photos, wanted.arguments, target)
    splits = decided.assignment.splits
    draw_map(workplace.path / MAP_NAME, decided.points, splits, decided.clusters, decided.weights, decided.centres)
    write_rejects(workplace.path / REJECTS_NAME, intake.rejects)
    if decided.far_share:
        say(f"{decided.far_share:.0%} of the places in {target_gps} are far from every cluster of training photos")
    return write_plan(workplace.path, wanted, kind_of(wanted.source), intake, decided, texts)


def _write_tars(workplace: Workplace, plan: Plan, share: tuple[int, int], pool: Workers) -> None:
    """Write the tars of one part that are not there yet."""
    part, parts = share
    jobs = [Job(str(workplace.path), tar, workplace.upload) for tar in plan.tars[part - 1 :: parts]]
    receipts = Receipts(workplace.path)
    missing = [job.tar for job in jobs if not receipts.exists(job.tar.name)]
    sizes = sorted((tar.bytes for tar in missing), reverse=True)
    workplace.check_space(sum(sizes if workplace.upload is None else sizes[: pool.count]))
    if len(missing) < len(jobs):
        say(f"resuming: {len(jobs) - len(missing)} of {len(jobs)} tars are written already")
    images = sum(job.tar.samples for job in jobs)
    alone_up_to = len(jobs) if sum(sizes) <= FEW_BYTES else 0
    for _ in track(pool.map(write_tar, jobs, alone_up_to), images, "writing", amount=lambda done: done[0].tar.samples):
        pass
