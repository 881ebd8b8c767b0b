"""Damage JSON and YAML as text and as values: the same generator in the same state does the same damage."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from tests.fuzz.mutation import mutate

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -1e300, 1e-300, float("nan"), float("inf"), "", "x", "1",
    "../../etc/passwd", "/dev/zero", "a\0b", "a\nb", "x" * 5000, "\ud800", [], [None], {}, {"": {}},
)  # fmt: skip
DEPTH = 100_000


def places_of(values: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value inside another one, as the keys and positions that lead there."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, value in inside for found in ((*place, key), *places_of(value, (*place, key)))]


def change_value(values: Any, rng: random.Random) -> Any:
    """Retype, remove, add, move or repeat one value."""
    changed = copy.deepcopy(values)
    place = rng.choice(places_of(changed))
    owner = changed
    for key in place[:-1]:
        owner = owner[key]
    key = place[-1]
    kind = rng.choice(("odd", "odd", "odd", "remove", "add", "swap", "text"))
    if kind == "remove":
        del owner[key]
    elif kind == "add":
        if isinstance(owner, dict):
            owner[rng.choice(("extra", "", "format", "__class__", "config"))] = rng.choice(ODD)
        else:
            owner.insert(rng.randrange(len(owner) + 1), rng.choice(ODD))
    elif kind == "swap":
        owner[key] = copy.deepcopy(rng.choice([values, *values.values()] if isinstance(values, dict) else [values]))
    elif kind == "text":
        owner[key] = str(owner[key])
    else:
        owner[key] = rng.choice(ODD)
    return changed


def damaged_json(values: Any, rng: random.Random) -> bytes:
    """The text of values in which something is wrong; rarely it means the same."""
    kind = rng.choice(("value",) * 5 + ("bytes",) * 3 + ("twice", "deep", "encoding"))
    text = json.dumps(values)
    if kind == "value":
        return json.dumps(change_value(values, rng)).encode()
    if kind == "bytes":
        return mutate(text.encode(), rng)
    if kind == "twice":  # a key of the outermost object
        key = rng.choice([*values]) if isinstance(values, dict) else "x"
        return f"{{{json.dumps(key)}: {json.dumps(rng.choice(ODD))}, {text.lstrip('{[')}".encode()
    if kind == "deep":
        opening = rng.choice(("[", '{"a":'))
        return (opening * rng.choice((50, DEPTH))).encode()
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp037")))
