"""The form of all benchmarks: rows that compare two things measured in the same run, the machine, a table, a JSON file.

A ratio holds on a busy machine where a time does not, as long as both sides saw the same neighbours. So everything
that is compared runs in turns, round after round, and the interval is that of the ratio within rounds.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from scipy import stats
from threadpoolctl import threadpool_limits

from pipeline.files import write_json
from pipeline.progress import track
from pipeline.training.run_folder import git_revision, hardware

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROUGH = Path("runs") / "benchmarks"
CONFIDENCE = 0.95
WIDTH_WITHOUT_TERMINAL = 160  # characters; a log wraps better than a table does
COLUMNS = ("what", "against", "ours", "theirs", "unit", "ratio (95 %)", "goal", "met")

Measured = TypeVar("Measured")
Values = Sequence[float]
Pair = tuple[float, float]


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio ours / theirs: a lower bound where more is better, an upper bound where less is."""

    bound: float
    at_most: bool = False

    def met_by(self, low: float, high: float) -> bool:
        """Whether a whole interval is on the right side of the bound; an estimate that may be luck meets no goal."""
        return high <= self.bound if self.at_most else low >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One comparison of ours with an alternative."""

    what: str
    """What is measured, on which data."""
    against: str
    """The alternative that ours is compared with."""
    ours: float
    """Our figure in `unit`; over several rounds, the geometric mean."""
    theirs: float
    unit: str
    ratio: float
    """ours / theirs."""
    interval: Pair
    """95 % interval of the ratio."""
    goal: str | None
    met: bool | None
    """Whether the whole interval meets the goal; None without one."""
    note: str
    """How both sides were set up, and what else a reader must know to judge the row."""


@dataclass(frozen=True)
class Report:
    """All that one benchmark found; the fields are those of its JSON file."""

    name: str
    machine: dict[str, Any]
    versions: dict[str, str]
    seed: int
    rows: tuple[Row, ...]
    module: str = ""
    """Module that makes the report, after `python -m benchmarks.`; if empty, `name`."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """The inverse of `asdict` after a trip through JSON, where tuples became lists."""
        rows = tuple(Row(**{**row, "interval": tuple(row["interval"])}) for row in values["rows"])
        return cls(**{**values, "rows": rows})


@dataclass(frozen=True)
class Timing:
    """How long something took."""

    core_s: float
    """Time that this process had a core, in user and system mode, all threads together."""
    wall_s: float


def timed(work: Callable[[], object]) -> Timing:
    """Run `work` and time it."""
    core, wall = time.process_time(), time.perf_counter()
    work()
    return Timing(time.process_time() - core, time.perf_counter() - wall)


def interleave(arms: Mapping[str, Callable[[], Measured]], rounds: int, seed: int) -> dict[str, list[Measured]]:
    """Measure several arms in turns.

    Args:
        arms: Name to a function that runs the arm once and says what it measured. It prepares and cleans up outside
            what it times.
        rounds: How often each arm runs, at least twice; the n-th results of all arms belong together.
        seed: Seed of the order, which differs from round to round: no arm always follows the same one.
    """
    generator = np.random.default_rng(seed)
    order = [name for _ in range(rounds) for name in generator.permutation(list(arms)).tolist()]
    results: dict[str, list[Measured]] = {name: [] for name in arms}
    # The modules that a benchmark imports leave hundreds of thousands of objects. Otherwise the garbage collector would
    # go through them at any moment, and slow down the arm that runs then.
    gc.collect()
    gc.freeze()
    try:
        for name in track(order, len(order), "measuring", unit="runs"):
            gc.collect()
            results[name].append(arms[name]())
    finally:
        gc.unfreeze()
    return results


def ratio_interval(ours: Values, theirs: Values) -> tuple[float, Pair]:
    """Ratio ours / theirs of paired measurements with its 95 % interval, by Student's t on the logarithms.

    Args:
        ours: At least two values, all above 0.
        theirs: As many, each measured beside the one of `ours` at the same position.
    """
    logs = np.log(ours) - np.log(theirs)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    ratio, low, high = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]).tolist()
    return ratio, (low, high)


def compare(
    what: str, against: str, ours: Values, theirs: Values, unit: str, goal: Goal | None = None, note: str = ""
) -> Row:
    """A row from paired measurements; see `Row` and `ratio_interval`."""
    means = float(stats.gmean(ours)), float(stats.gmean(theirs))
    return judged(what, against, means, unit, *ratio_interval(ours, theirs), goal, note)


def exact(
    what: str, against: str, ours: float, theirs: float, unit: str, goal: Goal | None = None, note: str = ""
) -> Row:
    """A row of two exact numbers, whose interval has no width."""
    ratio = ours / theirs
    return judged(what, against, (ours, theirs), unit, ratio, (ratio, ratio), goal, note)


def judged(
    what: str, against: str, sides: Pair, unit: str, ratio: float, interval: Pair, goal: Goal | None, note: str
) -> Row:
    """A row with a ratio and an interval from elsewhere; `sides` are ours and theirs."""
    met = None if goal is None else goal.met_by(*interval)
    return Row(what, against, *sides, unit, ratio, interval, None if goal is None else str(goal), met, note)


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, with every thread that it has or starts, on one core, and BLAS to one thread."""
    allowed = os.sched_getaffinity(0)
    _pin({max(allowed)})  # the first core is the one that most systems use for interrupts
    try:
        with threadpool_limits(1):
            yield
    finally:
        _pin(allowed)


