import json
from dataclasses import dataclass

import pytest

from pipeline.parsing.typed_json import Malformed, Positive, Whole, load_json, parse_json


@dataclass(frozen=True)
class Part:
    name: str
    size: Positive
    places: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Box:
    parts: dict[str, Part]
    share: float
    count: Whole | None = None


GOOD = {"parts": {"a": {"name": "x", "size": 2, "places": [[1, 2]]}}, "share": 1, "another": [1]}


def test_values_become_the_type_and_unknown_keys_are_ignored():
    assert parse_json(json.dumps(GOOD), Box) == Box({"a": Part("x", 2, ((1, 2),))}, 1.0)
    assert parse_json(json.dumps(GOOD).encode(), Box).count is None


@pytest.mark.parametrize(("text", "said"), [
    ("", "it is not JSON"), ("{", "it is not JSON"), ("[1, 2", "it is not JSON"), ("{'a': 1}", "it is not JSON"),
    (b"\xff\xfe{\x00}\x00", "it is not UTF-8 at byte 0"), (b'{"a": "\xe4"}', "it is not UTF-8 at byte 7"),
    ("\ufeff{}", "it is not JSON"), ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
    ('{"a": NaN}', "it holds NaN"), ('{"a": -Infinity}', "it holds -Infinity"), ('{"a": 1e999}', "1e999, which is too"),
    ('{"a": 9223372036854775808}', "too large"), ('{"a": ' + "9" * 100_000 + "}", "too large"),
    ("[" * 100_000, "nested too deeply"), ('{"a":' * 100_000, "nested too deeply"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
])  # fmt: skip
def test_text_that_is_no_sound_json_is_refused_in_a_few_words(text, said):
    with pytest.raises(Malformed, match=said) as raised:
        load_json(text)
    assert len(str(raised.value)) < 120


@pytest.mark.parametrize(("change", "said"), [
    (lambda v: v.pop("share"), "missing required field share"),
    (lambda v: v.update(share="1"), "share: expected float, got str"),
    (lambda v: v.update(share=True), "share: expected float, got bool"),
    (lambda v: v.update(count=1.5), "count: expected int | null, got float"),
    (lambda v: v.update(count=-1), "count: expected int >= 0"),
    (lambda v: v.update(parts=[]), "parts: expected object, got array"),
    (lambda v: v["parts"]["a"].update(size=0), r"parts\[...\].size: expected int >= 1"),
    (lambda v: v["parts"]["a"].update(places=[[1, 2, 3]]), r"places\[0\]: expected array of length 2"),
    (lambda v: v["parts"].update(a=None), r"parts\[...\]: expected object, got null"),
])  # fmt: skip
def test_a_value_of_another_type_is_named_with_its_place(change, said):
    values = json.loads(json.dumps(GOOD))
    change(values)
    with pytest.raises(Malformed, match=said.replace("|", "[|]")):
        parse_json(json.dumps(values), Box)


@pytest.mark.parametrize("text", ["null", "[]", "1", '"x"', "true"])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(Malformed, match=r"^Expected object, got"):
        parse_json(text, Box)


def test_half_a_character_is_a_text_like_any_other_and_no_number():
    """Names of files that are not UTF-8 stand like that in what we write ourselves."""
    text = json.dumps(GOOD).replace('"x"', '"\\udcff"')
    assert parse_json(text, Box).parts["a"].name == "\udcff"
    with pytest.raises(Malformed, match="expected another value than the text"):
        parse_json(text.replace('"share": 1', '"share": "\\ud800"'), Box)
