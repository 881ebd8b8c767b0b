"""Look at the machine, the installation, the configurations and the data before anything runs."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from pipeline.cli import command
from pipeline.errors import AuditFailed


def doctor(
    recipe: str = "demo",
    shards: str | None = None,
    out: Path | None = None,
    *,
    config_file: Path | None = None,
    num_machines: int | None = None,
    num_processes: int | None = None,
    gpu_gib: float | None = None,
) -> Path:
    """Check machine, installation, configurations and data, and say what a recipe would do.

    Args:
        recipe: A recipe's name, or a YAML file; `--recipe` may be left out before it.
        shards: Folder of shards, or its URL; by default the recipe's.
        out: Folder for summary.json; by default a temporary one.
        config_file: An accelerate configuration; by default chosen by this machine's hardware.
        num_machines: Number of machines; by default the accelerate configuration's.
        num_processes: Number of processes over all machines; by default the accelerate configuration's.
        gpu_gib: Memory of one GPU in GiB, such as 80, if training will run on another machine.

    Raises:
        AuditFailed: Something would fail; the table says what.
    """
    from pipeline.config import find_recipe, read_config
    from pipeline.files import write_summary
    from pipeline.launch.checks import BAD, check, print_findings
    from pipeline.progress import say

    config = read_config(find_recipe(recipe))
    if shards is not None:
        config.data.shards = str(shards)
    findings, engine = check(config, config_file, num_machines, num_processes, gpu_gib)
    print_findings(findings)
    say(f"the engine gets: {json.dumps(engine)}" if engine else "there are no engine settings; the table says why")
    folder = out or Path(tempfile.mkdtemp(prefix="roadwork-doctor-"))
    values = {"recipe": recipe, "findings": [vars(finding) for finding in findings], "deepspeed": engine}
    summary = write_summary(folder, values)
    wrong = [finding.about for finding in findings if finding.verdict == BAD]
    if wrong:
        raise AuditFailed(f"{len(wrong)} of {len(findings)} checks failed: {', '.join(wrong)}", summary)
    return summary


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--recipe")
    raise SystemExit(command(doctor, "doctor"))
