"""Where photos come from."""

from data_prep.sources.content import Content, Input, Location, Source, content_from_json, content_to_json
from data_prep.sources.folders import FolderSource, ParquetSource, TableSource, open_source

__all__ = [
    "Content",
    "FolderSource",
    "Input",
    "Location",
    "ParquetSource",
    "Source",
    "TableSource",
    "content_from_json",
    "content_to_json",
    "open_source",
]
