"""COCO annotations beside a folder of photos: labels, masks and whatever metadata the images carry."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.metadata import BadLabel, parse_label, select_fields
from data_prep.sources.content import Input
from data_prep.sources.folders import MISSING, PhotoFolder, stamp_files
from data_prep.sources.outlines import BadOutline, CocoMask, area, encode_outline
from data_prep.tables import flatten
from pipeline.data.photo import MAX_PIXELS
from pipeline.data.vocabulary import MASK_CLASSES
from pipeline.errors import UserError
from pipeline.progress import say

CONE, BARRIER, SIGN, WORKER, VEHICLE, EQUIPMENT = MASK_CLASSES
# Category to class; None is what the masks leave out. Beside the classes' own names, the categories of CMU ROADWork
# (Ghosh et al. 2024, arXiv 2406.07661). Drums and arrow boards count as equipment, as in the procedural scenes; a
# message board is a sign, as the Manual on Uniform Traffic Control Devices has it.
CATEGORIES: dict[str, str | None] = {
    **{name: name for name in MASK_CLASSES},
    **dict.fromkeys(("cone", "tubular marker"), CONE),
    **dict.fromkeys(("barrier", "barricade", "fence", "vertical panel"), BARRIER),
    **dict.fromkeys(("temporary traffic control sign", "temporary traffic control message board"), SIGN),
    "work vehicle": VEHICLE,
    **dict.fromkeys(("work equipment", "drum", "arrow board", "other roadwork objects"), EQUIPMENT),
    **dict.fromkeys(("police officer", "police vehicle", "road", "sidewalk", "bike lane"), None),
}


class CocoSource:
    """A folder of photos and a COCO file, whose `file_name` is relative to the folder.

    Keys of an image other than COCO's own are metadata, as CMU ROADWork has them: gps, city_name, scene_description,
    scene_level_tags, video_info; or those of a table. The label is the image's own where it has one, else 1 if an
    object of the six classes is annotated. Photos that the file does not name are rejected.
    """

    def __init__(self, path: Path, file: Path):
        self.folder, self.file = PhotoFolder(path), file
        content = _read(file)
        self.images = _entries(content, "images", file, "id", "file_name")
        categories = _entries(content, "categories", file, "id", "name")
        self.annotations: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
        for annotation in _entries(content, "annotations", file, "image_id", "category_id"):
            self.annotations[annotation["image_id"]].append(annotation)
        if not self.images:
            raise UserError(f"{file} lists no images")
        self.ids = Counter(image["id"] for image in self.images)
        self.absent = [number for number in self.annotations if number not in self.ids]
        claimed = {self.folder.find(image["file_name"]) for image in self.images}
        self.unclaimed = [name for name in self.folder.photos if name not in claimed]
        self.total: int | None = len(self.images) + len(self.absent) + len(self.unclaimed)
        self.values = self._number_categories(categories)

    def stamp(self) -> str:
        """Digest of the names, sizes and times of all files, the annotations' among them."""
        files = (self.folder.path / name for name in self.folder.files)
        return stamp_files(self.folder.path, [*files, self.file])

    def __iter__(self) -> Iterator[Input]:
        seen: set[str] = set()
        for image in self.images:
            file = self.folder.find(image["file_name"])
            fields = select_fields(flatten(image))
            if file is None:
                yield Input(str(image["file_name"]), None, fields, problem=MISSING)
            elif file in seen:
                yield Input(file, None, fields, problem="an earlier image has the same file name")
            else:
                seen.add(file)
                yield self._input(image, file, fields)
        for number in self.absent:
            yield Input(
                f"{self.file.name}#{number}", None, problem="the annotations are of an image that is not listed"
            )
        for file in self.unclaimed:
            yield Input(file, None, problem=f"no image in {self.file.name}")

    def _input(self, image: dict[str, Any], file: str, fields: dict[str, Any]) -> Input:
        if self.ids[image["id"]] > 1:
            return Input(file, None, fields, problem=f"several images have the same id: {image['id']}")
        location = self.folder.locate(file)
        try:
            width, height = _size(image)
            objects = self._outline(self.annotations.get(image["id"], []), width, height)
        except BadOutline as error:
            return Input(file, None, fields, problem=f"malformed annotations: {error}")
        fields = {"label": int(bool(objects)), **fields}
        drawn = [(value, counts) for value, counts in objects if counts is not None]
        mask = None
        # An object with a box only would be background in the mask, and so would what nobody annotated.
        if len(drawn) == len(objects) and (objects or _says_none(fields["label"])):
            # The smaller ones over the larger ones, or a worker vanishes behind the excavator.
            drawn.sort(key=lambda one: area(one[1], width, height), reverse=True)
            mask = CocoMask(location.path, width, height, tuple(drawn))
        return Input(file, location, fields, mask)

    def _outline(self, annotations: list[dict[str, Any]], width: int, height: int) -> list[tuple[int, str | None]]:
        """Values in the mask and outlines of the objects of the six classes; None for one with a box only."""
        objects = []
        for annotation in annotations:
            category, number = annotation["category_id"], annotation.get("id")
            if category not in self.values:
                raise BadOutline(f"category {category!r} is not listed (annotation {number})")
            value = self.values[category]
            if value is None:
                continue
            try:
                objects.append((value, encode_outline(annotation.get("segmentation"), width, height)))
            except BadOutline as error:
                raise BadOutline(f"{error} (annotation {number})") from error
        return objects

    def _number_categories(self, categories: list[dict[str, Any]]) -> dict[int | str, int | None]:
        """Category id to value in the mask, None for none; says which categories nobody knows."""
        uses = Counter(one["category_id"] for entries in self.annotations.values() for one in entries)
        values: dict[int | str, int | None] = {}
        unknown = []
        for category in categories:
            number, name = category["id"], str(category["name"])
            if number in values:
                raise UserError(f"{self.file} has two categories with the id {number}; give each its own")
            class_name = CATEGORIES.get(_normalise(name))
            if _normalise(name) not in CATEGORIES:
                unknown.append(f"{name!r} ({uses[number]} objects)")
            values[number] = None if class_name is None else MASK_CLASSES.index(class_name) + 1
        if unknown:
            say(f"{self.file}: unknown categories, left out of labels and masks: {', '.join(unknown)}")
        return values


