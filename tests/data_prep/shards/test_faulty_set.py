"""Hundreds of procedural photos with every fault there is: each one is written or rejected with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

from data_prep.shards.verify import verify
from pipeline.data.index import read_index
from tests.data_prep.examples import read
from tests.data_prep.shards.faults import make_faulty_set

MOST_BYTES = 1_500_000_000
EACH = 12  # photos with each fault


def run_and_watch(words: list[str]) -> int:
    """Run a command; returns the most memory that it and its processes held at one time, in bytes."""
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    root, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        held = 0
        for one in [root, *_children(root)]:
            try:
                held += one.memory_full_info().pss  # pages that processes share count once
            except psutil.Error:
                continue  # it has just ended
        most = max(most, held)
        time.sleep(0.2)
    assert process.returncode == 0, process.communicate()[1].decode()
    return most


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


@pytest.mark.slow
def test_every_input_of_a_faulty_set_is_written_or_rejected_with_a_reason(tmp_path):
    expected = make_faulty_set(tmp_path / "in", images=600, each=EACH)
    words = ["data_prep", "shard", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "2"]
    most = run_and_watch(words)
    print(f"at most {most / 1e6:.0f} MB")
    assert most < MOST_BYTES
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]

    assert summary["inputs"] == expected.inputs == summary["written"] + len(rejects)
    assert Counter(reject["stage"] for reject in rejects) == expected.rejected
    assert all(reject["reason"] and reject["path"] for reject in rejects)
    assert Counter(summary["gps_dropped"]) == expected.gps
    assert sum(summary["rejected"].values()) == len(rejects)

    written = {
        r.source: (r, m)
        for samples in read(tmp_path / "out", read_index(tmp_path / "out")).values()
        for r, m in samples
    }
    assert len(written) == summary["written"]
    assert written.keys().isdisjoint(reject["path"] for reject in rejects if reject["stage"] in ("decode", "metadata"))
    for path, extension in expected.formats.items():
        assert written[path][1][extension] == (tmp_path / "in" / path).read_bytes()
    assert all((written[path][0].width, written[path][0].height) == (240, 320) for path in expected.turned)
    assert sum("東京" in path for path in written) == EACH
    assert sum(len(path) > 300 for path in written) == EACH
    verify(tmp_path / "out", workers=2)
