"""Training on many ranks: expert, pipeline and data parallel, on TensorFlow's own collectives."""

from ds_train.parallel.collectives import Engine, Ranks, Traced
from ds_train.parallel.layout import Layout
from ds_train.parallel.mesh import Group, Mesh, Place
from ds_train.parallel.schedules import (
    Costs,
    Exchange,
    Schedule,
    Timetable,
    Work,
    make_schedule,
    published_bubble,
)
from ds_train.parallel.world import LostRankError, World

__all__ = [
    "Costs",
    "Engine",
    "Exchange",
    "Group",
    "Layout",
    "LostRankError",
    "Mesh",
    "Place",
    "Ranks",
    "Schedule",
    "Timetable",
    "Traced",
    "Work",
    "World",
    "make_schedule",
    "published_bubble",
]
