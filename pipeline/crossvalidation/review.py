"""The most doubtful photos in a folder that two tools for looking at labels import: FiftyOne and Label Studio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from pipeline.crossvalidation.scores import PREDICTION, PROBABILITY
from pipeline.files import write_bytes, write_json, write_text
from pipeline.names import LABEL_NAMES

PHOTOS = "data"  # the folder's name in FiftyOne's format
LABELLING = """<View>
  <Image name="image" value="$image"/>
  <Choices name="label" toName="image" choice="single" showInline="true">
    <Choice value="{}"/>
    <Choice value="{}"/>
  </Choices>
</View>
""".format(*(LABEL_NAMES[label] for label in (1, 0)))


def write_review(folder: Path, suspects: pd.DataFrame, photo: Callable[[str], tuple[str, bytes]]) -> None:
    """Write photos, and their labels in the formats of both tools.

    The folder is a `FiftyOneImageClassificationDataset`. Label Studio imports label_studio.json into a project with the
    interface label_studio.xml, and finds the photos by its local storage, whose document root is the folder's parent.

    Args:
        folder: Folder to write.
        suspects: The rows to show, see `rank_suspects`.
        photo: Gives the extension and the bytes of a photo by its key.
    """
    names = {}
    for key in suspects["key"]:
        extension, data = photo(key)
        names[key] = f"{key}.{extension}"
        write_bytes(folder / PHOTOS / names[key], data)
    write_json(folder / "labels.json", fiftyone_labels(suspects))
    paths = {key: f"{folder.name}/{PHOTOS}/{name}" for key, name in names.items()}
    write_json(folder / "label_studio.json", label_studio_tasks(suspects, paths))
    write_text(folder / "label_studio.xml", LABELLING)


def fiftyone_labels(suspects: pd.DataFrame) -> dict[str, Any]:
    """The content of `labels.json` of a `FiftyOneImageClassificationDataset`, whose photos have their keys as names.

    A photo's label is the given one, and its confidence is that it is right.
    """
    return {
        "classes": [LABEL_NAMES[label] for label in sorted(LABEL_NAMES)],
        "labels": {
            row["key"]: {
                "label": row["label"],  # a position in `classes`
                "confidence": row["confidence"],
                "attributes": {
                    "out_of_fold_prediction": LABEL_NAMES[row[PREDICTION]],
                    **{name: row[name] for name in ("rank", "source", "place", "group")},
                },
            }
            for row in suspects.to_dict("records")
        },
    }


def label_studio_tasks(suspects: pd.DataFrame, paths: dict[str, str]) -> list[dict[str, Any]]:
    """Tasks in Label Studio's JSON, with the out-of-fold prediction as a pre-annotation.

    Args:
        suspects: The rows to show.
        paths: Path of each photo below the document root of Label Studio's local files, by its key.
    """
    return [
        {
            "data": {
                "image": f"/data/local-files/?d={quote(paths[row['key']])}",
                "label": LABEL_NAMES[row["label"]],
                **{name: row[name] for name in ("rank", "key", "source", "confidence", "place", "group")},
            },
            "predictions": [
                {
                    "model_version": "out of fold",
                    "score": row[PROBABILITY] if row[PREDICTION] else 1 - row[PROBABILITY],
                    "result": [
                        {
                            "from_name": "label",
                            "to_name": "image",
                            "type": "choices",
                            "value": {"choices": [LABEL_NAMES[row[PREDICTION]]]},
                        }
                    ],
                }
            ],
        }
        for row in suspects.to_dict("records")
    ]