def _pin(cores: set[int]) -> None:
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(thread.id, cores)


def machine(processes: int = 1) -> dict[str, Any]:
    """The machine, with a name that is good for a file.

    Args:
        processes: Processes that the benchmark uses.
    """
    found = hardware(processes)
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    cpu = found["cpu"] if model is None else model.group(1)
    name = f"cpu-{found['cores']}core-{platform.machine()}"
    if found["gpus"]:
        name = f"{'-'.join(re.findall(r'[a-z0-9]+', found['gpus'][0].lower()))}-x{len(found['gpus'])}"
    return {"name": name, **found, "cpu": cpu, "system": platform.platform()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python, the project and the packages that matter, and the project's revision."""
    found = {name: version(name) for name in ("roadwork", *packages)}
    return {"python": platform.python_version(), "revision": git_revision() or "unknown", **found}


def publish(report: Report, out: Path | None, quick: bool) -> Path:
    """Print a report's table and write its JSON file.

    Args:
        report: What was found.
        out: Folder for `<name>.json`. If not given, a full run goes to the committed results, under the name of the
            hardware, and a quick one, whose figures are rough, to `runs/benchmarks`.
        quick: Whether it was a quick run.

    Returns:
        The path of the JSON file.
    """
    print_table(report)
    committed = out is None and not quick
    name = f"{report.machine['name']}-{report.name}" if committed else report.name
    path = (out or (RESULTS if committed else ROUGH)) / f"{name}.json"
    write_json(path, asdict(report))
    return path.resolve()


def read_report(path: Path) -> Report:
    """The report in a JSON file."""
    return Report.from_json(json.loads(path.read_text()))


def cells(row: Row) -> tuple[str, ...]:
    """A row's text under each of `COLUMNS`."""
    low, high = row.interval
    ratio, met = f"{row.ratio:.2f} ({low:.2f} to {high:.2f})", {None: "", True: "yes", False: "no"}[row.met]
    return row.what, row.against, _short(row.ours), _short(row.theirs), row.unit, ratio, row.goal or "", met


def print_table(report: Report) -> None:
    """Print the rows and their notes on stderr, for a person."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    table = Table(*COLUMNS, title=f"{report.name} on {report.machine['name']}")
    for row in report.rows:
        table.add_row(*cells(row), style=None if row.met is not False else "bold")
    console.print(table)
    for note in dict.fromkeys(f"{row.against}: {row.note}" for row in report.rows if row.note):
        console.print(note, highlight=False)


def _short(value: float) -> str:
    """A number with three significant digits, and all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
