"""`python -m data_prep COMMAND`: the offline stage, from raw photos to shards."""

from __future__ import annotations

from pipeline.cli import commands
from pipeline.errors import typed

COMMANDS = {
    "scenes": "data_prep.scenes.data_set:scenes",
    "masks": "data_prep.masks.command:masks",
    "shard": "data_prep.shards.command:shard",
    "merge": "data_prep.shards.merge:merge",
    "features": "data_prep.features.command:features",
    "audit": "data_prep.audit.command:audit",
    "verify": "data_prep.shards.verify:verify",
}

if __name__ == "__main__":
    raise SystemExit(commands(COMMANDS, prog=typed("prep"), description="Prepare photos for training."))
