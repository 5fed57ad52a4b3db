"""One table to choose a mechanism by: each trained on small tasks, at equal parameters and equal steps.

`compare()` trains and measures; `candidates()` are what there is to compare, found by what it declares (see
`regard.mechanisms`), beside softmax attention and a model without attention; `tasks.TASKS` is where tasks are added.
"""

from .candidates import Candidate, candidates
from .result import Mean, Result, Row, frontier
from .run import Progress, compare
from .tasks import TASKS, Data, Task
from .training import SCALES, Scale

__all__ = [
    "SCALES",
    "TASKS",
    "Candidate",
    "Data",
    "Mean",
    "Progress",
    "Result",
    "Row",
    "Scale",
    "Task",
    "candidates",
    "compare",
    "frontier",
]
