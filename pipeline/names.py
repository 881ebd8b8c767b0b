"""Names by number: views, metadata's words (matched without regard to case), mask classes and labels."""

from typing import Literal

TILE_GRID = 3
# Names of the views by number; `pipeline.data.views` cuts them.
VIEW_NAMES = (
    "global",
    *(f"tile_{row}_{column}" for row in range(TILE_GRID) for column in range(TILE_GRID)),
    "crop_first",
    "crop_last",
)
NUM_VIEWS = len(VIEW_NAMES)

WEATHER = ("sunny", "partly cloudy", "cloudy", "rainy", "snowy", "foggy", "wet", "icy")
DAYTIME = ("light", "dark", "twilight")
SCENE = ("urban", "suburban", "rural", "highway")

EARTH_RADIUS_KM = 6371.0  # part of what a saved model means by a place

# The six segmentation classes; value c + 1 in a mask PNG marks class c, 0 is background.
MASK_CLASSES = (
    "traffic cone",
    "construction barrier",
    "road work sign",
    "worker",
    "construction vehicle",
    "construction equipment",
)
LABEL_NAMES = {0: "None", 1: "Roadwork"}
# What an evaluation measures: photos as they are, or as the NATIX challenge sent them in its older form (224 px, at one
# of four levels of degradation, without metadata). The challenge stopped sending work in May 2026.
Profile = Literal["native", "streetvision"]
