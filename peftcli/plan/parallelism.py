"""Whether every process holds the whole base or a shard of it (FSDP)."""

from dataclasses import dataclass

from peftcli.errors import RecipeError
from peftcli.plan.choices import Choices
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.plan import Decision
from peftcli.recipe.problems import dotted
from peftcli.recipe.rules import ASKED, sections_of, undivided
from peftcli.recipe.schema import Recipe

KEY = "sharding"
"""Key of the decision."""
OUTSIDE = "accelerate is configured to use FSDP"


@dataclass(frozen=True)
class Sharding:
    """How the base is sharded.

    Attributes:
        shards: number of processes across which it is sharded; 1 if each has all of it.
        possible: number of GPUs or processes of this machine across which it could be sharded; 1 if it cannot.
        decision: None if there is one process and sharding is not requested.
    """

    shards: int
    possible: int
    decision: Decision | None
    notices: tuple[str, ...] = ()

    def fix(self, processes: int) -> str:
        """What to set to shard the base across all available GPUs."""
        return " and ".join(asking(self.possible, processes))


def asking(gpus: int, processes: int) -> tuple[str, ...]:
    """What to set to shard the base: the recipe key, and the flag if it was not given.

    >>> asking(2, 1), asking(2, 2)
    (('performance: {sharding: full}', '--num-processes 2'), ('performance: {sharding: full}',))
    """
    return ("performance: {sharding: full}", *((f"--num-processes {gpus}",) if processes != gpus else ()))


def choose_sharding(recipe: Recipe, machine: Machine, facts: ModelFacts, choices: Choices) -> Sharding:
    """Decide whether the base is sharded across the processes.

    Raises:
        RecipeError: sharding is requested, but the model, the method or another key does not support it.
    """
    asked, here = recipe.performance.sharding, machine.processes
    if asked == "none" and machine.fsdp:
        raise RecipeError(f"{OUTSIDE}, but performance.sharding is none; set it to full, or disable FSDP there")
    wanted = asked == "full" or machine.fsdp
    why_not = _why_not(recipe, machine, facts, choices)
    if not wanted:
        decision = Decision(KEY, "none", "each process holds the whole base") if here > 1 else None
        return Sharding(1, 1 if why_not else max(here, machine.count if choices.on_gpu else 1), decision)
    if why_not:
        raise RecipeError(f"{OUTSIDE if asked == 'auto' else ASKED}: {why_not}")
    possible = max(here, machine.count if choices.on_gpu else 1)
    if here == 1:
        fix = f"--num-processes {possible} shards it" if possible > 1 else "--num-processes shards it"
        return Sharding(1, possible, Decision(KEY, "none", f"one process holds the whole base; {fix}"))
    reason = "performance.sharding" if asked == "full" else OUTSIDE
    why = f"{reason}; each process holds a shard of the base and the whole adapter with its optimizer"
    notices = _notices(recipe, choices, here)
    return Sharding(here, here, Decision(KEY, f"full, over {here} processes", why), notices)


def _why_not(recipe: Recipe, machine: Machine, facts: ModelFacts, choices: Choices) -> str:
    """Why the base cannot be sharded, with the fix; empty if it can."""
    first = next(undivided(sections_of(recipe)), None)
    if first is not None:
        return f"{dotted(first[0])} is not supported with it: {first[1]}; remove one of the two"
    if not facts.divisible:
        return f"the installed transformers cannot shard {facts.architecture}; remove it"
    if machine.device == "cuda" and not choices.on_gpu:
        return "it shards across GPUs, but trainer.use_cpu is set; remove one of the two"
    if machine.fsdp and machine.fsdp_more:
        names = " and ".join(machine.fsdp_more)
        return f"{names} of accelerate's configuration is not supported; remove it there"
    return ""


def _notices(recipe: Recipe, choices: Choices, processes: int) -> tuple[str, ...]:
    if not choices.on_gpu:
        return ()
    loading = "while loading, each of the {} processes holds the whole quantized base in CPU memory"
    return (
        "performance.sharding was tested with two processes on a CPU, where its losses equal those of one; not yet on "
        "GPUs",
        *((loading.format(processes),) if recipe.quantization is not None else ()),
    )
