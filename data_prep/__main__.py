"""`python -m data_prep COMMAND`: the offline stage, from raw photos to shards."""

from __future__ import annotations

from data_prep.audit import audit
from data_prep.features import features
from data_prep.masks import masks
from data_prep.merging import merge
from data_prep.scenes import scenes
from data_prep.shards import shard
from data_prep.verification import verify
from pipeline.cli import commands

if __name__ == "__main__":
    raise SystemExit(
        commands(
            {
                "scenes": scenes,
                "masks": masks,
                "shard": shard,
                "merge": merge,
                "features": features,
                "audit": audit,
                "verify": verify,
            },
            prog="python -m data_prep",
            description="Prepare photos for training.",
        )
    )
