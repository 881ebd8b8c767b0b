"""Every command of the README, run as it stands there; `test` excepted, and `demo` as `demo --quick`."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.warm import python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith(("./launch.sh", "accelerate ", "python "))
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DEMO_QUICK_S = 120

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where the README's relative paths lead somewhere, after `demo --quick`."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("pipeline", "accelerate_configs", "ds_configs", "launch.sh"):
        (folder / name).symlink_to(ROOT / name)
    start = time.monotonic()
    process = run("./launch.sh demo --quick", folder)
    assert process.returncode == 0, process.stderr
    summary = folder / "runs" / "demo-quick" / "summary.json"
    assert process.stdout.splitlines()[-1] == str(summary.resolve())
    print(f"demo --quick took {time.monotonic() - start:.0f} s of its {DEMO_QUICK_S} s", file=sys.stderr)
    return folder


def run_warm(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what `./launch.sh` hands its words to; the first demo goes through the script itself."""
    return run(command.replace("./launch.sh", f"{python()} -m pipeline"), folder)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_readme_shows_the_commands_that_this_file_expects():
    words = {command.split()[1] for command in COMMANDS if command.startswith("./launch.sh")}
    assert words == {"demo", "test", "prep", "doctor", "train", "evaluate", "export", "predict"}
    assert sum(command.startswith("accelerate launch") for command in COMMANDS) == 1


def test_the_demo_leaves_a_scored_model_a_baseline_and_a_page(place):
    summary = json.loads((place / "runs" / "demo-quick" / "summary.json").read_text())
    assert {"mcc", "mcc_null_metadata", "n", "ci95"} <= set(summary["test"])
    assert summary["evaluation"]["data"] == "procedural scenes"
    assert "mcc" in summary["baseline"]
    page = (place / "runs" / "demo-quick" / "report.html").read_text()
    assert "procedural scenes" in page
    assert not re.search(r'(src|href)="https?:', page)
    assert (place / "runs" / "demo-quick" / "answers.csv").read_text().startswith("path,probability,label")


def test_running_the_demo_again_finishes_quickly_and_changes_nothing(place):
    weights = place / "runs" / "demo-quick" / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert run_warm("./launch.sh demo --quick", place).returncode == 0
    assert weights.read_bytes() == before


def test_the_way_on_your_own_photos(place):
    """The README's second block, in its order; the gated weights are not here, which is one sentence."""
    shutil.copytree(place / "runs" / "demo-quick" / "scenes" / "images", place / "photos")
    table = pd.read_csv(place / "runs" / "demo-quick" / "scenes" / "metadata.csv")
    table["file_name"] = table["file_name"].str.removeprefix("images/")
    table[["file_name", "label"]].to_csv(place / "photos" / "metadata.csv", index=False)
    shutil.copytree(place / "photos", place / "new_photos", ignore=shutil.ignore_patterns("0001*", "0002*", "*.csv"))
    for command in COMMANDS[COMMANDS.index("./launch.sh prep shard --source photos --out data/shards") :]:
        if command.startswith("./launch.sh evaluate"):  # what the rest works on: a run, here the demo's
            shutil.copytree(place / "runs" / "demo-quick", place / "runs" / "pretrain_30ep")
        process = run_warm(command, place)
        if command.startswith("./launch.sh train pretrain_30ep"):
            assert process.returncode == 2, process.stderr
            # A slower rank may still warn of something after rank 0 has spoken.
            (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
            assert error.startswith("error: cannot load the backbone 'facebook/dinov3-vith16plus-pretrain-lvd1689m'")
            assert "Traceback" not in process.stderr
        elif command.startswith("./launch.sh doctor"):  # for GPUs; a small machine lacks memory for it
            assert process.returncode in (0, 3), process.stderr
            bad = set(re.findall(r"^bad +(\w+)", process.stdout + process.stderr, re.MULTILINE))
            assert bad <= {"backbone", "host"}, process.stderr
        else:
            assert process.returncode == 0, f"{command}\n{process.stderr}"


def test_the_python_of_the_readme(place):
    code = next(block for language, block in BLOCKS if language == "python")
    (place / "runs" / "demo").mkdir(exist_ok=True)
    shutil.copytree(place / "runs" / "demo-quick" / "model", place / "runs" / "demo" / "model")
    shutil.copy(next((place / "runs" / "demo-quick" / "scenes" / "images").iterdir()), place / "photo.jpg")
    (place / "example.py").write_text(code)
    process = run(f"{sys.executable} example.py", place)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("tensor([")


def links_of(page: Path) -> list[str]:
    """Where a page's links and pictures lead, without what is code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}")
def test_every_link_of_a_page_leads_somewhere(page):
    links = [link for link in links_of(page) if not link.startswith(("http://", "https://"))]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_index_of_the_docs_lists_every_page():
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links_of(ROOT / "docs" / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "README.md"} <= linked
    assert "docs/README.md" in links_of(ROOT / "README.md")


def test_the_picture_of_the_views_is_what_its_script_draws():
    pictures = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    drawn, kept = pictures["views_picture"](), Image.open(ROOT / "docs" / "views.jpg")
    assert drawn.size == kept.size
    difference = np.asarray(drawn, np.float32) - np.asarray(kept.convert("RGB"), np.float32)
    assert np.abs(difference).mean() < 4
