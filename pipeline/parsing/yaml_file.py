"""Read YAML that people write: the core types of YAML 1.2 only, so that a value is what it looks like."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline.errors import UserError
from pipeline.parsing.typed_json import LARGEST

MOST_BYTES = 1 << 20
MOST_DIGITS = 20
CORE_TYPES = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """Refuses what means another thing than it seems to, or grows: repeated keys, references, tags, octal numbers."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (none of the base class's, which are YAML 1.1's)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            self.refuse("a reference (& or *); write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            self.refuse(f"the tag {event.tag!r}; write a plain value", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse("a key that is no word", key.start_mark)
            if key.value in seen:
                self.refuse(f"the key {key.value!r} a second time", key.start_mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_yaml_int(self, node: Any) -> int:
        digits = node.value.lstrip("+-")
        if len(digits) > 1 and digits.startswith("0"):
            self.refuse(f"the number {node.value[:MOST_DIGITS]}, which begins with 0", node.start_mark)
        if len(digits) >= MOST_DIGITS or not -LARGEST <= int(node.value) < LARGEST:
            self.refuse(f"the number {node.value[:MOST_DIGITS]}..., which is too large", node.start_mark)
        return int(node.value)

    def refuse(self, what: str, mark: Any) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=f"there is {what}", problem_mark=mark)


for _kind, _pattern in CORE_TYPES.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Read YAML as plain values; every key is a string.

    Raises:
        yaml.YAMLError: The text is no YAML, or uses what could surprise; see `read_yaml`.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds a mapping.

    Raises:
        UserError: The file cannot be read or is no mapping, or it has a key twice in one mapping, a reference or a tag,
            or a whole number that begins with 0 or does not fit 64 bits; the message says in which line.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > MOST_BYTES:
            raise UserError(f"{path} is no file of at most {MOST_BYTES >> 20} MB; name a YAML file")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 (byte {error.start}); save it in that encoding") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}, {line}{error.problem or error.context}; correct it there") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold keys with values, such as `train:`, but {_kind_of(values)}")
    return values


def _kind_of(value: object) -> str:
    return {type(None): "nothing", list: "a list", str: "a text"}.get(type(value), "one value")
