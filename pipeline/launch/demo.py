"""`demo`: from photographs to predictions on procedural scenes, each step in a process of its own."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from pipeline.cli import command
from pipeline.errors import Stopped, typed
from pipeline.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


def demo(quick: bool = False) -> Path:
    """Make street scenes, train the complete model and a baseline on them, evaluate, export and predict.

    The scenes are procedural, the backbone is the small embedded one, and the evaluation is in cities that training
    did not see. Run it again to resume where it stopped.

    Args:
        quick: Fewer photos and one epoch: shows the steps within about two minutes, but not the quality.

    Returns:
        The path of summary.json.
    """
    folder = Path("runs/demo-quick" if quick else "runs/demo")
    steps = Steps(typed("demo --quick" if quick else "demo"))
    for title, words in steps_of(folder, quick):
        steps.run(title, words)
    from pipeline.evaluation.report.headline import headline  # whose libraries the first step need not wait for

    say("")
    return headline(folder)


def steps_of(folder: Path, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """The steps of the demo, as a title and the words of a command.

    Args:
        folder: Run folder.
        quick: Whether to take fewer photos and one epoch.
    """
    of = shlex.split
    images, short = ("320", ["--epochs", "1"]) if quick else ("2400", [])
    data = ["--shards", f"{folder}/shards", "--data.features", f"{folder}/features", *short]
    yield "photos", of(f"prep scenes --out {folder}/scenes --images {images} --difficulty 0.2 --seed 1")
    yield "shards", of(f"prep shard --source {folder}/scenes --out {folder}/shards")
    yield "audit", of(f"prep audit --shards {folder}/shards --accept description")
    yield "features", of(f"prep features --recipe demo --shards {folder}/shards --out {folder}/features")
    yield "baseline", [*of(f"train demo_baseline --run {folder}/baseline"), *data]
    yield "baseline's score", of(f"evaluate --run {folder}/baseline")
    yield "model", [*of(f"train demo --run {folder}"), *data]
    yield "evaluation", of(f"evaluate --run {folder} --baseline {folder}/baseline")
    yield "export", of(f"export --run {folder}")
    photos = f"{folder}/scenes/images/*0.jpg"
    yield "prediction", of(f"predict --model {folder}/model --input '{photos}' --output {folder}/answers.csv")


class Steps:
    """Runs commands one after the other, and hands a signal on to the one that runs, which saves and ends."""

    def __init__(self, again: str):
        """Start to listen; `again` is the command line that resumes."""
        self.again = again
        self.asked: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # such as nohup's
                signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if self.process is not None:
            self.process.send_signal(number)

    def run(self, title: str, words: list[str]) -> None:
        """Print a command line as a user would type it, and run it.

        Raises:
            Stopped: A signal came before the command, or while it ran.
            SystemExit: The command failed; the status is the command's.
        """
        self.end_if_asked()
        say(f"\n== {title}: {typed(shlex.join(words))}")
        # In a group of its own, so that a terminal's Ctrl-C arrives here only and does not count as two. Python's -P
        # keeps a folder named `pipeline` in the working directory from being taken for this package.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline", *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            process_group=0,
        )  # fmt: skip
        if self.asked is not None:  # while it started
            self.process.send_signal(self.asked)
        status = self.process.wait()
        self.end_if_asked()  # though the step may have ended just before
        if status:
            raise SystemExit(128 - status if status < 0 else status)

    def end_if_asked(self) -> None:
        """End where a signal came outside of a command.

        Raises:
            Stopped: One came.
        """
        if self.asked is not None:
            raise Stopped(f"{self.again} resumes here")


if __name__ == "__main__":
    raise SystemExit(command(demo, "demo"))
