"""AdaLoRA's schedule: when rank allocation starts and when the ranks are final."""

from typing import NamedTuple

from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.recipe.schema import AdapterSection

WARM_UP = 0.1
"""Default share of the steps in which all ranks keep their initial value."""
SETTLED = 0.3
"""Default share of the steps at the end in which the ranks are fixed."""
UNKNOWN_STEPS = 10**9


class RankSchedule(NamedTuple):
    """Steps before the first rank is pruned, and steps after the last one."""

    warm_up: int
    settled: int


def first_rank(adapter: AdapterSection) -> int:
    """Initial rank of every module in AdaLoRA; by default 1.5 times the final rank."""
    assert adapter.r is not None  # methods with ranks have one
    return int(adapter.arguments.get("init_r", -(-3 * adapter.r // 2)))


def check_ranks(adapter: AdapterSection, steps: object) -> None:
    """Check AdaLoRA's schedule as far as possible before the rows are counted.

    Args:
        steps: `trainer.max_steps`; if the recipe sets epochs, the rest is checked in training.

    Raises:
        RecipeError: the schedule leaves no step to change the ranks, or the ranks would have to grow.
    """
    if METHODS[adapter.method].allocates_ranks:
        rank_schedule(adapter, steps if isinstance(steps, int) and steps > 0 else UNKNOWN_STEPS)


def rank_schedule(adapter: AdapterSection, steps: int) -> RankSchedule:
    """The schedule of a run with a given number of steps.

    Raises:
        RecipeError: it leaves no step to change the ranks, or the ranks would have to grow.
    """
    assert adapter.r is not None
    given = adapter.arguments
    if first_rank(adapter) <= adapter.r:
        raise RecipeError(
            f"adapter.init_r = {first_rank(adapter)} must be larger than adapter.r = {adapter.r}, the mean final rank, "
            "because AdaLoRA only lowers ranks; raise adapter.init_r or lower adapter.r"
        )
    schedule = RankSchedule(
        int(given.get("tinit", steps * WARM_UP)),
        int(given.get("tfinal", steps * SETTLED)),
    )
    if schedule.warm_up < 0 or schedule.settled < 0 or sum(schedule) >= steps:
        raise RecipeError(
            f"adapter.tinit {schedule.warm_up} and adapter.tfinal {schedule.settled} leave none of the {steps} steps "
            "to change the ranks; lower one of them"
        )
    return schedule
