"""`python -m pipeline COMMAND ...`, which `./launch.sh` and `roadwork` run: the commands, and what each of them runs.

It imports the standard library alone, so that help comes at once, and also before anything is installed.
"""

from __future__ import annotations

import difflib
import runpy
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import version

from pipeline.errors import UserError, in_checkout, run, typed

# The module that each command runs, and what the command does.
COMMANDS = {
    "demo": (
        "pipeline.launch.demo",
        "photos -> shards -> train -> evaluate -> export -> predict, in minutes on two cores (--quick: 2 minutes)",
    ),
    "doctor": (
        "pipeline.doctor",
        "check machine, installation, configurations and data, and say what training would do",
    ),
    "prep": (
        "data_prep",
        "scenes | masks | shard | merge | features | audit | verify: make data sets, shards and the feature cache, "
        "and look for what is wrong with them",
    ),
    "slurm": (
        "pipeline.launch.slurm_train",
        "submit training to a SLURM cluster: RECIPE --nodes N --gpus-per-node G [options of train] [--dry-run]; "
        "sharding: prep --parts N [options of prep shard] [--dry-run]; or evaluate | predict [options of it]",
    ),
    "train": (
        "pipeline.launch.launcher",
        "train a recipe: RECIPE [--config_file ACCELERATE.yaml] [--epochs N] [--dry-run] [--section.key VALUE ...]",
    ),
    "crossval": (
        "pipeline.crossval",
        "cross-validate a recipe on whole places: RECIPE --folds N --seeds S [options of train]; leaves out-of-fold "
        "predictions, doubtful labels and the ensemble of all heads",
    ),
    "evaluate": ("pipeline.evaluate", "score a run on splits that it was not trained on, and write its report"),
    "early-exit": (
        "pipeline.early_exit",
        "find out on the validation split when a run's model may stop looking at further views",
    ),
    "export": ("pipeline.export", "write the best weights as a Hugging Face folder"),
    "predict": ("pipeline.predict", "probabilities for files, folders and globs"),
}
# What launch.sh does by itself.
IN_A_CHECKOUT = {
    "setup": "install the pinned dependencies into .venv, which every other command does when needed",
    "test": "ruff, mypy and pytest, after their installation; further words go to pytest",
    "bench": "measure beside other tools in the same run: bench NAME [--quick]",
}
STATUSES = (
    "exit status: 0 done, 2 a mistake in what was asked for, 3 audit, verify or doctor found something, "
    "75 stopped and resumable, 1 anything else"
)
WIDTH = 120


def main() -> int:
    """Run the command that the first argument names; returns the exit status."""
    return run(lambda: _main(sys.argv[1:]))


def _main(words: Sequence[str]) -> None:
    match words:
        case [] | ["-h" | "--help" | "help"]:
            print(usage())
        case ["--version"]:
            print(f"roadwork {version('roadwork')}")
        case ["help", word, *_]:
            print(_paragraph(word, known(word)))
        case [word, *_]:
            known(word)
            if word not in COMMANDS:
                raise UserError(f"`{typed(word)}` alone does that")
            module, sys.argv[1:] = module_of(words)
            runpy.run_module(module, run_name="__main__", alter_sys=True)  # it exits by itself


def module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The module that a command line runs, and the words that it gets."""
    match words:
        case ["prep", "features", *_]:
            return "pipeline.launch.launcher", list(words)  # in several processes, as training
        case ["evaluate" | "predict", *_]:
            return "pipeline.launch.answering", list(words)  # in as many processes as there are GPUs
        case ["slurm", "prep", *rest]:
            return "data_prep.shards.slurm", rest
        case ["slurm", "evaluate" | "predict", *_]:
            return "pipeline.launch.slurm_answering", list(words[1:])
    return COMMANDS[words[0]][0], list(words[1:])


def known(word: str) -> str:
    """The line of help about a command.

    Raises:
        UserError: There is no such command.
    """
    about = {name: text for name, (_, text) in COMMANDS.items()} | (IN_A_CHECKOUT if in_checkout() else {})
    if word not in about:
        near = difflib.get_close_matches(word, about, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown command {word!r}{hint} (`{typed('--help')}` lists them)")
    return about[word]


def usage() -> str:
    """The text of `--help`."""
    lines = [f"usage: {typed('COMMAND')} [options]        `{typed('COMMAND --help')}` explains one", ""]
    lines += [_paragraph(name, text) for name, (_, text) in COMMANDS.items()]
    if in_checkout():
        lines += ["", *(_paragraph(name, text) for name, text in IN_A_CHECKOUT.items())]
    return "\n".join([*lines, "", STATUSES])


def _paragraph(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13)


if __name__ == "__main__":
    raise SystemExit(main())
