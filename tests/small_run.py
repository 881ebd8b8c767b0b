"""A run folder and shards of a few noisy photos, made without training or `data_prep`."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from pipeline.config import Config, DataConfig, to_yaml
from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.data.index import SPLITS, Cluster, Field, Index, Sample, Shard, Split
from pipeline.data.record import Metadata, Record
from pipeline.files import write_json, write_text
from pipeline.model.config import ModelConfig
from pipeline.model.roadwork import RoadworkModel

SIDE = 32
METADATA = Metadata(gps=(55.7, 13.2), weather=("sunny",), daytime="light", scene="urban")


def noisy_photo(seed: int, width: int = 96, height: int = 64) -> bytes:
    """A JPEG of coarse colour noise."""
    pixels = np.random.default_rng(seed).integers(256, size=(8, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_backbone(folder: Path) -> str:
    """A DINOv3 folder with small random weights."""
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        num_register_tokens=2,
    )
    DINOv3ViTModel(config).save_pretrained(folder)
    return str(folder)


def small_config(backbone: str, **changes: object) -> ModelConfig:
    """The complete head, as narrow as it goes."""
    sizes = {
        "backbone": backbone, "view_side": SIDE, "keep_views": 4, "pool_grid": 2, "width": 32, "layers": 1,
        "heads": 2, "fusion_heads": 2, "experts": 2, "experts_per_token": 1, "expert_width": 16,
        "mask_side": 4,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def make_model(backbone: str, **changes: object) -> RoadworkModel:
    """A model whose answers spread around one half; with usual weights it hardly tells noise from noise."""
    torch.manual_seed(1)
    model = RoadworkModel.build(small_config(backbone, **changes), None).eval()
    batch = collate([prepare(noisy_photo(seed), model.config.input_spec) for seed in range(8)])
    wanted = 1 if model.config.head == "cell_mil" else 2  # log-odds, or logits of both classes
    last = [part for part in model.head.modules() if isinstance(part, nn.Linear) and part.out_features == wanted][-1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        logits = model(batch, null_metadata=True).logits
        last.bias -= logits.mean(dim=0)[-wanted:]
    return model


def make_shards(
    folder: Path, labels: dict[str, list[int | None]], *, text_dim: int = 0, leaks: dict[str, str] | None = None
) -> None:
    """One tar per split; two photos in a row share a group; clusters 0 and 1 alternate by group.

    With a text dimension every photo but the second of a group has a vector. `leaks` are fields and the reasons why
    they must not be a model's input.
    """
    folder.mkdir(parents=True)
    splits = {name: _write_split(folder, name, labels.get(name, []), text_dim) for name in SPLITS}
    clusters = (Cluster(None, "mixed", 0, 0, 0), Cluster((55.7, 13.2), "mixed", 0, 0, 0))
    arguments = {"source_kind": "noise <of> photos", "text_dim": text_dim, "text_encoder": "noise@1"}
    fields = {name: Field(0.5, 0.9, None, why) for name, why in (leaks or {}).items()}
    index = Index(splits, clusters, fields, arguments, "1.0", "ab" * 32, {}, {})
    write_text(folder / "index.json", index.to_json())


def _write_split(folder: Path, name: str, labels: list[int | None], text_dim: int) -> Split:
    if not labels:
        return Split((), ())
    path, samples = folder / f"{name}-00000.tar", []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, label in enumerate(labels):
            photo = noisy_photo(1000 * SPLITS.index(name) + number)
            text = np.random.default_rng(number).normal(size=text_dim).round(6)
            record = Record(
                key=f"{name}_{number}", label=label, split=name, source=f"photos/{number}.jpg",
                sha256=hashlib.sha256(photo).hexdigest(), width=96, height=64, group=number // 2,
                gps_cluster=number // 2 % 2, sample_weight=1.0, metadata=METADATA,
                text_vector=tuple(text.tolist()) if text_dim and number % 2 == 0 else None,
            )  # fmt: skip
            told = json.dumps(record.to_json()).encode()
            members, digest = {"jpg": photo, "json": told}, hashlib.sha256(told).hexdigest()
            places = {extension: _add(tar, f"{record.key}.{extension}", data) for extension, data in members.items()}
            samples.append(Sample(record.key, 0, places, label, record.group, record.gps_cluster, 1.0, 96, 64, digest))
    shard = Shard(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), len(samples))
    return Split((shard,), tuple(samples))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(header, io.BytesIO(data))
    return offset, len(data)


def make_run(folder: Path, model: RoadworkModel, shards: Path) -> Path:
    """What training leaves: weights, configuration, metrics and summary."""
    model.save_pretrained(folder / "model")
    config = Config(data=DataConfig(shards=str(shards)), model=model.config.sizes)
    (folder / "config.yaml").write_text(to_yaml(config))
    write_json(folder / "provenance.json", {"versions": {"torch": torch.__version__}})
    lines = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 9)]
    validations = [{"kind": "val", "step": step, "mcc": step / 10, "loss": 0.5} for step in (4, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *validations]))
    best = {"step": 8, "val": {"mcc": 0.8, "loss": 0.5, "cut": -0.8, "slope": 1.7}}
    write_json(folder / "summary.json", {"steps": 8, "best": best})
    return folder


def random_labels(n: int, seed: int) -> list[int | None]:
    """Labels of both classes."""
    return [int(label) for label in np.random.default_rng(seed).permutation(np.arange(n) % 2)]


@torch.no_grad()
def telling_labels(model: RoadworkModel, split: str, n: int, seed: int) -> list[int | None]:
    """Labels of the first photos of a split that follow the model's own answers, if loosely; half of them are 1."""
    first = 1000 * SPLITS.index(split)
    photos = [prepare(noisy_photo(first + number), model.config.input_spec) for number in range(n)]
    log_odds = model.log_odds(model(collate(photos), null_metadata=True)).double().numpy()
    loose = log_odds + log_odds.std() * np.random.default_rng(seed).normal(size=n)
    return [int(label) for label in loose > np.median(loose)]
