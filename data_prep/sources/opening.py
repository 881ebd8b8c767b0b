"""Find out which kind of source the user means, and open it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from data_prep.sources.coco import CocoSource
from data_prep.sources.content import Source
from data_prep.sources.folders import FolderSource, TableSource, list_files
from data_prep.sources.hub import open_hub, open_parquet, open_saved
from data_prep.sources.tables import READERS, shorten
from data_prep.sources.tars import TarSource
from pipeline.data.index import INDEX_NAME
from pipeline.data.photo_files import is_photo_name
from pipeline.errors import UserError
from pipeline.progress import say

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
SAVED_MARKS = ("dataset_dict.json", "dataset_info.json")


def open_source(source: str | Path, metadata: Path | None = None, revision: str | None = None) -> Source:
    """Open a source, whatever its kind.

    Args:
        source: Folder of photos, of WebDataset tars, of a hub data set's Parquet files or of `save_to_disk`; or, where
            there is no such folder, the id of a data set on the hub, `owner/name`.
        metadata: Table with a row per photo, or COCO annotations (`.json`); if None, a table is found by its name,
            `metadata.csv`, `.jsonl` or `.parquet`.
        revision: Branch, tag or commit of a data set on the hub.

    Raises:
        UserError: The source does not exist or holds nothing that can be read.
    """
    folder = Path(source)
    if not folder.is_dir():
        return _open_id(str(source), metadata, revision)
    if revision is not None:
        raise UserError(f"--revision {revision} is for a data set on the hub, and {folder} is a folder; leave it out")
    metadata = _find_metadata(folder, metadata)
    if metadata is not None:
        return CocoSource(folder, metadata) if metadata.suffix.lower() == ".json" else TableSource(folder, metadata)
    if any((folder / mark).is_file() for mark in SAVED_MARKS):
        return open_saved(folder)
    tables = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    return open_parquet(folder, tables) if tables else _open_files(folder)


def _open_files(folder: Path) -> Source:
    """A folder without a table at its top, by what lies in it and below it."""
    files = list_files(folder)
    tars = [name for name in files if name.lower().endswith(".tar")]
    if (folder / INDEX_NAME).is_file() and tars:
        return TarSource(folder, tars)  # shards of ours, with a map that is no photo
    packed = [name for name in files if name.lower().endswith(COMPRESSED_TARS)]
    tables = [name for name in files if name.lower().endswith(".parquet")]
    if any(is_photo_name(name) for name in files):
        if others := tars + packed + tables:
            say(f"{folder}: tars and tables beside photos are not read: {len(others)}, such as {others[0]!r}")
        return FolderSource(folder)
    if packed:
        raise UserError(
            f"{folder} holds compressed tars, such as {packed[0]!r}, whose photos cannot be read in place; decompress "
            "them first, with gunzip, unxz or the like"
        )
    if not tables:
        return TarSource(folder, tars) if tars else FolderSource(folder)
    # The hub's converted layout: configuration/split/0000.parquet.
    configurations = {parts[0] for name in tables if len(parts := PurePosixPath(name).parts) > 2}
    if len(configurations) > 1:
        raise UserError(
            f"{folder} holds several configurations of a data set: {shorten(sorted(configurations))}; choose one with "
            f"--source {folder}/NAME"
        )
    return open_parquet(folder, [folder / name for name in tables])


def _open_id(name: str, metadata: Path | None, revision: str | None) -> Source:
    if Path(name).is_file():
        raise UserError(f"the source {name} is a file; --source names the folder that holds it")
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"the source {name} is not a folder; --source names the folder that holds the photos, "
            "or a data set on the hub as owner/name"
        )
    if metadata is not None:
        raise UserError(
            f"--metadata {metadata} goes with a folder of photos, and {name} is none; "
            "correct --source, or leave --metadata out for a data set on the hub"
        )
    return open_hub(name, revision)


def _find_metadata(folder: Path, metadata: Path | None) -> Path | None:
    if metadata is not None:
        if not metadata.is_file():
            raise UserError(f"the metadata file {metadata} does not exist")
        return metadata
    found = [path for suffix in READERS if (path := folder / f"metadata{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has {' and '.join(path.name for path in found)}; choose one with --metadata")
    return found[0] if found else None
