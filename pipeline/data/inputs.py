"""Whether shards suit a model: the metadata that it reads must be there, and must not leak the label."""

from __future__ import annotations

from pipeline.data.index import Index
from pipeline.errors import UserError
from pipeline.model.config import ModelConfig

RECORD_FIELDS = {"text": "description"}  # names of the record that differ from the model's


def check_inputs(index: Index, model: ModelConfig, allow_leaks: bool, text_encoder: str | None = None) -> None:
    """Refuse a model whose metadata fields leak the label in these shards, or are not in them.

    Args:
        index: The shards' index.
        model: Configuration of the model that reads them.
        allow_leaks: Whether fields that leak are allowed all the same.
        text_encoder: The text encoder that the model was trained with, as in `Index.arguments`; None for a new model.

    Raises:
        UserError: A field leaks or is missing; the message names it and the ways out.
    """
    leaks = leaking_inputs(index, model)
    if leaks and not allow_leaks:
        named = " and ".join(f"{name} ({why})" for name, why in leaks.items())
        rest = ", ".join(name for name in model.metadata if name not in leaks)
        raise UserError(
            f"metadata gives the label away in these shards: {named}; leave it out with --model.metadata '[{rest}]', "
            "or insist with --data.allow_leaks true"
        )
    if "text" not in fields_read(model):
        return
    dim, weights = index.arguments.get("text_dim", 0), index.arguments.get("text_encoder")
    if not dim:
        raise UserError(
            "model.metadata has text, and these shards hold no vectors of descriptions; shard again with "
            "--text_encoder, or leave text out"
        )
    if dim != model.text_dim:
        raise UserError(
            f"model.text_dim is {model.text_dim}, and the vectors of descriptions in these shards have {dim} numbers "
            f"({weights}); train with --model.text_dim {dim}, or shard with the --text_encoder that the model knows"
        )
    if text_encoder is not None and text_encoder != weights:
        raise UserError(
            f"the model was trained on vectors of the text encoder {text_encoder}, and these shards hold those of "
            f"{weights}; shard with the --text_encoder that the model knows"
        )


def leaking_inputs(index: Index, model: ModelConfig) -> dict[str, str]:
    """The fields that the model reads and that leak the label in these shards, each with the reason."""
    reports = {name: index.fields.get(RECORD_FIELDS.get(name, name)) for name in fields_read(model)}
    return {name: report.leaks for name, report in reports.items() if report is not None and report.leaks}


def fields_read(model: ModelConfig) -> tuple[str, ...]:
    """Metadata fields that a model reads; baselines read none."""
    return model.metadata if model.head == "roadwork" else ()
