"""Where photos come from. A source yields its inputs one at a time, in a fixed order, and every one of them.

To add a source, write a class with what `Source` describes in a file of its own, and let `open_source` choose it.
What cannot be used is yielded too, as an `Input` whose `problem` says why, so that it ends up in the list of rejects;
only a source that is unusable as a whole raises `UserError`. Photos are given as a `Location` where they lie on the
disk, and as bytes where they only pass by. The metadata of a row go through `metadata.select_fields`, which knows the
names of columns, and stay the raw values that they are.
"""

from data_prep.sources.coco import CocoSource
from data_prep.sources.content import Content, Input, Location, Source, content_from_json, content_to_json
from data_prep.sources.folders import FolderSource, TableSource
from data_prep.sources.hub import HubSource
from data_prep.sources.opening import open_source
from data_prep.sources.outlines import CocoMask

__all__ = [
    "CocoMask",
    "CocoSource",
    "Content",
    "FolderSource",
    "HubSource",
    "Input",
    "Location",
    "Source",
    "TableSource",
    "content_from_json",
    "content_to_json",
    "open_source",
]
