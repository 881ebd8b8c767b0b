"""Procedural street scenes: photos, masks and metadata that a seed and an index determine."""

from pipeline.scenes.cities import CITIES, PRETRAIN_CITIES, USUAL_CITIES
from pipeline.scenes.kinds import KINDS, Kind
from pipeline.scenes.plan import STUDY, SceneConfig
from pipeline.scenes.render import Scene, SceneObject, render

__all__ = [
    "CITIES",
    "KINDS",
    "PRETRAIN_CITIES",
    "STUDY",
    "USUAL_CITIES",
    "Kind",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "render",
]
