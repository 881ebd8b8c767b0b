"""The first pass over a source: every input is read once and becomes a photo with its facts, or a reject."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.photos.inspection import Facts, Reject, Scrutiny, count_kinds, inspect, mask_path
from data_prep.shards.journal import Journal, key_of, status_of
from data_prep.sources.content import Content, Location, Source
from data_prep.sources.folders import stamp_files
from data_prep.sources.gps_notes import GpsNotes
from data_prep.sources.metadata import GPS_FIELDS, BadLabel, Parsed, parse
from data_prep.work.parallel import FEW_PHOTOS, Workers
from data_prep.work.workplace import JOURNAL_NAME
from pipeline.errors import UserError
from pipeline.progress import say, track

SPOOL_NAME = "spool"


@dataclass(frozen=True)
class Photo:
    """An accepted input: where its bytes are, and all that is known of the photo."""

    number: int
    """Position among the source's inputs."""
    name: str
    location: Location
    mask: Content | None
    status: list[int] | None
    """The status of the photo's file before it was read; see `status_of`."""
    facts: Facts
    parsed: Parsed


@dataclass
class Intake:
    """Everything that the source gave. Photos stay on the disk; memory holds about two kilobytes for each."""

    photos: list[Photo] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    unknown_words: dict[str, Counter[str]] = field(default_factory=dict)
    gps: GpsNotes = field(default_factory=GpsNotes)
    sha256: str = ""
    """Fingerprint of the inputs: names, metadata and bytes, in order."""

    @property
    def inputs(self) -> int:
        """Inputs seen: each was accepted or rejected."""
        return len(self.photos) + len(self.rejects)

    @property
    def rejected(self) -> dict[str, int]:
        """Kind of reason to number of rejects, the most frequent first."""
        return count_kinds(self.rejects)


@dataclass(frozen=True)
class Candidate:
    """An input whose metadata was read. If the metadata was rejected, only the reject is filled in."""

    name: str
    fields: dict[str, Any]
    known: Facts | Reject | None
    """The result without reading the photo: what the journal has, or why the input is rejected."""
    location: Location | None = None
    parsed: Parsed | None = None
    mask: Content | None = None
    status: list[int] | None = None
    """The status of the photo's file."""
    key: str | None = None
    """The photo's key in the journal."""
    sha256: str = ""
    """What the photo's bytes hash to, where the source tells; otherwise empty."""


class Spool:
    """Keeps the photos of a source that streams, since the second pass reads them in another order."""

    def __init__(self, path: Path):
        self.path = path
        self._stream = path.open("wb")

    def keep(self, content: Content) -> Content:
        """Keep a content; returns where it can be read again."""
        if not isinstance(content, bytes):
            return content
        offset = self._stream.tell()
        self._stream.write(content)
        self._stream.flush()  # other processes read it next
        return Location(str(self.path), offset, len(content))

    def close(self) -> None:
        """End writing; locations stay readable until the file is removed."""
        self._stream.close()


def take_in(
    source: Source, folder: Path, workers: Workers, scrutiny: Scrutiny, max_rejects: float | None = None
) -> Intake:
    """Read every input of a source.

    Args:
        source: Where inputs come from.
        folder: Folder for the journal, from which the next run resumes, and for the photos of a source that streams.
        workers: The processes that look at photos.
        scrutiny: How closely they look.
        max_rejects: More rejects end the work: a share of the inputs below 1, a number from 1 on.

    Raises:
        UserError: No input is usable, no label can be read, or there are more rejects than allowed.
    """
    intake, digest = Intake(), hashlib.sha256()
    journal = Journal(folder / JOURNAL_NAME, {**asdict(scrutiny), "masks": masks_stamp(scrutiny.masks)})
    with closing(journal), closing(Spool(folder / SPOOL_NAME)) as spool:
        results = workers.map(partial(_look, scrutiny), _candidates(source, spool, journal), FEW_PHOTOS)
        for number, (item, result) in enumerate(track(results, source.total, "checking")):
            digest.update(_identity(item, result))
            # A file that could not be read may be readable the next time, and look the same.
            if not (isinstance(result, Reject) and result.stage == "read"):
                journal.add(item.key, result)
            if isinstance(result, Facts):
                _accept(intake, number, item, result, scrutiny)
            else:
                intake.rejects.append(result)
                _check_limit(intake, max_rejects, source.total)
    _check_limit(intake, max_rejects, intake.inputs)
    intake.sha256 = digest.hexdigest()
    _check_usable(intake)
    _tell_oddities(intake, source, scrutiny)
    return intake