def _read(file: Path) -> Any:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            return json.load(stream, object_hook=_slim)
    except OSError as error:
        raise UserError(f"the annotations {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the annotations {file} are not JSON: {error}") from error


def _slim(entry: dict[str, Any]) -> dict[str, Any]:
    """Keep of an annotation what is needed, as it is read: plain lists of numbers take four times the memory."""
    if "segmentation" not in entry:
        return entry
    outline = entry["segmentation"]
    if isinstance(outline, list):
        outline = [_pack(polygon) for polygon in outline]
    return {**{key: entry.get(key) for key in ("id", "image_id", "category_id")}, "segmentation": outline}


def _pack(polygon: Any) -> Any:
    try:
        return array("d", polygon)
    except (TypeError, OverflowError):
        return polygon  # malformed; its image is rejected


def _entries(content: Any, name: str, file: Path, *keys: str) -> list[dict[str, Any]]:
    """A list of the file whose entries have these keys."""
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(
            f"{file} is no COCO file: it must be a JSON object with the lists images, annotations and categories; "
            f"{name} is missing"
        )
    for number, entry in enumerate(entries):
        for key in keys:
            if not isinstance(entry, dict) or not isinstance(entry.get(key), int | str):
                raise UserError(f"entry {number} of the {name} in {file} has no usable {key}")
    return entries


def _size(image: dict[str, Any]) -> tuple[int, int]:
    """Width and height in pixels, checked before anything of that size is made."""
    width, height = image.get("width"), image.get("height")
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise BadOutline("width and height are not whole numbers above 0")
    if width * height > MAX_PIXELS:
        raise BadOutline(f"{width}x{height}, more than {MAX_PIXELS // 10**6} million pixels")
    return width, height


def _says_none(label: Any) -> bool:
    """Whether a photo without objects has a mask that is empty, and not one that nobody drew."""
    try:
        return parse_label(label) == 0
    except BadLabel:
        return False  # its photo is rejected, for the label


def _normalise(category: str) -> str:
    """ROADWork's finer categories follow a colon: "Temporary Traffic Control Sign: left arrow"."""
    return " ".join(re.split(r"[\s_-]+", category.partition(":")[0].strip().lower()))
