"""`transformers.Trainer` on the head of another revision of this project, which runs in Pythons of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from benchmarks.trainer_arms import BATCH, RECIPE
from pipeline.config import find_recipe
from pipeline.devices import CPU_ONLY
from pipeline.errors import UserError

PREPARE = """
import sys
from pathlib import Path
from benchmarks.trainer import Plan, prepare
prepare(Plan(images=int(sys.argv[2]), steps=1, rounds=1, starts=1), Path(sys.argv[1]), int(sys.argv[3]))
"""
TIME = """
import contextlib, json, sys
from pathlib import Path
from benchmarks.trainer_arms import ARMS, WARM_UP_STEPS
from pipeline.config import read_config
place, steps, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with contextlib.redirect_stdout(sys.stderr):
    work = ARMS["hugging_face"](read_config(place / "recipe.yaml"), place / "arm")
    work(WARM_UP_STEPS)
    found = [work(steps)[0] for _ in range(rounds)]
print(json.dumps(found))
"""


class Revision:
    """A copy of another revision whose recipe has today's sizes, with photos, shards and a cache of its own making."""

    def __init__(self, project: Path, place: Path, images: int, seed: int):
        """Copy a project's folder into `place`, and prepare there what its arm trains on."""
        if not (project / "benchmarks" / "trainer_arms.py").is_file():
            raise UserError(
                f"--against {project}: no revision of this project with benchmarks/trainer_arms.py is there"
            )
        self.project, self.data = place / "project", place / "data"
        for folder in ("benchmarks", "data_prep", "ds_configs", "accelerate_configs", "pipeline"):
            shutil.copytree(project / folder, self.project / folder)
        recipe = self.project / "pipeline" / "recipes" / f"{RECIPE}.yaml"
        theirs, ours = (yaml.safe_load(path.read_text()) for path in (recipe, find_recipe(RECIPE)))
        recipe.write_text(yaml.safe_dump(theirs | {"model": ours["model"]}))
        self.data.mkdir()
        self._run(PREPARE, self.data, images, seed)

    def rates(self, steps: int, rounds: int) -> list[float]:
        """Images per second in each round, in a process that is started anew."""
        seconds: list[float] = json.loads(self._run(TIME, self.data, steps, rounds))
        return [BATCH / second for second in seconds]

    def _run(self, program: str, *arguments: object) -> str:
        words = [sys.executable, "-c", program, *map(str, arguments)]
        environment = {**os.environ, **CPU_ONLY, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.project)}
        done = subprocess.run(words, cwd=self.project, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the other revision failed: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout.splitlines()[-1] if done.stdout else ""
