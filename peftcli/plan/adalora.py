"""AdaLoRA's schedule: when rank allocation begins and when the ranks are final."""

from typing import NamedTuple

from peftcli.errors import RecipeError
from peftcli.methods.registry import METHODS
from peftcli.recipe.schema import AdapterSection

WARM_UP = 0.1
"""Share of the steps in which all ranks are the first ones, where the recipe does not say."""
SETTLED = 0.3
"""Share of the steps at the end in which the ranks stay."""
UNKNOWN_STEPS = 10**9


class RankSchedule(NamedTuple):
    """Steps before the first rank is taken away, and steps after the last one."""

    warm_up: int
    settled: int


def first_rank(adapter: AdapterSection) -> int:
    """Rank of every module at the start of AdaLoRA: half as much again as at the end, where the recipe does not say."""
    assert adapter.r is not None  # a method that has one
    return int(adapter.arguments.get("init_r", -(-3 * adapter.r // 2)))


def check_ranks(adapter: AdapterSection, steps: object) -> None:
    """Check what can be known of AdaLoRA's schedule before the rows are counted.

    Args:
        steps: `trainer.max_steps`; the rest waits for the trainer where the recipe counts epochs.

    Raises:
        RecipeError: the schedule leaves no step to move the ranks in, or the ranks would have to grow.
    """
    if METHODS[adapter.method].allocates_ranks:
        rank_schedule(adapter, steps if isinstance(steps, int) and steps > 0 else UNKNOWN_STEPS)


def rank_schedule(adapter: AdapterSection, steps: int) -> RankSchedule:
    """The schedule of a run of so many steps.

    Raises:
        RecipeError: it leaves no step to move the ranks in, or the ranks would have to grow.
    """
    assert adapter.r is not None
    given = adapter.arguments
    if first_rank(adapter) <= adapter.r:
        raise RecipeError(
            f"adapter.init_r = {first_rank(adapter)} must be more than adapter.r = {adapter.r}, the mean rank at the "
            "end: AdaLoRA takes ranks away"
        )
    schedule = RankSchedule(
        int(given.get("tinit", steps * WARM_UP)),
        int(given.get("tfinal", steps * SETTLED)),
    )
    if schedule.warm_up < 0 or schedule.settled < 0 or sum(schedule) >= steps:
        raise RecipeError(
            f"adapter.tinit {schedule.warm_up} and adapter.tfinal {schedule.settled} leave none of the {steps} steps "
            "to move the ranks in; lower one of them"
        )
    return schedule
