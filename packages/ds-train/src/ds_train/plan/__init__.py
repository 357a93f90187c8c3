"""What training a model on a cluster needs and takes: memory, time, price, and the best mesh.

A model of costs, not a simulation: every part of a step is what it moves or computes, over how fast
the cluster does that. How far that is from runs that others have published is part of the answer.
"""

from ds_train.plan.cluster import CLUSTERS, Cluster, read_cluster
from ds_train.plan.measuring import measure_cluster
from ds_train.plan.planner import Plan, make_plan
from ds_train.plan.published import PUBLISHED, Comparison, PublishedRun, compare
from ds_train.plan.recipe import PlanError, Recipe
from ds_train.plan.searching import search

__all__ = [
    "CLUSTERS",
    "PUBLISHED",
    "Cluster",
    "Comparison",
    "Plan",
    "PlanError",
    "PublishedRun",
    "Recipe",
    "compare",
    "make_plan",
    "measure_cluster",
    "read_cluster",
    "search",
]
