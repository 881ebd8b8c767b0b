"""COCO annotations beside a folder of photos: labels, masks and whatever metadata the images carry."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.sources.content import Input, Location
from data_prep.sources.coordinates import is_null
from data_prep.sources.folders import MISSING, PhotoFolder, stamp_files
from data_prep.sources.metadata import BadLabel, parse_label, select_fields
from data_prep.sources.outlines import BadOutline, CocoMask, area, encode_outline
from data_prep.sources.tables import encoding_of, flatten
from pipeline.data.photo import MAX_PIXELS, BadPhoto, open_header
from pipeline.errors import UserError
from pipeline.names import MASK_CLASSES
from pipeline.parsing.typed_json import Malformed, load_json
from pipeline.progress import say

CONE, BARRIER, SIGN, WORKER, VEHICLE, EQUIPMENT = MASK_CLASSES
# Category to class; None is left out of the masks. Beside the classes' own names, the categories of CMU ROADWork
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
    scene_level_tags, video_info; or those of a table. The label is the image's own where it has one. Otherwise it is 1
    if an object of the six classes is annotated, unknown if there are only objects of unknown categories, and else 0.
    Photos that the file does not name are rejected.

    Ids are compared as text: some tools write the same id as a number in one list and as a string in another.
    """

    def __init__(self, path: Path, file: Path):
        self.folder, self.file = PhotoFolder(path), file
        content = _read(file)
        self.images = _entries(content, "images", file, "id", "file_name")
        categories = _entries(content, "categories", file, "id", "name")
        self.annotations: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for annotation in _entries(content, "annotations", file, "image_id", "category_id"):
            self.annotations[str(annotation["image_id"])].append(annotation)
        if not self.images:
            raise UserError(f"{file} lists no images")
        self.ids = Counter(str(image["id"]) for image in self.images)
        self.absent = [number for number in self.annotations if number not in self.ids]
        self.fields = [_fields_of(number, image, file) for number, image in enumerate(self.images)]
        self.unclaimed = self.folder.claim([image["file_name"] for image in self.images], (), file.name)
        self.total: int | None = len(self.images) + len(self.absent) + len(self.unclaimed)
        self.values, self.unknown = self._number_categories(categories)

    def stamp(self) -> str:
        """Digest of the names, sizes and times of all files, the annotations' among them."""
        files = (self.folder.path / name for name in self.folder.files)
        return stamp_files(self.folder.path, [*files, self.file])

    def explain_unlabelled(self) -> str:
        """Why no photo has a label."""
        return f"the images in {self.file} have an empty label each, or only objects of unknown categories"

    def __iter__(self) -> Iterator[Input]:
        seen: set[str] = set()
        for image, fields in zip(self.images, self.fields, strict=True):
            file = self.folder.find(image["file_name"])
            if file is None:
                yield Input(str(image["file_name"]), None, fields, problem=MISSING)
            elif file in seen:
                yield Input(file, None, fields, problem="an earlier image has the same file name")
            else:
                seen.add(file)
                yield self._input(image, file, fields)
        for number in self.absent:
            name = f"{self.file.name}#{number}"
            yield Input(name, None, problem="the annotations are of an image that is not listed")
        for file in self.unclaimed:
            yield Input(file, None, problem=f"no image in {self.file.name}")

    def _input(self, image: dict[str, Any], file: str, fields: dict[str, Any]) -> Input:
        number = str(image["id"])
        if self.ids[number] > 1:
            return Input(file, None, fields, problem=f"several images have the same id: {number}")
        location, annotations = self.folder.locate(file), self.annotations.get(number, [])
        try:
            width, height = _size(image) or _size_of_photo(location, image, drawn=bool(annotations))
            objects = self._outline(annotations, width, height)
        except BadOutline as error:
            return Input(file, None, fields, problem=f"malformed annotations: {error}")
        except (BadPhoto, OSError):
            return Input(file, location, fields)  # whoever reads it next says why it is no photo
        categories = (str(annotation["category_id"]) for annotation in annotations)
        unknown = [self.unknown[category] for category in categories if category in self.unknown]
        fields = {"label": _implied_label(objects, unknown), **fields}
        if unknown:
            fields["category"] = unknown
        drawn = [(value, counts) for value, counts in objects if counts is not None]
        mask = None
        # The mask would show as background what is not drawn: an object with a box only, one of a category that may be
        # any of the classes, and, where the label is not 0, objects that nobody annotated.
        if len(drawn) == len(objects) and not unknown and (objects or _says_none(fields["label"])):
            # Smaller objects are drawn over larger ones, or a worker would vanish behind the excavator.
            drawn.sort(key=lambda one: area(one[1], width, height), reverse=True)
            mask = CocoMask(location.path, width, height, tuple(drawn))
        return Input(file, location, fields, mask)

    def _outline(self, annotations: list[dict[str, Any]], width: int, height: int) -> list[tuple[int, str | None]]:
        """Mask value and outline of each object of the six classes; the outline is None where there is only a box."""
        objects = []
        for annotation in annotations:
            category, number = annotation["category_id"], annotation.get("id")
            if str(category) not in self.values:
                raise BadOutline(f"category {category!r} is not listed (annotation {number})")
            value = self.values[str(category)]
            if value is None:
                continue
            try:
                objects.append((value, encode_outline(annotation.get("segmentation"), width, height)))
            except BadOutline as error:
                raise BadOutline(f"{error} (annotation {number})") from error
        return objects

    def _number_categories(self, categories: list[dict[str, Any]]) -> tuple[dict[str, int | None], dict[str, str]]:
        """Category ids to mask values, None for none, and to the names of unknown categories, which are reported."""
        values: dict[str, int | None] = {}
        unknown: dict[str, str] = {}
        for category in categories:
            number, name = str(category["id"]), str(category["name"])
            if number in values:
                raise UserError(f"{self.file} has two categories with the id {number}; give each its own")
            known = _find_category(name)
            if known is None:
                unknown[number] = name
            class_name = None if known is None else CATEGORIES[known]
            values[number] = None if class_name is None else MASK_CLASSES.index(class_name) + 1
        if unknown:
            uses = Counter(str(one["category_id"]) for entries in self.annotations.values() for one in entries)
            names = ", ".join(f"{name!r} ({uses[number]} objects)" for number, name in unknown.items())
            say(f"{self.file}: photos with objects of unknown categories have no mask, nor a label by them: {names}")
        return values, unknown


