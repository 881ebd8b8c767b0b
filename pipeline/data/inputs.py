"""Whether shards can feed a model: the metadata that it reads must be there, and must not give the label away."""

from __future__ import annotations

from pipeline.data.index import Index
from pipeline.errors import UserError
from pipeline.model.config import ModelConfig

RECORD_FIELDS = {"text": "description"}  # where the record has another name for the model's field


def check_inputs(index: Index, model: ModelConfig, allow_leaks: bool, text_encoder: str | None = None) -> None:
    """Refuse a model whose metadata fields leak the label in these shards, or are not in them.

    Args:
        index: Of the shards.
        model: What is to be trained on them, or was trained.
        allow_leaks: The user knows, and insists.
        text_encoder: The encoder, by `Index.arguments`, that the model was trained with; None for a new model.

    Raises:
        UserError: With the field, what is wrong with it, and the ways out.
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
    """The fields that the model reads and that leak the label in these shards, with how they do it."""
    reports = {name: index.fields.get(RECORD_FIELDS.get(name, name)) for name in fields_read(model)}
    return {name: report.leaks for name, report in reports.items() if report is not None and report.leaks}


def fields_read(model: ModelConfig) -> tuple[str, ...]:
    """Metadata fields that a model looks at; the baselines look at photos alone."""
    return model.metadata if model.head == "roadwork" else ()
