"""The command `merge`, and the end of every `shard`: write one index for all tars, and publish them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.shards.plan import Plan, read_entries
from data_prep.shards.writer import record_bytes
from data_prep.work.receipts import Receipts
from data_prep.work.workplace import REJECTS_NAME, Workplace
from pipeline.data.index import INDEX_NAME, SPLITS, Index, Sample, Shard, Split, read_index, shares
from pipeline.errors import UserError
from pipeline.files import write_summary, write_text
from pipeline.progress import say

# The fields that an index takes unchanged from its plan.
FROM_PLAN = ("clusters", "fields", "version", "source_sha256", "rejected", "unknown_words")


def merge(out: str | Path, work: Path | None = None) -> Path | str:
    """Make the one index of shards whose parts were written by `shard --part`, and publish them.

    Args:
        out: The --out of the parts.
        work: The --work of the parts.
    """
    start, workplace = time.monotonic(), Workplace(str(out), work)
    if not workplace.path.is_dir():
        if workplace.is_finished():
            say(f"{workplace.out} is merged already")
            return workplace.summary_path
        raise UserError(
            f"nothing to merge for {workplace.out}: {workplace.path} does not exist; begin with shard --plan"
        )
    with workplace.locked():
        index = workplace.assembled(read_index)
        if index is not None:
            return workplace.publish(tars_of(index))
        plan = workplace.planned(Plan.from_json)
        if plan is None:
            raise UserError(f"{workplace.path} holds no plan; begin with shard --plan")
        return finish(workplace, plan, time.monotonic() - start)


def tars_of(index: Index) -> list[Shard]:
    """The tars of all splits."""
    return [tar for split in index.splits.values() for tar in split.shards]


def finish(workplace: Workplace, plan: Plan, wall_s: float) -> Path | str:
    """Describe the written tars in an index, and publish all.

    Raises:
        UserError: Tars are missing.
    """
    missing = Receipts(workplace.path, workplace.upload).missing([tar.name for tar in plan.tars])
    if missing:
        some = ", ".join(missing[:3])
        raise UserError(
            f"{len(missing)} of {len(plan.tars)} tars are not there yet ({some}); "
            "give `shard` with the --part that they belong to"
        )
    index, summary = _index(workplace.path, plan), plan.summary
    for name, split in index.splits.items():
        summary["splits"][name] |= {"shards": len(split.shards), "bytes": sum(tar.bytes for tar in split.shards)}
    summary |= {
        "clusters": [asdict(cluster) for cluster in index.clusters],
        "fields": {name: asdict(field) for name, field in index.fields.items()},
        "unknown_words": index.unknown_words,
        "source_sha256": index.source_sha256,
        "source_stamp": plan.source_stamp,
        "wall_s": round(wall_s, 3),
        "images_per_s": round(summary["inputs"] / max(wall_s, 1e-3), 2),
    }
    write_summary(workplace.path, summary)
    write_text(workplace.path / INDEX_NAME, index.to_json())
    path = workplace.publish(tars_of(index))
    _tell(summary, workplace.out)
    return path


def _index(folder: Path, plan: Plan) -> Index:
    tars: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    samples: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for tar in plan.tars:
        receipt, number = Receipts(folder).read(tar.name), len(tars[tar.split])
        tars[tar.split].append(Shard(tar.name, receipt["bytes"], receipt["sha256"], tar.samples))
        for entry, places in zip(read_entries(folder, tar.name), receipt["members"], strict=True):
            record, members = entry["record"], {name: (at[0], at[1]) for name, at in places.items()}
            same = {name: record[name] for name in ("key", "label", "group", "width", "height")}
            near = {"cluster": record["gps_cluster"], "weight": record["sample_weight"]}
            digest = hashlib.sha256(record_bytes(record)).hexdigest()
            samples[tar.split].append(Sample(shard=number, members=members, **same, **near, record_sha256=digest))
    extra = {"source_kind": plan.source_kind, "text_dim": plan.text_dim}
    splits = {name: Split(tuple(tars[name]), tuple(samples[name])) for name in SPLITS}
    train = splits["train"]
    return Index(
        splits=splits,
        arguments={**asdict(plan.arguments), **extra},
        asked_shares=shares(train.weights, train.clusters, train.labels),
        **{name: getattr(plan, name) for name in FROM_PLAN},
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
