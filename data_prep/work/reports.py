"""Where a command that looks at shards puts what it found."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from pipeline.data.storage import is_url
from pipeline.errors import UserError, require


def report_folder(shards: str, out: Path | None, name: str) -> Path:
    """The folder for a report, made and tried before the work rather than after it.

    Args:
        shards: Folder or URL of the shards.
        out: What the user chose, if anything.
        name: Of the folder inside that of the shards, if not.

    Raises:
        UserError: Nothing was chosen for shards at a URL, or nothing can be written there.
    """
    require(out is not None or not is_url(shards), "--out", out, "a folder of this machine when the shards are not")
    folder = out or Path(shards) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder} ({error.strerror}); choose another folder with --out"
        ) from error
    return folder
