"""The command `shard`: photos and metadata become WebDataset tars and the index that describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data_prep.shards.options import Arguments, Options
from pipeline.data.weights import BALANCE, TEMPER


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
    temper: float = TEMPER,
    balance: float = BALANCE,
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

    It may be interrupted at any moment: the same command resumes, and tars that are finished are not written again.

    Args:
        source: Folder of photos, with or without a metadata table; of WebDataset tars, such as shards; of a hub data
            set's Parquet files; or of `save_to_disk`. Or the id of a data set on the hub, which is read as a stream.
        out: Folder to make, or an fsspec URL (s3://bucket/folder). A folder appears when all is done; if it has the
            same content already, it is kept.
        metadata: CSV, TSV, JSONL or Parquet table with a column file_name, or COCO annotations (.json); if not given,
            metadata.* in the source.
        revision: Branch, tag or commit of a data set on the hub.
        splits: geographic puts whole cities into one split, random puts groups of near-duplicates anywhere, keep
            takes the splits that the source has.
        val_share: Share of the photos for validation; with keep, of the training photos if the source has no
            validation split (0 leaves it without).
        test_share: Share of the photos for the test; unused with keep.
        distance_m: Photos closer than this, in metres, stay in one split.
        clusters: GPS clusters for the sampling weights; 0 finds their number by silhouette.
        temper: How far weights even out the clusters, from 0, not at all, to 1, completely.
        balance: How far weights even out the two classes inside each cluster, from 0, not at all, to 1, completely.
        target_gps: Table with the GPS of places where the model will be used; each cluster's target share is then its
            share of these places. Without it all clusters have the same target share.
        text_encoder: Sentence encoder, a hub id or a folder, that turns descriptions into vectors.
        masks: Folder of masks that the command masks made.
        check: decode looks at every pixel; header is faster and finds neither truncated photos nor near-duplicates.
        shard_mb: A tar is closed when it has grown to this many megabytes.
        seed: Seed of the choice between equally good splits, of the clusters, and of the order of training samples.
        workers: Processes; 0 takes every core. The result is the same.
        max_rejects: Stop at more rejects than this: a share below 1, or a number. Unlimited if not given.
        plan: Stop when it is decided where each photo goes, so that parts can be written elsewhere.
        part: Write a part of a planned run, as i/n: every n-th tar from the i-th on. The command merge ends the run.
        work: Folder for unfinished work, on a disk that all parts see; if not given, the folder that out is in, or the
            current folder if out is a URL.
    """
    options = Options(metadata, revision, target_gps, text_encoder, masks, workers, max_rejects, work, plan, part)
    arguments = Arguments(
        splits, val_share, test_share, distance_m, clusters, temper, balance, "", "", check, shard_mb, seed
    )  # fmt: skip
    from data_prep.shards.job import make_shards  # scipy and scikit-learn: seconds that --help does not wait for

    return make_shards(source, out, arguments, options)
