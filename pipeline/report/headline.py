"""A run's result in a few lines for a person: `python -m pipeline.report.headline --run RUN`."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.cli import command
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.report.page import sent_by_the_client


def headline(run: Path) -> Path:
    """Say how good an evaluated run is, and where to look further.

    Args:
        run: Run folder.
    """
    path = (run / "summary.json").resolve()
    summary = json.loads(path.read_text()) if path.is_file() else {}
    if "test" not in summary:
        raise UserError(f"{run} has no evaluation on test yet; run `evaluate --run {run}` first")
    test = summary["test"]
    low, high = test["ci95"]["mcc_null_metadata"] or (float("nan"), float("nan"))
    say(f"result    MCC {test['mcc_null_metadata']:.3f} (95 % {low:.3f} to {high:.3f}) on {test['n']} test photos")
    say(f"          {summary['evaluation']['data']}, in places absent from training, all metadata NULL")
    say(f"          accuracy {test['accuracy']:.3f}, AUROC {test['auroc']:.3f}; MCC with metadata {test['mcc']:.3f}")
    client = sent_by_the_client(summary)
    if "test" in client:
        sent = client["test"]
        say(f"client    MCC {sent['mcc_null_metadata']:.3f} on what the live client would send of them")
    if "baseline" in summary:
        other = summary["baseline"]
        say(f"baseline  MCC {other['mcc']:.3f} ({other['head']}, the same backbone and photos)")
    say(f"report    {run.resolve() / 'report.html'}")
    say(f"model     {run.resolve() / 'model'}")
    return path


if __name__ == "__main__":
    raise SystemExit(command(headline))
