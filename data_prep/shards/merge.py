"""The command `merge`, and the end of every `shard`: written tars get their one index and are published."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.shards.planning import read_plan, tars_of
from data_prep.shards.writer import missing_tars, read_entries, read_receipt
from data_prep.work.workplace import REJECTS_NAME, SUMMARY_NAME, Workplace
from pipeline.data.index import INDEX_NAME, SPLITS, Cluster, Field, Index, Sample, Shard, Split, read_index
from pipeline.data.storage import is_url, open_folder
from pipeline.errors import UserError
from pipeline.files import write_summary, write_text
from pipeline.progress import say


def merge(out: str | Path, work: Path | None = None) -> Path | str:
    """Make the one index of shards whose parts were written by `shard --part`, and publish them.

    Args:
        out: The --out of the parts.
        work: The --work of the parts.
    """
    start, place = time.monotonic(), Workplace(str(out), work)
    if not place.path.is_dir():
        if is_finished(place):
            say(f"{place.out} is merged already")
            return summary_path(place)
        raise UserError(f"nothing to merge for {place.out}: {place.path} does not exist; begin with shard --plan")
    with place.locked():
        if is_assembled(place):
            return publish(place, read_index(place.path))
        header = planned(place)
        if header is None:
            raise UserError(f"{place.path} holds no plan; begin with shard --plan")
        return finish(place, header, time.monotonic() - start)


def planned(place: Workplace, wanted: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The header of the plan that lies in the workplace, if it is the wanted one."""
    try:
        header = read_plan(place.path)
    except (OSError, ValueError):
        return None
    return header if wanted is None or all(header.get(name) == value for name, value in wanted.items()) else None


def is_assembled(place: Workplace, wanted: dict[str, Any] | None = None) -> bool:
    """Whether a run was cut off when all was done but the last renaming."""
    try:
        summary = json.loads((place.path / SUMMARY_NAME).read_text())
        index = json.loads((place.path / INDEX_NAME).read_text())
    except (OSError, ValueError):
        return False
    if wanted is None:
        return True
    arguments = {name: index["arguments"].get(name) for name in wanted["arguments"]}
    made = {"arguments": arguments, "version": index["version"], "source_stamp": summary["source_stamp"]}
    return made == {name: wanted[name] for name in made}


def finish(place: Workplace, header: dict[str, Any], wall_s: float) -> Path | str:
    """Describe the written tars in an index, and publish all.

    Raises:
        UserError: Tars are missing.
    """
    tars = tars_of(header)
    missing = missing_tars(place.path, tars, place.upload)
    if missing:
        some = ", ".join(missing[:3])
        raise UserError(
            f"{len(missing)} of {len(tars)} tars are not there yet ({some}); "
            "give `shard` with the --part that they belong to"
        )
    index = _index(place.path, header)
    summary = header["summary"]
    for name, split in index.splits.items():
        summary["splits"][name] |= {
            "shards": len(split.shards), "bytes": sum(tar.bytes for tar in split.shards),
        }  # fmt: skip
    summary |= {
        "clusters": [asdict(cluster) for cluster in index.clusters],
        "fields": {name: asdict(field) for name, field in index.fields.items()},
        "unknown_words": index.unknown_words,
        "source_sha256": index.source_sha256,
        "source_stamp": header["source_stamp"],
        "wall_s": round(wall_s, 3),
        "images_per_s": round(summary["inputs"] / max(wall_s, 1e-3), 2),
    }
    write_summary(place.path, summary)
    write_text(place.path / INDEX_NAME, index.to_json())
    path = publish(place, index)
    _tell(summary, place.out)
    return path


def publish(place: Workplace, index: Index) -> Path | str:
    """Give an assembled output its name."""
    place.publish([tar.name for split in index.splits.values() for tar in split.shards])
    return summary_path(place)


def _index(folder: Path, header: dict[str, Any]) -> Index:
    shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    samples: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for tar in tars_of(header):
        receipt, number = read_receipt(folder, tar), len(shards[tar.split])
        shards[tar.split].append(Shard(tar.name, receipt.bytes, receipt.sha256, tar.samples))
        for entry, members in zip(read_entries(folder, tar), receipt.members, strict=True):
            r = entry["record"]
            samples[tar.split].append(
                Sample(
                    key=r["key"],
                    shard=number,
                    members=members,
                    label=r["label"],
                    group=r["group"],
                    cluster=r["gps_cluster"],
                    weight=r["sample_weight"],
                    width=r["width"],
                    height=r["height"],
                )
            )
    extra = {name: header[name] for name in ("source_kind", "text_dim")}
    return Index(
        splits={name: Split(tuple(shards[name]), tuple(samples[name])) for name in SPLITS},
        clusters=tuple(Cluster(**cluster) for cluster in header["clusters"]),
        fields={name: Field(**field) for name, field in header["fields"].items()},
        arguments={**header["arguments"], **extra},
        version=header["version"],
        source_sha256=header["source_sha256"],
        rejected=header["rejected"],
        unknown_words=header["unknown_words"],
    )


def _tell(summary: dict[str, Any], out: str) -> None:
    splits = ", ".join(f"{name} {values['samples']}" for name, values in summary["splits"].items())
    rejected = sum(summary["rejected"].values())
    counts = f"{summary['written']} of {summary['inputs']} photos written"
    say(f"{out}: {counts}, {splits}, by {summary['split_rule']}")
    if rejected:
        reasons = ", ".join(f"{count} {kind}" for kind, count in summary["rejected"].items())
        say(f"{rejected} rejected, listed in {REJECTS_NAME}: {reasons}")
    for field, words in summary["unknown_words"].items():
        most = sorted(words, key=lambda word: -words[word])[:5]
        say(f"{field}: {sum(words.values())} unknown words are left out, such as {', '.join(map(repr, most))}")
    if summary["straddling_groups"]:
        say(f"{summary['straddling_groups']} groups of near-duplicates lie in several of the source's splits")
    for name, field in summary["fields"].items():
        if field["leaks"]:
            say(f"{name} leaks the label: {field['leaks']}")


def summary_path(place: Workplace) -> Path | str:
    """Where a user finds the summary of a finished output."""
    return f"{place.out}/{SUMMARY_NAME}" if is_url(place.out) else Path(place.out) / SUMMARY_NAME


def is_finished(place: Workplace) -> bool:
    """Whether the output is there: its index is the last file to come."""
    folder = open_folder(place.out)
    return folder.exists(INDEX_NAME) and folder.exists(SUMMARY_NAME)
