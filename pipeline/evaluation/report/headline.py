"""A run's result in a few readable lines: `python -m pipeline.evaluation.report.headline --run RUN`."""

from __future__ import annotations

from pathlib import Path

from pipeline.cli import command
from pipeline.errors import UserError, typed
from pipeline.evaluation.results import read_results, streetvision_results
from pipeline.progress import say


def headline(run: Path) -> Path:
    """Print how good an evaluated run is, and where to look further.

    Args:
        run: Run folder.
    """
    summary = read_results(run, "native")
    if "test" not in summary:
        raise UserError(f"{run} has no evaluation on test yet; run `{typed(f'evaluate --run {run}')}` first")
    test = summary["test"]
    low, high = test["ci95"]["mcc_null_metadata"] or (float("nan"), float("nan"))
    say(f"result    MCC {test['mcc_null_metadata']:.3f} (95 % {low:.3f} to {high:.3f}) on {test['n']} test photos")
    say(f"          {summary['evaluation']['data']}, in places absent from training, all metadata NULL")
    say(f"          accuracy {test['accuracy']:.3f}, AUROC {test['auroc']:.3f}; MCC with metadata {test['mcc']:.3f}")
    streetvision = streetvision_results(run)
    if "test" in streetvision:
        small = streetvision["test"]
        say(f"224 px    MCC {small['mcc_null_metadata']:.3f} on the same photos in the profile `streetvision`")
    if "baseline" in summary:
        other = summary["baseline"]
        say(f"baseline  MCC {other['mcc']:.3f} ({other['head']}, the same backbone and photos)")
    say(f"report    {run.resolve() / 'report.html'}")
    say(f"model     {run.resolve() / 'model'}")
    drawn = "scenes and seed" if summary["evaluation"]["data"] == "procedural scenes" else "the seed"
    say(f"note      one run is one draw of {drawn}; other draws and other machines give somewhat different figures")
    return (run / "summary.json").resolve()


if __name__ == "__main__":
    raise SystemExit(command(headline))
