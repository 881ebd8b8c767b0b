import json
import random

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.parsing.yaml_file import parse_yaml, read_yaml


@pytest.mark.parametrize(("text", "line", "said"), [
    ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' a second time"), ("r:\n  x: 1\n  x: 1\n", 3, "the key 'x' a second time"),
    ("a: &x [1]\nb: *x\n", 1, "a reference"), ("a: 1\nb: *x\n", 2, "a reference"),
    ("a: !!python/object/apply:os.system [ls]\n", 1, "the tag"), ("a: !!int '3'\n", 1, "the tag"),
    ("a: !x 3\n", 1, "the tag"), ("a: 010\n", 1, "begins with 0"), ("a: 99999999999999999999\n", 1, "too large"),
    ("a: 9223372036854775808\n", 1, "too large"), ("? [a]\n: 1\n", 1, "a key that is no word"),
    ("a:\n\tb: 1\n", 2, "cannot start any token"), ("a: [1\n", 2, "but got"),
])  # fmt: skip
def test_what_could_surprise_is_refused_with_its_line(tmp_path, text, line, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path}, line {line}: .*{said}"):
        read_yaml(path)


def test_references_that_would_grow_without_end_are_refused_at_once(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]" for before, now in zip("abcdefgh", "bcdefghi")]  # noqa: B905
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="a reference"):
        read_yaml(tmp_path / "r.yaml")


@pytest.mark.parametrize(("data", "said"), [
    (b"", "but nothing"), (b"- a\n", "but a list"), (b"hello", "but a text"), (b"3", "but one value"),
    (b"a: \xe4", "not in UTF-8 .byte 3."), (b"a: " + b"[" * 100_000, "nested too deeply"),
    (b"a: x\x00y", "is not YAML"), (b"#" * (1 << 20) + b"\na: 1", "at most 1 MB"),
])  # fmt: skip
def test_a_file_without_keys_is_one_sentence(tmp_path, data, said):
    (tmp_path / "r.yaml").write_bytes(data)
    with pytest.raises(UserError, match=said) as raised:
        read_yaml(tmp_path / "r.yaml")
    assert "\n" not in str(raised.value)


def test_what_is_no_file_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(UserError, match=str(path)):
            read_yaml(path)
    with pytest.raises(UserError, match="is no file"):
        read_yaml(tmp_path.__class__("/dev/zero"))


def test_values_are_what_they_look_like():
    text = "{a: 10:13, b: 2024-01-01, c: no, d: 1e-4, e: 1_000, f: 0x10, g: .5, h: -3, i: ~, j: true, k: .inf, 1: x}"
    values = parse_yaml(text)
    assert values == {"a": "10:13", "b": "2024-01-01", "c": "no", "d": 1e-4, "e": "1_000", "f": "0x10", "g": 0.5,
                      "h": -3, "i": None, "j": True, "k": float("inf"), "1": "x"}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_what_json_and_the_usual_writer_write_reads_back(seed):
    draw = random.Random(seed)

    def value(depth):
        kinds = [lambda: draw.randint(-(10**12), 10**12), lambda: draw.random() * 10 ** draw.randint(-12, 12),
                 lambda: draw.choice([None, True, False]),
                 lambda: "".join(draw.choices("ab :#-'\"é0.1~\n", k=6))]  # fmt: skip
        if depth < 3:
            kinds += [lambda: [value(depth + 1) for _ in range(3)],
                      lambda: {f"k{n}": value(depth + 1) for n in range(3)}]  # fmt: skip
        return draw.choice(kinds)()

    values = {f"key{number}": value(0) for number in range(8)}
    assert parse_yaml(json.dumps(values)) == values
    assert parse_yaml(yaml.safe_dump(values, allow_unicode=True)) == values
