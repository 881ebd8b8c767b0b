"""The folders are the architecture: imports go down, from one room to those below it, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. Rooms on one line know nothing of each other.
FLOORS = (
    {"pipeline.errors", "pipeline.files", "pipeline.progress", "pipeline.names"},
    {"pipeline.cli", "pipeline.devices", "pipeline.parsing"},
    {"pipeline"},  # what importing any of it runs first
    {"pipeline.model"},
    {"pipeline.optim", "pipeline.data"},
    {"pipeline.config"},
    {"pipeline.evaluation", "pipeline.distributed"},
    {"pipeline.checkpoints"},
    {"pipeline.training"},
    {"pipeline.launch"},
    {"pipeline.trainer", "pipeline.crossvalidation"},
    {
        "pipeline.train", "pipeline.evaluate", "pipeline.predict", "pipeline.export", "pipeline.doctor",
        "pipeline.early_exit", "pipeline.crossval", "pipeline.__main__",
    },
    {"data_prep.sources", "data_prep.work"},
    {"data_prep.photos"},
    {"data_prep.decisions"},
    {"data_prep.scenes", "data_prep.shards"},
    {"data_prep.features", "data_prep.masks", "data_prep.audit"},
    {"data_prep", "data_prep.__main__"},
    {"benchmarks"},
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """`pipeline.data.views` is in `pipeline.data`; benchmarks are one room."""
    top, _, rest = module.partition(".")
    return top if top == "benchmarks" or not rest else f"{top}.{rest.partition('.')[0]}"


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, inside functions too; what is only for types does not run."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write imports with the whole name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else str(node.module) for name in names}
    return found & modules


def graph_of(root: Path) -> dict[str, set[str]]:
    paths = {module_of(path, root): path for top in ("pipeline", "data_prep", "benchmarks")
             for path in (root / top).rglob("*.py")}  # fmt: skip
    return {module: imports_of(path, set(paths)) - {module} for module, path in paths.items()}


def faults(graph: dict[str, set[str]]) -> list[str]:
    """Imports that run upwards or between neighbours, and circles of modules."""
    found = []
    for module, imported in sorted(graph.items()):
        for other in sorted(imported):
            here, there = room_of(module), room_of(other)
            if here != there and FLOOR[there] >= FLOOR[here]:
                found.append(f"{module} imports {other}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"circle: {' -> '.join(error.args[1])}")
    return found


def test_imports_go_down_and_never_in_a_circle():
    graph = graph_of(ROOT)
    assert len(graph) > 150
    assert {room_of(module) for module in graph} == set(FLOOR)
    assert faults(graph) == []


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("pipeline/model/heads.py", "from pipeline.trainer import Trainer", "pipeline.model.heads imports "),
        ("pipeline/optim/ema.py", "import pipeline.data.views", "pipeline.optim.ema imports pipeline.data.views"),
        (
            "pipeline/config.py",
            "def f():\n    import data_prep.work.parallel",
            "pipeline.config imports ",
        ),
        ("pipeline/data/views.py", "from pipeline.data.dataset import prepare", "circle: "),
    ],
)
def test_an_import_the_wrong_way_is_found(tmp_path, module, line, fault):
    for path in (path for top in ("pipeline", "data_prep", "benchmarks") for path in (ROOT / top).rglob("*.py")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with (tmp_path / module).open("a") as stream:
        stream.write(f"\n{line}\n")
    assert any(found.startswith(fault) for found in faults(graph_of(tmp_path)))


@pytest.mark.parametrize(("folder", "most"), [("pipeline", 16), ("data_prep", 3)])
def test_few_modules_lie_flat(folder, most):
    assert len(list((ROOT / folder).glob("*.py"))) <= most + 1  # and __init__
