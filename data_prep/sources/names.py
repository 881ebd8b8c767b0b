"""Files by the names that tables give them, however they are spelled, as long as only one file can be meant."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from data_prep.sources.coordinates import is_null
from pipeline.progress import say

LONGEST_SHOWN = 80  # characters of a name in a sentence


class FileNames:
    """The files below a folder; finds the one that a cell names, and never one outside the folder.

    A name is first taken as it is written. If no file has it, blanks around it, backslashes, `%20` and the like, the
    folder's own name in front, Unicode's two ways to write an accent, and case do not count, where a single file is
    left. What is still missing is collected by `miss`; `settle` compares its last parts: `images/p.jpg` is `p.jpg` if
    no other file and no other row can be meant.
    """

    def __init__(self, folder: Path, files: Iterable[str]):
        """Index the files.

        Args:
            folder: The folder.
            files: Paths of all files below the folder, relative to it.
        """
        self._folder = folder
        self._roots = dict.fromkeys((os.path.abspath(folder), os.path.realpath(folder)))
        self._exact = {name: name for name in files}
        self._folded: dict[str, str | None] = {}  # None where several files differ only by what does not count
        for name in self._exact:
            folded = _fold(name)
            self._folded[folded] = None if folded in self._folded else name
        self._missed: dict[str, None] = {}
        self._settled: dict[str, str] = {}

    def find(self, name: Any) -> str | None:
        """The file that a cell names, or None."""
        if is_null(name):
            return None
        text = str(name)
        if text in self._exact:
            return text
        paths = list(dict.fromkeys(self._paths(text)))
        exact = next((path for path in paths if path in self._exact), None)
        if exact is not None:
            return exact
        folded = (self._folded.get(_fold(path)) for path in paths)
        return next((file for file in folded if file is not None), None) or self._settled.get(text)

    def _paths(self, text: str) -> Iterator[str]:
        """Ways to write the name of a file as a path below the folder, the most literal first."""
        slashed = text.strip().replace("\\", "/")
        for spelled in (text, text.strip(), slashed, unquote(slashed)):
            # PurePosixPath drops "./" and doubled slashes; ".." stays and matches no listed file.
            path = PurePosixPath(spelled)
            path = next((path.relative_to(root) for root in self._roots if path.is_relative_to(root)), path)
            yield str(path)
            if path.parts[:1] == (Path(next(iter(self._roots))).name,):
                yield str(PurePosixPath(*path.parts[1:]))

    def miss(self, name: Any) -> None:
        """Remember a name that no file has."""
        if not is_null(name):
            self._missed[str(name)] = None

    def settle(self, photos: Sequence[str], claimed: set[str | None], table: str) -> set[str]:
        """Find the missed names by their last parts, and tell the user once of those, and of the others.

        Args:
            photos: The files that may be meant, unless they are claimed.
            claimed: Files that other rows name.
            table: Name of the table, for the user.

        Returns:
            The files that were found.
        """
        if not self._missed:
            return set()
        by_last: dict[str, list[str]] = defaultdict(list)
        for photo in photos:
            if photo not in claimed:
                by_last[_fold(photo).rpartition("/")[2]].append(photo)
        meant = {name: _ending_alike(name, by_last) for name in self._missed}
        rivals = Counter(files[0] for files in meant.values() if len(files) == 1)
        self._settled = {name: files[0] for name, files in meant.items() if len(files) == 1 and rivals[files[0]] == 1}
        self._tell(table, {name: files for name, files in meant.items() if name not in self._settled}, photos)
        return set(self._settled.values())

    def _tell(self, table: str, missing: dict[str, list[str]], photos: Sequence[str]) -> None:
        if self._settled:
            name, file = next(iter(self._settled.items()))
            say(f"{table}: names found by their last parts: {len(self._settled)}, such as {_show(name)} as {file!r}")
        unclear = {name: files for name, files in missing.items() if files}
        if unclear:
            name, files = next(iter(unclear.items()))
            say(
                f"{table}: names that leave open which file or row is meant: {len(unclear)}, such as {_show(name)}, "
                f"perhaps {files[0]!r}; write paths relative to {self._folder}"
            )
        absent = [name for name in missing if name not in unclear]
        if absent:
            others = f", such as {photos[0]!r}" if photos else ""
            say(
                f"{table}: names that no file in {self._folder} has: {len(absent)}, such as {_show(absent[0])}; "
                f"it has {len(photos)} photo{'' if len(photos) == 1 else 's'}{others}"
            )


def _ending_alike(name: str, by_last: dict[str, list[str]]) -> list[str]:
    """The files whose path ends like a name, or which the name ends like."""
    parts = PurePosixPath(_fold(unquote(name.strip().replace("\\", "/")))).parts
    if not parts or ".." in parts:
        return []
    files = by_last.get(parts[-1], [])
    return [file for file in files if _is_tail(PurePosixPath(_fold(file)).parts, parts)]


def _is_tail(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    length = min(len(first), len(second))
    return first[-length:] == second[-length:]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _show(name: str) -> str:
    return repr(name if len(name) <= LONGEST_SHOWN else f"{name[:40]}...{name[-37:]}")
