"""The words that metadata may hold, in the order of their ids. Matched without regard to case."""

WEATHER = ("sunny", "partly cloudy", "cloudy", "rainy", "snowy", "foggy", "wet", "icy")
DAYTIME = ("light", "dark", "twilight")
SCENE = ("urban", "suburban", "rural", "highway")

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
