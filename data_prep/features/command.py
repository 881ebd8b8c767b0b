"""The command `features`: the frozen backbone's tokens of every photo, computed once, for training without it."""

from __future__ import annotations

from pathlib import Path

from data_prep.features.options import Attention, ModelChoice, Options, Precision
from pipeline.errors import require
from pipeline.model.config import MAX_VIEWS_PER_PASS
from pipeline.names import NUM_VIEWS


def features(
    shards: str | None = None,
    out: Path | None = None,
    *,
    recipe: str = "cached_30ep",
    model: ModelChoice = ModelChoice(),  # noqa: B008  (jsonargparse reads the default)
    copies: int = 0,
    shard_mb: float = 16.0,
    device: str = "auto",
    workers: int | None = None,
    batch_views: int | None = None,
    compile: bool = True,
    attention: Attention = "auto",
    precision: Precision = "auto",
) -> Path:
    """Compute the backbone's tokens of all photos, so that training does not need to.

    It may be interrupted at any moment: the same command resumes, and files that are finished are not computed again.
    Under `accelerate launch` any number of processes share the work, each on a GPU of its own where there are any.

    Args:
        shards: Folder of shards, or its URL; the recipe's data.shards if not given.
        out: Folder to make; the recipe's data.features if not given. It appears when all is done; if it holds the same
            features already, it is kept.
        recipe: Recipe of the training, a name in pipeline/recipes or a YAML file; it decides backbone and views.
        model: Changes to the recipe's model.
        copies: Augmented copies of each training photo, beside itself. Odd ones are as in the older form of the NATIX
            challenge, which stopped sending work in May 2026: 224 px, at one of four levels of degradation. Even ones
            are mild. data.streetvision_share and data.augment_share say how many of them training takes.
        shard_mb: A file of the cache holds about this many megabytes.
        device: cpu, cuda, cuda:1, or auto for this process's GPU where there is one.
        workers: Processes that read, decode and cut views, for each process that computes; by default one for each
            spare core beside a GPU, and none on a CPU, which decodes between its passes.
        batch_views: Views in one pass of the backbone, 12 to 192; by default 192 on a GPU, and 12 on a CPU, whose
            caches hold no more.
        compile: Compile the backbone's layers, on a GPU only; where that fails, the work goes on uncompiled.
        attention: Kernel of the attention on a GPU: cudnn, flash, efficient, math, or auto for PyTorch's own choice.
        precision: auto computes in bf16 on a GPU and in float32 on a CPU. fp8 rounds the inputs and weights of the
            backbone's linear layers to FP8, which changes the tokens; not measured on a GPU yet.
    """
    require(copies >= 0, "--copies", copies, "0 or more")
    require(shard_mb > 0, "--shard_mb", shard_mb, "above 0")
    require(workers is None or workers >= 0, "--workers", workers, "0 or more")
    fits = batch_views is None or NUM_VIEWS <= batch_views <= MAX_VIEWS_PER_PASS
    require(fits, "--batch_views", batch_views, f"in [{NUM_VIEWS}, {MAX_VIEWS_PER_PASS}]")
    from data_prep.features.job import extract  # transformers and DeepSpeed: seconds that no other command should wait

    options = Options(device, workers, batch_views, compile, attention, shard_mb, precision)
    return extract(shards, out, recipe, model, copies, options)
