"""Procedural street scenes: photos, masks and metadata that a seed and an index determine."""

from data_prep.scenes.cities import CITIES, PRETRAIN_CITIES, USUAL_CITIES
from data_prep.scenes.kinds import KINDS
from data_prep.scenes.plan import STUDY, SceneConfig
from data_prep.scenes.render import Scene, render

__all__ = ["CITIES", "KINDS", "PRETRAIN_CITIES", "STUDY", "USUAL_CITIES", "Scene", "SceneConfig", "render"]
