"""`python -m data_prep COMMAND`: the offline stage, from raw photos to shards."""

from __future__ import annotations

from pipeline.cli import commands

COMMANDS = {
    "scenes": "data_prep.scenes:scenes",
    "masks": "data_prep.masks:masks",
    "shard": "data_prep.shards:shard",
    "merge": "data_prep.merging:merge",
    "features": "data_prep.features:features",
    "audit": "data_prep.audit:audit",
    "verify": "data_prep.verification:verify",
}

if __name__ == "__main__":
    raise SystemExit(commands(COMMANDS, prog="python -m data_prep", description="Prepare photos for training."))
