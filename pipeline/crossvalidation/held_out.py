"""The answers of a fold's model on the photos that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pandas as pd
import torch

from pipeline.data.batch import Batch, batches_of
from pipeline.data.dataset import ShardDataset
from pipeline.data.feature_dataset import open_split
from pipeline.data.feature_key import feature_key
from pipeline.data.features import open_cache
from pipeline.data.folds import read_dealt
from pipeline.evaluation.calibration import check_finite
from pipeline.evaluation.scoring import WithSource, collate_with_source
from pipeline.files import write_text
from pipeline.model.roadwork import RoadworkModel
from pipeline.progress import track
from pipeline.training.loader import workers_of
from pipeline.training.run_folder import RunFolder

HEAD = "out_of_fold_log_odds_head_{}"  # the column of one head, from 0


def answer_held_out(run: RunFolder, device: torch.device, alive: Callable[[], None]) -> pd.DataFrame:
    """Let the best model of a fold's run answer for the part that the fold holds out, with all metadata NULL.

    The answers are kept in the run folder, and read from there the next time.

    Args:
        run: The finished run of a fold.
        device: Device to compute on.
        alive: Called at every batch; it may raise to stop.

    Returns:
        key, source, and log-odds of each head, see `HEAD`, by photo in the order of the shards.
    """
    path = run.path / "held_out.csv"
    if path.is_file():
        return pd.read_csv(path, dtype={"key": str, "source": str}, keep_default_na=False)
    config, model = run.config(), run.load_model(device)
    data = config.data
    index = read_dealt(data.shards, data.folds, data.fold)
    cache = open_cache(data.features, index)
    if cache is not None:
        cache.check(feature_key(model.backbone, model.config.input_spec, model.config.pool_grid))
    held_out = open_split(data.shards, index, "test", model.config.input_spec, cache)
    loader = batches_of(WithSource(held_out), config.train.micro_batch_size, workers_of(data), collate_with_source)
    rows = track(
        _answers(model, loader, alive), len(held_out), f"answering for the photos that fold {data.fold} held out"
    )
    answers = _table(held_out, list(rows))
    check_finite(answers.filter(like=HEAD.format("")).to_numpy().sum(axis=1), list(answers["key"]), str(run.model))
    write_text(path, answers.to_csv(index=False))
    return answers


@torch.inference_mode()
def _answers(
    model: RoadworkModel, loader: Iterable[tuple[Batch, list[str]]], alive: Callable[[], None]
) -> Iterator[tuple[str, list[float]]]:
    """The source of each photo, and the log-odds of each head."""
    for batch, sources in loader:
        alive()
        output = model(batch, null_metadata=True)
        heads = [model.log_odds(member) for member in output.members or (output,)]
        yield from zip(sources, torch.stack(heads, dim=1).tolist(), strict=True)


def _table(data: ShardDataset, rows: list[tuple[str, list[float]]]) -> pd.DataFrame:
    heads = {HEAD.format(k): [log_odds[k] for _, log_odds in rows] for k in range(len(rows[0][1]))}
    return pd.DataFrame({"key": [s.key for s in data.split.samples], "source": [source for source, _ in rows], **heads})
