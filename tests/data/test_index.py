import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pipeline.data.index import Split, read_index, shares
from pipeline.errors import UserError
from tests.small_run import make_shards


@pytest.fixture
def folder(tmp_path):
    make_shards(tmp_path / "shards", {"train": [0, 1], "val": [1]})
    return tmp_path / "shards"


def change(folder, edit):
    values = json.loads((folder / "index.json").read_text())
    edit(values)
    (folder / "index.json").write_text(json.dumps(values))


def test_an_index_reads_back_what_was_written(folder):
    index = read_index(folder)
    assert json.loads(index.to_json()) == json.loads((folder / "index.json").read_text())
    assert index.split("train").labels.tolist() == [0, 1]
    assert index.split("train").weights.tolist() == [1.0, 1.0]


def test_what_an_index_says_of_shares_is_read_and_may_be_absent(folder):
    asked = {"0": {"roadwork": 0.5}, "1": {"none": 0.25, "unlabelled": 0.25}}
    change(folder, lambda values: values.update(asked_shares=asked))
    assert read_index(folder).asked_shares == asked
    change(folder, lambda values: values.pop("asked_shares"))
    assert read_index(folder).asked_shares is None


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_the_parts_of_a_sum(seed):
    generator = np.random.default_rng(seed)
    amounts, clusters, labels = generator.random(50), generator.integers(0, 12, 50), generator.integers(-1, 2, 50)
    table = pd.crosstab(clusters, labels, amounts, aggfunc="sum", normalize="all")
    found = shares(amounts, clusters, labels)
    for cluster, label in itertools.product(range(12), (-1, 0, 1)):
        name = {1: "roadwork", 0: "none", -1: "unlabelled"}[label]
        expected = table.get(label, {}).get(cluster, 0.0)
        assert found.get(str(cluster), {}).get(name, 0.0) == pytest.approx(expected, abs=1e-6)
    assert all(share > 0 for classes in found.values() for share in classes.values())


def test_clusters_and_classes_are_the_strata(folder):
    split = read_index(folder).split("train")
    assert len(set(split.strata.tolist())) == len(set(zip(split.clusters.tolist(), split.labels.tolist(), strict=True)))
    samples = tuple(replace(split.samples[0], cluster=c, label=y) for c in range(3) for y in (None, 0, 1))
    assert len(set(Split((), samples).strata.tolist())) == 9


def test_an_empty_split_is_a_users_mistake(folder):
    with pytest.raises(UserError, match="there are train, val"):
        read_index(folder).split("test")


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v["splits"]["train"]["shards"][0].update(name="../../etc/passwd.tar"),
        lambda v: v["splits"]["train"]["shards"][0].update(name="/tmp/x.tar"),
        lambda v: v["splits"]["train"]["shards"][0].update(name="x.tar/../../y.tar"),
        lambda v: v["splits"]["train"]["samples"][0].update(key="x/../../y"),
        lambda v: v["splits"]["train"]["samples"][0].update(key="../x"),
        lambda v: v["splits"]["train"]["samples"][0].update(shard=7),
        lambda v: v["splits"]["train"]["samples"][0]["members"].update(jpg=[10**12, 5]),
        lambda v: v["splits"]["train"]["samples"][0]["members"].update(jpg=[-5, 5]),
        lambda v: v["splits"]["train"]["samples"][0]["members"].update(jpg=[511, 5]),
        lambda v: v["splits"]["train"]["samples"][0]["members"].update(png=[1024, 5]),
        lambda v: v["splits"]["train"]["samples"][0]["members"].pop("jpg"),
        lambda v: v["splits"]["train"]["samples"][0]["members"].pop("json"),
        lambda v: v.update(format_version=99),
        lambda v: v["splits"]["train"]["samples"][0].pop("label"),
        lambda v: v.pop("clusters"),
    ],
)
def test_an_index_that_leads_astray_is_refused(folder, edit):
    change(folder, edit)
    with pytest.raises(UserError, match="shard again"):
        read_index(folder)


@pytest.mark.parametrize(("edit", "place"), [
    (lambda v: v["splits"]["train"]["samples"][0].update(key=7), "key: expected str, got int"),
    (lambda v: v["splits"]["train"]["samples"][0].update(label=2), "label: expected int <= 1"),
    (lambda v: v["splits"]["train"]["samples"][0].update(label="1"), "label: expected int | null, got str"),
    (lambda v: v["splits"]["train"]["samples"][0].update(weight=None), "weight: expected float, got null"),
    (lambda v: v["splits"]["train"]["samples"][0].update(width=0), "width: expected int >= 1"),
    (lambda v: v["splits"]["train"]["samples"][0].update(height=True), "height: expected int, got bool"),
    (lambda v: v["splits"]["train"]["samples"][0].update(members=[]), "members: expected object, got array"),
    (lambda v: v["splits"]["train"]["samples"][0]["members"].update(jpg=[512.5, 1]), "expected int, got float"),
    (lambda v: v["splits"]["train"]["samples"][0].update(shard=-1), "shard: expected int >= 0"),
    (lambda v: v["splits"]["train"].update(shards={}), "shards: expected array, got object"),
    (lambda v: v["splits"].update(train=None), "expected object, got null"),
    (lambda v: v.update(splits=[]), "splits: expected object, got array"),
    (lambda v: v.update(clusters=[None]), r"clusters[0]: expected object, got null"),
    (lambda v: v.update(fields={"gps": 1}), "expected object, got int"),
    (lambda v: v.update(arguments=[]), "arguments: expected object, got array"),
    (lambda v: v["arguments"].update(text_dim="384"), "arguments.text_dim: expected int, got str"),
    (lambda v: v["arguments"].update(temper=2), "arguments.temper: expected float <= 1.0"),
    (lambda v: v.update(source_sha256=None), "source_sha256: expected str, got null"),
    (lambda v: v.update(rejected={"x": -1}), "expected int >= 0"),
    (lambda v: v.update(asked_shares={"0": 1}), "expected object, got int"),
])  # fmt: skip
def test_a_value_of_another_type_is_one_sentence_with_its_place(folder, edit, place):
    change(folder, edit)
    with pytest.raises(UserError, match=f"is not a shard index: .*{re.escape(place)}; shard again"):
        read_index(folder)


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "[" * 100_000, b"\xff\xfe", '{"format_version": NaN}'])
def test_a_file_that_is_no_index_at_all_is_one_sentence(folder, text):
    (folder / "index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"index.json .*; shard again$"):
        read_index(folder)


def test_a_folder_without_an_index_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="prep shard"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="is not a shard index: it is not JSON"):
        read_index(tmp_path)


def test_an_index_is_read_from_a_url(folder):
    assert read_index(f"file://{folder}/") == read_index(folder)
    with pytest.raises(UserError, match=r"no shards in memory://nowhere: .* prep shard"):
        read_index("memory://nowhere")
