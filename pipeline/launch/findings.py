"""What `doctor` finds: a verdict and a sentence, and the table of all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

GOOD, NOTE, BAD = "good", "note", "bad"
COLOURS = {GOOD: "green", NOTE: "yellow", BAD: "red"}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    verdict: str
    """`good`, `note` (works, but worth a look) or `bad` (will fail)."""
    about: str
    text: str


def print_findings(findings: list[Finding]) -> None:
    """Print the table on stderr; brackets in a text, such as those of torch's messages, are no markup."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        colour = COLOURS[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/]", finding.about, escape(finding.text))
    Console(stderr=True, width=None if os.isatty(2) else 160).print(table)
