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
"""Of the decision."""
OUTSIDE = "accelerate's configuration asks for FSDP"


@dataclass(frozen=True)
class Sharding:
    """How the base is divided.

    Attributes:
        shards: processes that each hold a part of it; 1 where each has all of it.
        possible: cards or processes of this machine that it could be divided among; 1 where it cannot be.
        decision: None where there is but one process and nobody asks.
    """

    shards: int
    possible: int
    decision: Decision | None
    notices: tuple[str, ...] = ()

    def fix(self, processes: int) -> str:
        """What divides the base among all cards that are here."""
        return " and ".join(asking(self.possible, processes))


def asking(cards: int, processes: int) -> tuple[str, ...]:
    """What divides the base among some cards: the key of the recipe, and the flag where it was not given.

    >>> asking(2, 1), asking(2, 2)
    (('performance: {sharding: full}', '--num-processes 2'), ('performance: {sharding: full}',))
    """
    return ("performance: {sharding: full}", *((f"--num-processes {cards}",) if processes != cards else ()))


def choose_sharding(recipe: Recipe, machine: Machine, facts: ModelFacts, choices: Choices) -> Sharding:
    """Choose whether the base is divided among the processes.

    Raises:
        RecipeError: it is asked for, and the model, the method or another key does not allow it.
    """
    asked, here = recipe.performance.sharding, machine.processes
    if asked == "none" and machine.fsdp:
        raise RecipeError(f"{OUTSIDE}, and performance.sharding is none; set it to full, or take FSDP out there")
    wanted = asked == "full" or machine.fsdp
    why_not = _why_not(recipe, machine, facts, choices)
    if not wanted:
        decision = Decision(KEY, "none", "each process holds the whole base") if here > 1 else None
        return Sharding(1, 1 if why_not else max(here, machine.count if choices.on_gpu else 1), decision)
    if why_not:
        raise RecipeError(f"{OUTSIDE if asked == 'auto' else ASKED}: {why_not}")
    possible = max(here, machine.count if choices.on_gpu else 1)
    if here == 1:
        fix = f"--num-processes {possible} divides it" if possible > 1 else "--num-processes divides it"
        return Sharding(1, possible, Decision(KEY, "none", f"one process holds the whole base; {fix}"))
    reason = "performance.sharding" if asked == "full" else OUTSIDE
    said = f"{reason}; each holds a part of the base, and the whole adapter with its optimizer"
    notices = _notices(recipe, choices, here)
    return Sharding(here, here, Decision(KEY, f"full, over {here} processes", said), notices)


def _why_not(recipe: Recipe, machine: Machine, facts: ModelFacts, choices: Choices) -> str:
    """Why the base cannot be divided, with the mend; empty where it can."""
    first = next(undivided(sections_of(recipe)), None)
    if first is not None:
        return f"{dotted(first[0])} excludes it: {first[1]}; keep one of the two"
    if not facts.divisible:
        return f"the installed transformers knows no parts of {facts.architecture}; leave it out"
    if machine.device == "cuda" and not choices.on_gpu:
        return "it divides among cards, and trainer.use_cpu leaves those of this machine alone; keep one of the two"
    if machine.fsdp and machine.fsdp_more:
        names = " and ".join(machine.fsdp_more)
        return f"{names} of accelerate's configuration cannot be had here; take it out there"
    return ""


def _notices(recipe: Recipe, choices: Choices, processes: int) -> tuple[str, ...]:
    if not choices.on_gpu:
        return ()
    packed = "while it loads, each of the {} processes packs the whole base in the machine's memory"
    return (
        "performance.sharding was tried with two processes on a CPU, where its losses are those of one; not yet on "
        "cards",
        *((packed.format(processes),) if recipe.quantization is not None else ()),
    )