def masks_stamp(folder: str | None) -> str:
    """A digest that changes when the masks of a folder do; empty without a folder."""
    return "" if folder is None else stamp_files(Path(folder), sorted(Path(folder).glob("*.png")))


def _candidates(source: Source, spool: Spool, journal: Journal) -> Iterator[Candidate]:
    """Read the metadata of each input, and put streamed photos where a worker can read them."""
    for item in source:
        if item.photo is None:
            yield Candidate(item.name, item.fields, Reject(item.name, item.problem, "source"))
            continue
        try:
            parsed = parse(item.fields)
        except BadLabel as error:
            yield Candidate(item.name, item.fields, Reject(item.name, str(error), "metadata"))
            continue
        mask = None if item.mask is None else spool.keep(item.mask)
        photo, status = spool.keep(item.photo), status_of(item.photo)
        assert isinstance(photo, Location)  # other contents are masks only
        key = key_of(item.name, item.photo, status, item.mask)
        yield Candidate(item.name, item.fields, journal.get(key), photo, parsed, mask, status, key, item.sha256)


def _look(scrutiny: Scrutiny, item: Candidate) -> Facts | Reject:
    if item.known is not None:
        return item.known
    assert item.location is not None
    found = inspect(item.name, item.location, item.mask, scrutiny)
    if isinstance(found, Facts) and item.sha256 and found.sha256 != item.sha256:
        return Reject(item.name, "the photo is damaged: it has other bytes than its record says", "decode")
    return found


def _accept(intake: Intake, number: int, item: Candidate, facts: Facts, scrutiny: Scrutiny) -> None:
    parsed, mask = item.parsed, item.mask
    assert parsed is not None
    assert item.location is not None
    if facts.mask_from_folder and scrutiny.masks is not None:
        mask = Location(str(mask_path(scrutiny.masks, facts.sha256)))
    told = [item.fields[name] for name in sorted(GPS_FIELDS & item.fields.keys())]
    if told:
        intake.gps.add(item.name, told, parsed.metadata.gps, parsed.gps_problem, facts.gps)
    else:
        # Where a table has a GPS column, an empty cell means unknown; without one the photo's EXIF is used.
        parsed = replace(parsed, metadata=replace(parsed.metadata, gps=facts.gps))
    for name, word in parsed.unknown:
        intake.unknown_words.setdefault(name, Counter())[word] += 1
    intake.photos.append(Photo(number, item.name, item.location, mask, item.status, facts, parsed))


def _identity(item: Candidate, result: Facts | Reject) -> bytes:
    """What an input contributes to the fingerprint of the source."""
    found = [result.sha256, result.mask_sha256] if isinstance(result, Facts) else [result.reason]
    return json.dumps([item.name, item.fields, found], default=str, sort_keys=True).encode()


def _check_limit(intake: Intake, max_rejects: float | None, total: int | None) -> None:
    if max_rejects is None or (max_rejects < 1 and total is None):
        return  # the limit is a share of a number that is not known yet
    if len(intake.rejects) > (max_rejects if max_rejects >= 1 else max_rejects * (total or 0)):
        raise UserError(f"more rejects than --max_rejects {max_rejects:g} allows: {_why(intake)}")


def _check_usable(intake: Intake) -> None:
    unread = [reject for reject in intake.rejects if reject.stage == "metadata"]
    if unread and all(photo.parsed.label is None for photo in intake.photos):
        raise UserError(
            f"no label can be read from the column 'label': {unread[0].reason} ({unread[0].path}), "
            "and neither is any other; write 0, 1, false, true, None or Roadwork"
        )
    if not intake.photos:
        raise UserError(f"nothing to write: {_why(intake)}")


def _tell_oddities(intake: Intake, source: Source, scrutiny: Scrutiny) -> None:
    """Mention what may be intended, and may be a mistake."""
    if intake.gps.problems:
        say(f"GPS that is read as NULL: {intake.gps.reasons()}")
    for sentence in intake.gps.doubts("the photos"):
        say(sentence)
    if all(photo.parsed.label is None for photo in intake.photos):
        why = source.explain_unlabelled()
        if why:
            say(f"no photo has a label: {why}")
    if scrutiny.masks is not None and not any(photo.facts.mask_from_folder for photo in intake.photos):
        say(
            f"0 of {len(intake.photos)} photos have their mask from {scrutiny.masks}; "
            "masks there are named by the SHA-256 of their photos"
        )


def _why(intake: Intake) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in list(intake.rejected.items())[:3])
    first = intake.rejects[0]
    return f"{len(intake.rejects)} of {intake.inputs} inputs were rejected: {counts} (first {first.path!r})"