def _read(file: Path) -> Any:
    try:
        return load_json(file.read_text(encoding_of(file)), lenient=True, keep=_slim)
    except OSError as error:
        raise UserError(f"the annotations {file} cannot be read: {error.strerror}") from error
    except (Malformed, UnicodeDecodeError) as error:
        raise UserError(f"the annotations {file} are not JSON that can be read: {error}") from error


def _slim(entry: dict[str, Any]) -> dict[str, Any]:
    """Keep only what is needed of an annotation while it is read: plain lists of numbers take four times the memory."""
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
            value = _whole(entry.get(key)) if isinstance(entry, dict) else None
            if not isinstance(value, int | str) or isinstance(value, bool):
                raise UserError(f"entry {number} of the {name} in {file} has no usable {key}")
            entry[key] = value
    return entries


def _fields_of(number: int, image: dict[str, Any], file: Path) -> dict[str, Any]:
    """The metadata of an image."""
    try:
        return select_fields(flatten(image))
    except Malformed as error:
        raise UserError(f"entry {number} of the images in {file} is malformed: {error}") from error


def _whole(value: Any) -> Any:
    """Whole numbers as such, which tables with gaps turn into floats: 1.0 is 1. Everything else stays as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height in pixels, checked before anything of that size is made; None where one is missing."""
    width, height = (_pixels(image.get(name)) for name in ("width", "height"))
    if is_null(width) or is_null(height):
        return None
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise BadOutline("width and height are not whole numbers above 0")
    if width * height > MAX_PIXELS:
        raise BadOutline(f"{width}x{height}, more than {MAX_PIXELS // 10**6} million pixels")
    return width, height


def _pixels(value: Any) -> Any:
    """A number of pixels that is written as text or as a whole float."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value) else _whole(value)


def _size_of_photo(location: Location, image: dict[str, Any], drawn: bool) -> tuple[int, int]:
    """Width and height of the photo itself.

    Args:
        location: Where the photo is.
        image: Its entry, where one of the two is missing, or both.
        drawn: Whether there are objects, which might lie upright or as the photo is stored.

    Raises:
        BadPhoto, OSError: It cannot be read.
        BadOutline: EXIF leaves open which way the objects lie, or the entry has another size.
    """
    header = open_header(location.read())
    for name, side in zip(("width", "height"), header.size, strict=True):
        if not is_null(image.get(name)) and _pixels(image[name]) != side:
            raise BadOutline(f"the {name} is {str(image[name])[:20]}, that of the photo is {side}")
    if drawn and header.orientation != 1:
        raise BadOutline("EXIF turns the photo, and without width and height nothing says whether the outlines turn")
    return header.size


def _implied_label(objects: list[tuple[int, str | None]], unknown: list[str]) -> int | None:
    """1 where there is roadwork, 0 where there are no objects, None where the objects' categories are unknown."""
    if objects:
        return 1
    return None if unknown else 0


def _says_none(label: Any) -> bool:
    """Whether the label says that a photo without objects has an empty mask, and not one that nobody drew."""
    with suppress(BadLabel):  # its photo is rejected, for the label
        return parse_label(label) == 0
    return False


def _find_category(name: str) -> str | None:
    """A name, or its singular, as `CATEGORIES` has it.

    ROADWork's finer categories follow a colon: "Temporary Traffic Control Sign: left arrow".
    """
    words = " ".join(re.split(r"[\s_-]+", name.partition(":")[0].strip().lower()))
    return next((form for form in (words, words.removesuffix("s")) if form in CATEGORIES), None)
