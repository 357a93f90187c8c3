"""What a notebook needs, in one line each; needs the extra `notebook`.

An experiment that knows its surroundings (`start`), measurements that can be trusted (`benchmark`,
`memory_profile`, `sweep`), an environment that can be made again, and what a course is made of:
`Quiz`, `Exercise`, `explore`.
"""

from ds_precision.figures import PALETTE
from ds_train.notebook.environment import Environment
from ds_train.notebook.exercise import Checked, Exercise
from ds_train.notebook.experiment import Experiment, start
from ds_train.notebook.explore import Choice, explore
from ds_train.notebook.measuring import (
    MemoryProfile,
    Sweep,
    Timing,
    benchmark,
    memory_profile,
    sweep,
)
from ds_train.notebook.quiz import Answer, Question, Quiz
from ds_train.notebook.verify import verify

__all__ = [
    "PALETTE",
    "Answer",
    "Checked",
    "Choice",
    "Environment",
    "Exercise",
    "Experiment",
    "MemoryProfile",
    "Question",
    "Quiz",
    "Sweep",
    "Timing",
    "benchmark",
    "explore",
    "memory_profile",
    "start",
    "sweep",
    "verify",
]
