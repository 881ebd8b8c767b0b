"""The command `shard`: photos and metadata become WebDataset tars and the index that describes them.

Three steps. The first reads every photo and keeps a few facts of each (`intake`). From these, splits, clusters,
weights and the place of every sample are decided once (`planning`). The third copies bytes (`writer`), here or in
parts on several machines. What is done stays when a step is cut off.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from data_prep.decisions.gps import read_target
from data_prep.decisions.maps import draw_map
from data_prep.photos.inspection import Scrutiny
from data_prep.shards.intake import Intake, masks_stamp, take_in
from data_prep.shards.merge import finish, is_assembled, is_finished, planned, publish, summary_path
from data_prep.shards.planning import Arguments, decide, tars_of, write_plan
from data_prep.shards.writer import Job, has_receipt, write_tar
from data_prep.sources import open_source
from data_prep.work.parallel import Workers
from data_prep.work.workplace import JOURNAL_NAME, MAP_NAME, REJECTS_NAME, SUMMARY_NAME, Workplace, check_apart
from pipeline.data.index import read_index
from pipeline.data.storage import is_url, open_folder
from pipeline.errors import UserError, require
from pipeline.files import sha256_of, write_json, write_summary, write_text
from pipeline.progress import say, track

REMEDY = "choose another --out or remove it"


def shard(
    source: str | Path,
    out: str | Path,
    *,
    metadata: Path | None = None,
    revision: str | None = None,
    splits: Literal["geographic", "keep", "random"] = "geographic",
    val_share: float = 0.15,
    test_share: float = 0.15,
    distance_m: float = 100.0,
    clusters: int = 0,
    temper: float = 0.5,
    target_gps: Path | None = None,
    text_encoder: str = "",
    masks: Path | None = None,
    check: Literal["decode", "header"] = "decode",
    shard_mb: float = 64.0,
    seed: int = 0,
    workers: int = 0,
    max_rejects: float | None = None,
    plan: bool = False,
    part: str | None = None,
    work: Path | None = None,
) -> Path | str:
    """Turn photos and metadata into WebDataset tars with an index, ready for training.

    Cut off at any moment, the same command goes on: tars that are finished are not written again.

    Args:
        source: Folder of photos, with or without a metadata table; folder of a hub data set's Parquet files or of
            `save_to_disk`; or the id of a data set on the hub, which is read as a stream.
        out: Folder to make, or an fsspec URL (s3://bucket/folder). A folder appears when all is done; if it has the
            same content already, it is kept.
        metadata: CSV, JSONL or Parquet table with a column file_name, or COCO annotations (.json); if not given,
            metadata.* in the source.
        revision: Of a data set on the hub.
        splits: geographic puts whole cities into one split, random puts groups of near-duplicates anywhere, keep
            takes the splits that the source has.
        val_share: Share of the photos for validation; with keep, of the training photos if the source has no
            validation split (0 leaves it without).
        test_share: Share of the photos for the test; unused with keep.
        distance_m: Photos closer than this, in metres, stay in one split.
        clusters: GPS clusters for the sampling weights; 0 finds their number by silhouette.
        temper: How far weights even out the clusters, from 0, not at all, to 1, completely.
        target_gps: Table with the GPS of places where the model will be used; clusters then weigh what they weigh
            there. Without it all clusters have the same target share.
        text_encoder: Sentence encoder, a hub id or a folder, that turns descriptions into vectors.
        masks: Folder of masks that the command masks made.
        check: decode looks at every pixel; header is faster and finds neither truncated photos nor near-duplicates.
        shard_mb: A tar is closed when it has grown to this many megabytes.
        seed: Of the splits, the clusters and the order of training samples.
        workers: Processes; 0 takes every core. The result is the same.
        max_rejects: Stop at more rejects than this: a share below 1, or a number. Unlimited if not given.
        plan: Stop when it is decided where each photo goes, so that parts can be written elsewhere.
        part: Of a planned run, as i/n: write every n-th tar from the i-th on. The command merge ends the run.
        work: Folder for what is under way, on a disk that all parts see; if not given, the folder that out is in, or
            the current one for a URL.
    """
    start, share = time.monotonic(), _parse_part(part)
    require(not (plan and share), "--part", part, "absent with --plan: first one, then the other")
    check_options(masks, target_gps, workers, max_rejects)
    target_digest = sha256_of(target_gps) if target_gps is not None else ""
    place = Workplace(str(out), work)
    encoder = _identify(text_encoder, place, share)
    arguments = Arguments(
        splits, val_share, test_share, distance_m, clusters, temper, target_digest, encoder, check, shard_mb, seed
    )
    photos = open_source(source, metadata, revision)
    scrutiny = Scrutiny(check == "decode", None if masks is None else str(masks.resolve()))
    stamp = f"{photos.stamp()}{masks_stamp(scrutiny.masks)}"
    check_apart(source, place.path, *([] if is_url(place.out) else [Path(place.out)]))
    finished = _finished(place, arguments)
    if finished is not None and finished["source_stamp"] == stamp:
        say(f"{place.out} is finished already: the same source, the same arguments")
        if place.path.exists():  # a run was cut off when it cleaned up
            with place.locked():
                place.remove()
        return summary_path(place)

    def look(pool: Workers) -> Intake:
        place.clear(keep=frozenset({JOURNAL_NAME}))
        return take_in(photos, place.path, pool, scrutiny, max_rejects)

    with place.locked(shared=share is not None), Workers(workers, preload=(write_tar.__module__,)) as pool:
        if finished is None and is_finished(place):
            raise UserError(f"another run has just finished {place.out}; give the command again to compare")
        if finished is not None:
            return _compare(place, finished, look(pool), stamp)
        wanted = {
            "arguments": asdict(arguments),
            "version": version("roadwork"),
            "source": str(Path(source).resolve() if Path(source).exists() else source),
            "source_stamp": stamp,
            "text_encoder": text_encoder,
        }
        if share is None and is_assembled(place, wanted):
            return publish(place, read_index(place.path))
        header = planned(place, wanted)
        if header is None and share is not None:
            raise UserError(
                f"no plan of these arguments in {place.path}; give this command with --plan and without --part first"
            )
        if header is None:
            header = _plan(place, wanted, look(pool), arguments, target_gps)
        if plan:
            say(f"{place.path}: {len(header['tars'])} tars planned; write them with --part 1/n to n/n, then merge")
            return write_summary(place.path, header["summary"])
        _write_tars(place, header, share or (1, 1), pool)
        if share is not None:
            return write_summary(place.path / f"part-{share[0]}-of-{share[1]}", header["summary"])
        return finish(place, header, time.monotonic() - start)


def check_options(masks: Path | None, target_gps: Path | None, workers: int, max_rejects: float | None) -> None:
    """Refuse what `shard` cannot work with, of its options that are not `Arguments`.

    Raises:
        UserError: A value is out of range, or a file is not there.
    """
    require(workers >= 0, "--workers", workers, "0 for every core, or the number of processes")
    require(max_rejects is None or max_rejects >= 0, "--max_rejects", max_rejects, "0 or more")
    if masks is not None and not masks.is_dir():
        raise UserError(f"--masks {masks} is not a folder; the command masks makes one")
    if target_gps is not None and not target_gps.is_file():
        raise UserError(f"--target_gps {target_gps} does not exist")


def kind_of(source: str | Path) -> str:
    """What the photos are, as the summary of the command that made them says; else just photographs."""
    try:
        return str(json.loads((Path(source) / SUMMARY_NAME).read_text())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return "photographs"


def _parse_part(part: str | None) -> tuple[int, int] | None:
    """`2/3` becomes (2, 3)."""
    if part is None:
        return None
    first, slash, second = part.partition("/")
    valid = bool(slash) and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)
    require(valid, "--part", part, "i/n with i from 1 to n, such as 2/3")
    return int(first), int(second)


def _identify(text_encoder: str, place: Workplace, share: tuple[int, int] | None) -> str:
    """The encoder's name and fingerprint; a part, on a node without network perhaps, takes them from its plan."""
    if not text_encoder:
        return ""
    if share is not None:
        header = planned(place, {"text_encoder": text_encoder})
        return "" if header is None else str(header["arguments"]["text_encoder"])
    from data_prep.photos.text import identify  # transformers: more than a second, which no other run should wait for

    return identify(text_encoder)


def _finished(place: Workplace, arguments: Arguments) -> dict[str, Any] | None:
    """The summary of a finished output, or None if it can be made.

    Raises:
        UserError: It has other content, or tars are missing.
    """
    if not is_finished(place):
        local = None if is_url(place.out) else Path(place.out)
        if local is not None and local.exists() and (not local.is_dir() or any(local.iterdir())):
            raise UserError(f"{place.out} exists and holds no finished shards; {REMEDY}")
        return None
    folder, index = open_folder(place.out), read_index(place.out)
    for name, value in asdict(arguments).items():
        if index.arguments.get(name) != value:
            made_with = index.arguments.get(name)
            raise UserError(f"{place.out} holds shards made with --{name} {made_with}, not {value}; {REMEDY}")
    for tar in (tar for split in index.splits.values() for tar in split.shards):
        if not folder.exists(tar.name) or folder.size(tar.name) != tar.bytes:
            raise UserError(f"{place.out} is damaged, {tar.name} is missing or not {tar.bytes} bytes long; {REMEDY}")
    try:
        summary: dict[str, Any] = json.loads(folder.read(SUMMARY_NAME))
        return {**summary, "source_stamp": summary["source_stamp"], "source_sha256": summary["source_sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place.out} is damaged, its {SUMMARY_NAME} cannot be read; {REMEDY}") from error


def _compare(place: Workplace, finished: dict[str, Any], intake: Intake, stamp: str) -> Path | str:
    """The source's files look touched: are the photos still those of the finished output?"""
    if finished["source_sha256"] != intake.sha256:
        place.remove()
        raise UserError(f"{place.out} holds shards of other photos or masks than the source has; {REMEDY}")
    say(f"{place.out} is finished already: the same photos, the same arguments")
    write_json(place.path / SUMMARY_NAME, {**finished, "source_stamp": stamp})
    open_folder(place.out).put(place.path / SUMMARY_NAME, SUMMARY_NAME)
    place.remove()
    return summary_path(place)


def _plan(
    place: Workplace, wanted: dict[str, Any], intake: Intake, arguments: Arguments, target_gps: Path | None
) -> dict[str, Any]:
    """Decide, and put what was decided on the disk."""
    target = None if target_gps is None else read_target(target_gps)
    texts = None
    if wanted["text_encoder"]:
        from data_prep.photos.text import embed

        texts = embed([photo.parsed.metadata.description for photo in intake.photos], wanted["text_encoder"])
    decisions = decide(intake.photos, arguments, target)
    draw_map(
        place.path / MAP_NAME,
        decisions.points,
        decisions.assignment.splits,
        decisions.clusters,
        decisions.weights,
        decisions.centres,
    )
    rejects = "".join(json.dumps(asdict(reject)) + "\n" for reject in intake.rejects)
    write_text(place.path / REJECTS_NAME, rejects)
    if decisions.far_share:
        say(f"{decisions.far_share:.0%} of the places in {target_gps} are far from every cluster of training photos")
    return write_plan(
        place.path,
        intake,
        decisions,
        texts,
        {
            **wanted,
            "text_dim": 0 if texts is None else texts.dim,
            "source_kind": kind_of(wanted["source"]),
        },
    )


def _write_tars(place: Workplace, header: dict[str, Any], share: tuple[int, int], pool: Workers) -> None:
    """Write the tars of one part that are not there yet."""
    part, parts = share
    jobs = [Job(str(place.path), tar, place.upload) for tar in tars_of(header)[part - 1 :: parts]]
    missing = [job.tar for job in jobs if not has_receipt(place.path, job.tar)]
    sizes = sorted((tar.bytes for tar in missing), reverse=True)
    place.check_space(sum(sizes if place.upload is None else sizes[: pool.count]))
    if len(missing) < len(jobs):
        say(f"going on: {len(jobs) - len(missing)} of {len(jobs)} tars are written already")
    images = sum(job.tar.samples for job in jobs)
    for _ in track(pool.map(write_tar, jobs), images, "writing", amount=lambda done: done[0].tar.samples):
        pass
