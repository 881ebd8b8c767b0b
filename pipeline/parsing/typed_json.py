"""Read JSON that may come from elsewhere: typed and bounded, with one sentence for each fault that says where it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")

LARGEST = 2**63  # whole numbers that do not fit 64 bits would fail later, at another place
Whole = Annotated[int, msgspec.Meta(ge=0)]
"""0, 1, 2, ..."""
Positive = Annotated[int, msgspec.Meta(gt=0)]
"""1, 2, ..."""


class Malformed(ValueError):
    """Text that is not the JSON that is expected; the message says what is wrong and where, in a few words."""


def parse_json(data: str | bytes, kind: type[T]) -> T:
    """Read JSON into a type; see `load_json` and `to_type` for the arguments, and for what is refused."""
    return to_type(load_json(data), kind)


def load_json(data: str | bytes, lenient: bool = False, keep: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read JSON as plain values.

    Args:
        data: The text, in UTF-8.
        lenient: Whether NaN, which tools write for an empty cell, reads as None, and numbers that are too large as
            infinite or as their text, so that they are refused only where a number is needed.
        keep: What each object becomes as soon as it is read, to keep only what is needed of large files.

    Raises:
        Malformed: The text is no JSON, is nested too deeply, or has a key twice in one object, or a number that is not
            finite or does not fit 64 bits.
    """

    def constant(word: str) -> Any:
        if lenient:
            return None if word == "NaN" else word
        raise Malformed(f"it holds {word}, which is no number")

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        return _unique(pairs) if keep is None else keep(_unique(pairs))

    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=None if lenient else _finite,
            parse_int=_whole_or_text if lenient else _whole,
        )
    except UnicodeDecodeError as error:
        raise Malformed(f"it is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise Malformed("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise Malformed(f"it is not JSON: {error}") from error


def to_type(values: Any, kind: type[T]) -> T:
    """Plain values as a type, without any conversion: "1" is no number, and 1.5 no whole one.

    Args:
        values: What `load_json` or another parser returned.
        kind: A dataclass, or any other type that `msgspec.convert` knows; keys that it does not name are ignored.

    Raises:
        Malformed: The values do not describe the type.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).replace("`", "").partition(" - at ")
        where = re.sub(r"^\$\.?", "", place)
        raise Malformed(f"{where}: {message[0].lower()}{message[1:]}" if where else message) from error
    except UnicodeEncodeError as error:  # msgspec looks into a text that stands where none is expected
        raise Malformed(f"expected another value than the text {error.object[:20]!r}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"it has the key {twice!r} twice in one object")
    return values


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Malformed(f"it holds the number {digits[:20]}, which is too large")
    return value


def _whole(digits: str) -> int:
    value = int(digits) if len(digits) < 20 else LARGEST
    if not -LARGEST <= value < LARGEST:
        raise Malformed(f"it holds the number {digits[:20]}, which is too large")
    return value


def _whole_or_text(digits: str) -> int | str:
    return int(digits) if len(digits) < 19 else digits[:40]
