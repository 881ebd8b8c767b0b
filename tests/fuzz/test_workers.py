"""The fuzzers' workers notice what a fuzzer has to notice."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from tests.fuzz.workers import failures


def misbehave(case: str) -> None:
    if case == "raises":
        raise KeyError("a key")
    if case == "waits":
        time.sleep(60)
    while case == "works without end":
        pass
    if case == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "takes memory":
        bytes(3_000_000_000)  # more than the C library may hold from before
    if case == "starts a program":
        subprocess.run(["true"], check=True)


def test_each_kind_of_failure_is_found_and_the_other_cases_are_run():
    names = ("fine", "raises", "waits", "works without end", "dies", "takes memory", "starts a program")
    cases = [*names, *(f"fine {number}" for number in range(20))]
    found = failures(misbehave, cases, workers=2, cpu_s=0.5, wall_s=6, memory_bytes=200_000_000)
    assert sorted(found) == sorted(names[1:])
    assert "KeyError: 'a key'" in found["raises"]
    assert found["waits"].startswith("no answer after 0 s of processor")
    assert found["works without end"].startswith("no answer after ")
    assert found["dies"] == "the worker ended with status -9"
    assert found["takes memory"] == "more than 0.2 GB of memory"
    assert found["starts a program"].startswith("a program was started (subprocess.Popen)")
