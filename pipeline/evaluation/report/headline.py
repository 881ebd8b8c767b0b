"""A run's result in a few readable lines: `python -m pipeline.evaluation.report.headline --run RUN`."""

from __future__ import annotations

from pathlib import Path

from pipeline.cli import command
from pipeline.errors import UserError
from pipeline.evaluation.report.page import read_results, sent_by_the_client
from pipeline.progress import say


def headline(run: Path) -> Path:
    """Print how good an evaluated run is, and where to look further.

    Args:
        run: Run folder.
    """
    summary = read_results(run, "native")
    if "test" not in summary:
        raise UserError(f"{run} has no evaluation on test yet; run `evaluate --run {run}` first")
    test = summary["test"]
    low, high = test["ci95"]["mcc_null_metadata"] or (float("nan"), float("nan"))
    say(f"result    MCC {test['mcc_null_metadata']:.3f} (95 % {low:.3f} to {high:.3f}) on {test['n']} test photos")
    say(f"          {summary['evaluation']['data']}, in places absent from training, all metadata NULL")
    say(f"          accuracy {test['accuracy']:.3f}, AUROC {test['auroc']:.3f}; MCC with metadata {test['mcc']:.3f}")
    client = sent_by_the_client(run)
    if "test" in client:
        sent = client["test"]
        say(f"client    MCC {sent['mcc_null_metadata']:.3f} on what the live client would send of them")
    if "baseline" in summary:
        other = summary["baseline"]
        say(f"baseline  MCC {other['mcc']:.3f} ({other['head']}, the same backbone and photos)")
    say(f"report    {run.resolve() / 'report.html'}")
    say(f"model     {run.resolve() / 'model'}")
    return (run / "summary.json").resolve()


if __name__ == "__main__":
    raise SystemExit(command(headline))
