"""The README.md of an exported model."""

from __future__ import annotations

from typing import Any

from pipeline.model.roadwork import RoadworkModel

CARD = """---
license: apache-2.0
pipeline_tag: image-classification
tags: [roadwork, dinov3]
---
# {name}: is there roadwork in this street photo?

A trained head (`{head}`, {parameters:.1f} M parameters) on the frozen backbone `{backbone}`,
which encodes {kept} of {views} views of a photo.

## Results

{results}

All metadata was NULL. The intervals are 95 %, from a bootstrap over groups of near-duplicate photos.
The best cut on validation, {threshold:.4f}, is folded into the probability: 0.5 is the right cut, and exactly
0.5 counts as none.

## Use

```
python -m pipeline.predict --model FOLDER --input PHOTOS --output predictions.csv
```
```python
from pathlib import Path
import torch
from pipeline.data.batch import collate
from pipeline.data.dataset import prepare
from pipeline.model.roadwork import RoadworkModel

model = RoadworkModel.from_pretrained("FOLDER").eval()
photo = Path("photo.jpg").read_bytes()
batch = collate([prepare(photo, model.config.input_spec)])
with torch.inference_mode():
    probability = model.probability(model(batch).logits)
```

## Weights and licences

`model.safetensors` holds the head alone, in {bits} bits. The head and the code are under Apache-2.0.
{licence}
"""
# Start of a backbone's name to what is to be said of its weights.
LICENCES = {
    "scenes-tiny": "The backbone comes with the code, under the same licence.",
    "facebook/": "The backbone's weights are not in this folder: they are loaded by their name, under\n"
    "Meta's DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license/).",
    "": "The backbone's weights are not in this folder: they are loaded from the place named above.",
}


def model_card(name: str, model: RoadworkModel, summary: dict[str, Any], threshold: float, half: bool) -> str:
    """Describe a model and how it did.

    Args:
        name: Of the run.
        model: Its weights and configuration.
        summary: The run's, with or without an evaluation.
        threshold: The cut that was folded into the probability.
        half: Whether the weights are stored in 16 bits.
    """
    sizes = model.config.sizes
    prunes = sizes.head == "roadwork" and sizes.pruning != "off"
    kept = str(sizes.keep_views if prunes else sizes.num_views)
    if prunes and sizes.pruning == "dynamic":
        kept = f"as many as the answer needs, at most {kept}"
    return CARD.format(
        name=name,
        head=sizes.head,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        backbone=sizes.backbone,
        kept=kept,
        views=sizes.num_views,
        results=results_table(summary),
        threshold=threshold,
        bits=16 if half else 32,
        licence=next(text for prefix, text in LICENCES.items() if sizes.backbone.startswith(prefix)),
    )


def results_table(summary: dict[str, Any]) -> str:
    """The evaluated splits as a Markdown table under the name of their data, or that there are none."""
    if "evaluation" not in summary:
        return "Not evaluated yet."
    lines = [
        f"On {summary['evaluation']['data']}:\n",
        "| split | photos | MCC | 95 % interval | AUROC | accuracy | ECE |",
        "|---|---|---|---|---|---|---|",
    ]
    for split in ("val", "test"):
        if split in summary:
            lines.append(_row(split, summary[split]))
    return "\n".join(lines)


def _row(split: str, scores: dict[str, Any]) -> str:
    bounds = scores["ci95"]["mcc_null_metadata"]
    cells = [
        split,
        str(scores["n"]),
        f"{scores['mcc_null_metadata']:.3f}",
        f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "–",
        f"{scores['auroc']:.3f}" if scores["auroc"] is not None else "–",
        f"{scores['accuracy']:.3f}",
        f"{scores['ece']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"
