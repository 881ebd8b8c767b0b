"""Cross-validate a recipe on folds of whole places: `python -m pipeline.crossval RECIPE --folds N --seeds S`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.cli import help_of, parse_own
from pipeline.config import find_recipe, parse_config
from pipeline.data.folds import FEWEST_PARTS
from pipeline.data.index import SPLITS
from pipeline.devices import CPU_ONLY
from pipeline.errors import UserError, require, run, typed
from pipeline.launch.launcher import LaunchOptions
from pipeline.progress import silence_libraries

SUFFIX = "-crossval"
HELP = """
All other options are those of training; `{train}` lists them. With a feature cache (data.features) the
backbone runs once for all folds and heads; crossval makes none, `prep features` does. --dry-run prints the folds and
writes nothing."""


@dataclass(frozen=True)
class CrossvalOptions:
    """Options of a cross-validation; all others go to training."""

    folds: int = 5
    """Number N of folds, 3 or more. Places are dealt to N parts of about equal size and shares of roadwork; in fold i,
    part i is held out, the next one validates, and all others train."""
    seeds: int | None = None
    """Number S of heads that each fold trains at once; by default the recipe's train.heads."""
    run: Path | None = None
    """Run folder; by default the recipe's train.run with `-crossval` after it."""
    splits: list[str] = field(default_factory=lambda: ["train", "val"])
    """Splits of the shards whose labelled photos take part. Without `test`, that split stays untouched."""
    review: int = 100
    """Number of photos with the most doubtful labels to copy to RUN/suspects, for FiftyOne and Label Studio."""

    def __post_init__(self) -> None:
        require(self.folds >= FEWEST_PARTS, "--folds", self.folds, f"{FEWEST_PARTS} or more")
        require(self.seeds is None or self.seeds >= 1, "--seeds", self.seeds, "1 or more")
        require(self.review >= 0, "--review", self.review, "0 or more")
        known = bool(self.splits) and set(self.splits) <= set(SPLITS)
        require(known, "--splits", self.splits, "one or more of train, val, test")


def main() -> Path | None:
    """Read the command line and cross-validate; returns the path of the summary, None after `--help` or `--dry-run`."""
    arguments, prog = sys.argv[1:], typed("crossval")
    if {"-h", "--help"} & set(arguments):
        print(help_of(CrossvalOptions, prog, f"{prog} RECIPE [--folds N] [--seeds S] [options] [options of train]"))
        print(HELP.format(train=typed("train --help")))
        return None
    options, rest = parse_own(CrossvalOptions, arguments, prog)
    if not rest or rest[0].startswith("-"):
        raise UserError(f"crossval needs a recipe first, such as in `{prog} demo --folds 5 --seeds 3`")
    recipe, *words = rest
    launch, overrides = parse_own(LaunchOptions, words, prog)
    if launch.cpu:
        os.environ |= CPU_ONLY
    config, dry_run = parse_config(["--config", str(find_recipe(recipe)), *overrides], prog)
    require(not config.data.folds, "data.folds", config.data.folds, "empty, since crossval makes the folds")
    config.train.heads = options.seeds or config.train.heads
    folder = options.run or Path(config.train.run + SUFFIX)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout is for the summary's path
        from pipeline.crossvalidation.job import FOLDS_NAME, Plan, cross_validate  # torch: --help should not wait

        silence_libraries()
        replace(config.data, folds=str(folder / FOLDS_NAME))  # refuses what does not go with folds
        plan = Plan(
            recipe, tuple(words), options.folds, config.train.heads, tuple(options.splits), options.review, dry_run
        )
        return cross_validate(plan, config, folder, typed(shlex.join(["crossval", *arguments])))


if __name__ == "__main__":
    raise SystemExit(run(main))
