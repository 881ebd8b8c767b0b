"""The folder of a saved model: a config.json that is checked key by key, and weights that belong to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from pipeline.errors import UserError
from pipeline.files import sha256_of, write_json
from pipeline.model.config import ModelConfig
from pipeline.model.pruning import StoppingRule, rounds_up_to
from pipeline.parsing.typed_json import Malformed, load_json, to_type

FORMAT_VERSION = 2  # of what a model computes from its weights; raise it when that changes
MODEL_TYPE = "roadwork"
MOST_CONFIG_BYTES = 1 << 20  # far above any config.json
# What config.json may lack: folders of before December 2026 hold no fingerprints.
FINGERPRINTS = ("head_sha256", "backbone_sha256")
# What models of version 1 that were not saved again by a later program do not state, and what it is for them.
LATER_THAN_VERSION_1 = {
    "format_version": 1, "evidence": False, "evidence_share": ModelConfig.evidence_share, "decision_slope": 1.0,
    "decode_scale": "full", "ensemble": 1, "pruners": 1,
}  # fmt: skip
Width = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class SavedFields:
    """What config.json holds beside the fields of `ModelConfig`; `RoadworkConfig` says what they mean."""

    backbone_dim: Width
    decode_scale: Literal["full", "half"]
    decision_bias: float
    decision_slope: Annotated[float, msgspec.Meta(gt=0)]
    stopping: StoppingRule | None
    ensemble: Count
    pruners: Count
    format_version: Annotated[int, msgspec.Meta(ge=1, le=FORMAT_VERSION)]
    backbone_sha256: Sha256 | None = None
    head_sha256: Sha256 | None = None


KEYS = tuple(field.name for kind in (ModelConfig, SavedFields) for field in fields(kind))


def read_values(folder: Path) -> dict[str, Any]:
    """What config.json holds, unchecked.

    Raises:
        UserError: It is missing, or no JSON object.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"no model in {folder}; training leaves one in RUN/model, `export` writes one anywhere")
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise Malformed(f"it is larger than {MOST_CONFIG_BYTES} bytes")
        return to_type(load_json(path.read_bytes()), dict[str, Any])
    except Malformed as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, reason: str) -> UserError:
    """The sentence about a file of a model folder that cannot be used."""
    return UserError(f"{path}: {reason}; copy the model's folder anew, or export it again")


def checked_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own keys of a config.json, all of them, each of the right type and in its range.

    Args:
        values: The content of config.json. One without `format_version` is of version 1.

    Returns:
        The keywords of `RoadworkConfig`. Keys of other programs are left out: none of them changes an answer.

    Raises:
        UserError: A newer program wrote it.
        Malformed: A key is missing or wrong; the message says which.
    """
    # Only programs of before version 2, which had no cell evidence, wrote no version.
    first = "format_version" not in values and "evidence" not in values
    found = {**(LATER_THAN_VERSION_1 if first else {}), **values}
    if "format_version" in found and found["format_version"] not in range(1, FORMAT_VERSION + 1):
        version = " ".join(str(found["format_version"]).split())
        raise UserError(
            f"the model's config.json has format version {version:.60}, this program reads up to {FORMAT_VERSION}; "
            "update the program"
        )
    if found.get("model_type") != MODEL_TYPE:
        raise Malformed(f"it describes a model of type {found.get('model_type')!r:.60}, and not {MODEL_TYPE}")
    missing = [key for key in KEYS if key not in found and key not in FINGERPRINTS]
    if missing:
        raise Malformed(f"it lacks {', '.join(missing)}")
    sizes, saved = to_type(found, ModelConfig), to_type(found, SavedFields)
    _check_stopping(found["stopping"], saved.stopping, sizes.keep_views)
    # As they stand in the file: `fingerprint` of `pipeline.evaluation.inference` tells 1 from 1.0.
    return {key: found.get(key) for key in KEYS if key != "head_sha256"}


def _check_stopping(raw: Any, rule: StoppingRule | None, keep_views: int) -> None:
    if rule is None:
        return
    unknown = sorted(raw.keys() - asdict(rule).keys())
    if unknown:
        raise Malformed(f"stopping has the unknown key {unknown[0]!r:.60}")
    rounds = len(rounds_up_to(keep_views)) - 1
    for name, margins in (("margins_none", rule.margins_none), ("margins_roadwork", rule.margins_roadwork)):
        if len(margins) < rounds:
            raise Malformed(f"stopping.{name} has {len(margins)} numbers, and not {rounds}")


def seal(values: Mapping[str, Any], weights: Path) -> str:
    """SHA-256 of all that a head answers by: the model's own keys of its config.json, and the file of weights.

    The name of the backbone is left out, since it may move; the fingerprint of its weights is not.
    """
    own = {key: values[key] for key in KEYS if key in values and key not in ("backbone", "head_sha256")}
    text = json.dumps([own, sha256_of(weights)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(folder: Path, values: Mapping[str, Any]) -> None:
    """Write config.json with the seal of its values and of the weights that lie beside it."""
    sealed = {**values, "head_sha256": seal(values, folder / SAFE_WEIGHTS_NAME)}
    write_json(folder / CONFIG_NAME, dict(sorted(sealed.items())))


def check_seal(folder: Path, values: Mapping[str, Any]) -> bool:
    """Check that neither the weights nor what config.json says has changed since the model was saved.

    Args:
        folder: Folder of the model.
        values: What its config.json holds.

    Returns:
        False if it holds no seal, as folders of older programs do.

    Raises:
        UserError: Something has changed.
    """
    wanted = values.get("head_sha256")
    if wanted is not None and wanted != seal(values, folder / SAFE_WEIGHTS_NAME):
        raise damaged(folder, f"{SAFE_WEIGHTS_NAME} or {CONFIG_NAME} has changed since the model was saved")
    return wanted is not None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder by name, in fp32. Weights that are not safetensors are never opened.

    Raises:
        UserError: They are missing or damaged.
    """
    path = folder / SAFE_WEIGHTS_NAME
    if not path.is_file():
        raise damaged(path, "it is missing, and weights of another format are not read")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, f"it is cut short, or no safetensors file ({str(error).splitlines()[0]:.100})") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise damaged(path, f"{name:.100} is of type {tensor.dtype}")
    # Copies: what was read is mapped, and would change or vanish with the file.
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def check_fit(folder: Path, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that there are all tensors that the configuration needs, in their shapes, and no others.

    Args:
        folder: Folder of the model, for the message.
        weights: The tensors by name.
        expected: Tensors of the same names and shapes; they may be on the device `meta`.

    Raises:
        UserError: They differ; the message names one.
    """
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights, expected)]
    unlike = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
    if unlike:
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG_NAME}, for one {unlike[0]:.100}; copy the folder anew, or "
            "export again"
        )
