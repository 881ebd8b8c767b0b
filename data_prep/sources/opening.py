"""Find out which kind of source the user means, and open it."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.sources.coco import CocoSource
from data_prep.sources.content import Source
from data_prep.sources.folders import FolderSource, TableSource
from data_prep.sources.hub import open_hub, open_parquet, open_saved
from data_prep.sources.tables import READERS
from pipeline.errors import UserError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SAVED_MARKS = ("dataset_dict.json", "dataset_info.json")


def open_source(source: str | Path, metadata: Path | None = None, revision: str | None = None) -> Source:
    """Open a source, whatever its kind.

    Args:
        source: Folder of photos, of a hub data set's Parquet files or of `save_to_disk`; or, where there is no such
            folder, the id of a data set on the hub, `owner/name`.
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
    return open_parquet(folder, tables) if tables else FolderSource(folder)


def _open_id(name: str, metadata: Path | None, revision: str | None) -> Source:
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
