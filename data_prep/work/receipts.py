"""Receipts: notes beside the files of an unfinished output that say which of the files are whole."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.storage import open_folder
from pipeline.errors import UserError
from pipeline.files import sha256_of, write_text
from pipeline.parsing.typed_json import Malformed, Whole, load_json, to_type

RECEIPTS_FOLDER = "receipts"


@dataclass(frozen=True)
class _Receipt:
    bytes: Whole
    sha256: str


class Receipts:
    """The receipts in one folder. A file is written first, its receipt second, so a file with one is never made again.

    A receipt holds at least `bytes` and `sha256`, the length of the file and its hash.
    """

    def __init__(self, folder: Path | str, upload: str | None = None):
        """Take the receipts in a folder.

        Args:
            folder: The folder of the files, and of their receipts.
            upload: Folder or URL where finished files go instead of staying here.
        """
        self.folder, self.upload = Path(folder), upload

    def exists(self, name: str) -> bool:
        """Whether a file was finished; `is_whole` looks at the file too."""
        return self._path(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        """The receipt of a finished file.

        Raises:
            FileNotFoundError: There is none, or it cannot be read, which is the same: its file is made again.
        """
        try:
            receipt: dict[str, Any] = load_json(self._path(name).read_bytes())
            to_type(receipt, _Receipt)
        except Malformed as error:
            raise FileNotFoundError(errno.ENOENT, f"no receipt ({error})", str(self._path(name))) from error
        return receipt

    def write(self, name: str, receipt: dict[str, Any]) -> None:
        """Note that a file is whole, and on the disk."""
        write_text(self._path(name), json.dumps(receipt))

    def is_whole(self, name: str) -> bool:
        """Whether a file has the bytes that its receipt says; an uploaded file is judged by its length."""
        try:
            receipt = self.read(name)
            if self.upload is not None:
                return bool(open_folder(self.upload).size(name) == receipt["bytes"])
            path = self.folder / name
            return path.stat().st_size == receipt["bytes"] and sha256_of(path) == receipt["sha256"]
        except FileNotFoundError:
            return False

    def missing(self, names: Sequence[str]) -> list[str]:
        """The files among `names` that have no receipt, are absent, or have another length than their receipt says."""
        sizes = open_folder(self.upload or self.folder).sizes(names)
        return [name for name, size in zip(names, sizes, strict=True) if size is None or size != self._bytes(name)]

    def _bytes(self, name: str) -> int | None:
        try:
            return int(self.read(name)["bytes"])
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> Path:
        return (self.folder / RECEIPTS_FOLDER / name).with_suffix(".json")


@contextmanager
def explain_full_disk(folder: Path | str, what: str) -> Iterator[None]:
    """Turn the error of a full disk into one sentence.

    Args:
        folder: Folder or URL that is written to.
        what: The kind of files, in a word.

    Raises:
        UserError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space is left on the disk of {folder}; the {what} that are finished are kept there: free some space "
            "and give the same command again"
        ) from error
