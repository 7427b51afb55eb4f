"""All tasks by name."""

from peftcli.tasks.base import Task
from peftcli.tasks.causal_lm import CAUSAL_LM
from peftcli.tasks.image_classification import IMAGE_CLASSIFICATION
from peftcli.tasks.sequence_classification import SEQUENCE_CLASSIFICATION
from peftcli.tasks.token_classification import TOKEN_CLASSIFICATION

TASKS: dict[str, Task] = {
    task.name: task for task in (CAUSAL_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, IMAGE_CLASSIFICATION)
}
DEFAULT = CAUSAL_LM.name
"""The task of a recipe that does not set one."""


def find_task(name: object) -> Task | None:
    """The task with a name; the default for None, and None if there is no such task."""
    if name is None:
        return TASKS[DEFAULT]
    return TASKS.get(name) if isinstance(name, str) else None


def tasks_reading(column: str) -> list[str]:
    """Names of the tasks that use a key of `dataset.columns`.

    >>> tasks_reading("label")
    ['sequence-classification', 'image-classification']
    """
    return [task.name for task in TASKS.values() if column in task.columns]
