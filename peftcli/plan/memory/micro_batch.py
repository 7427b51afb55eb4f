"""Chooses the tokens of a micro-batch on a GPU and the checkpointed layers, together.

A larger micro-batch reads and dequantizes the weights less often; a layer that is not checkpointed is not recomputed
in the backward pass. Both need memory, so of all pairs that fit, the one with the shortest step time is chosen. The
loss is the same for every pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from peftcli.methods.registry import METHODS
from peftcli.plan.choices import CHECKPOINTING
from peftcli.plan.machine import Machine
from peftcli.plan.memory.estimate import MicroBatchMemory
from peftcli.plan.memory.forecast import Rows, micro_batch_memory, step_time
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.plan import BATCHING, RANDOM_STATE, Decision, Plan
from peftcli.recipe.schema import Recipe

USED = 0.85
"""Share of a GPU's memory that the forecast may fill; the rest is for evaluation and what the forecast omits."""
ALIKE = 0.02
"""Step times that differ by less count as equal, because the forecast is no more precise; less memory then wins."""
MULTIPLE = 64
"""Micro-batch sizes are multiples of this, like the tiles of matmul kernels."""


@dataclass(frozen=True)
class Candidate:
    """A pair that fits.

    Attributes:
        tokens: maximum of a micro-batch.
        layers: number of checkpointed layers.
        total: bytes at the peak of a step.
        seconds: per optimizer step; None on a GPU of unknown speed.
    """

    tokens: int
    layers: int
    total: int
    seconds: float | None


def choose_micro_batch(plan: Plan, shape: ModelDimensions | None, machine: Machine, recipe: Recipe, rows: Rows) -> Plan:
    """The plan with the micro-batch tokens and the number of checkpointed layers that minimize the step time.

    Settings of the recipe are not changed: `performance.tokens_per_micro_batch`, `performance.batching: padded` and
    `trainer.activation_checkpointing`. On a CPU nothing changes.

    Args:
        shape: dimensions of the model; nothing changes without them.
        rows: the training rows, or as long as the recipe allows if they have not been read.
    """
    if shape is None or machine.device != "cuda" or plan.base.device != "cuda":
        return plan
    layers = _layer_choices(plan, shape, recipe)
    tokens = _token_choices(plan, rows)
    if len(layers) == 1 and len(tokens) == 1:
        return plan
    fitting = list(_fitting(plan, shape, machine, rows, tokens, layers))
    if not fitting:
        return _with(plan, tokens[0], layers[-1], shape.layers, machine)
    best = _best(fitting)
    return _with(plan, best.tokens, best.layers, shape.layers, machine)


def _layer_choices(plan: Plan, shape: ModelDimensions, recipe: Recipe) -> range:
    """How many layers may be checkpointed; partial checkpointing needs LoRA, whose activations are known per layer."""
    if not plan.trainer.get("activation_checkpointing"):
        return range(1)
    partial = recipe.trainer.get("activation_checkpointing") is None and METHODS[plan.adapter.method].is_lora
    return range(shape.layers + 1) if partial else range(shape.layers, shape.layers + 1)


def _token_choices(plan: Plan, rows: Rows) -> list[int]:
    """Candidate micro-batch sizes in ascending order: the longest row, doubled up to all rows of a step."""
    if plan.batching.kind != "padding_free" or plan.batching.firm:
        return [plan.batching.tokens]
    whole = rows.step_tokens(plan.batch.per_device * plan.batch.accumulation)
    found = [_rounded(rows.longest)]
    while found[-1] < whole:
        found.append(min(2 * found[-1], _rounded(whole)))
    return found


def _rounded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def _fitting(
    plan: Plan, shape: ModelDimensions, machine: Machine, rows: Rows, token_choices: list[int], layer_choices: range
) -> Iterator[Candidate]:
    """For each number of tokens that fits, the fewest checkpointed layers."""
    room = USED * machine.memory_bytes
    for tokens in token_choices:
        sized = replace(plan, batching=replace(plan.batching, tokens=tokens))
        load = micro_batch_memory(sized, shape, machine, rows)
        for layers in layer_choices:
            one = _checkpointed(load, layers)
            if one.total <= room:
                yield Candidate(tokens, layers, one.total, step_time(sized, one, machine, rows))
                break


def _checkpointed(load: MicroBatchMemory, layers: int) -> MicroBatchMemory:
    return replace(load, setting=replace(load.setting, checkpointing=layers / load.shape.layers))


def _best(fitting: list[Candidate]) -> Candidate:
    """The shortest step; if no time is known, the most tokens."""
    timed = [(one.seconds, one) for one in fitting if one.seconds is not None]
    if not timed:
        return fitting[-1]
    least = min(seconds for seconds, _ in timed)
    return min((one for seconds, one in timed if seconds <= least * (1 + ALIKE)), key=lambda one: one.total)


def _with(plan: Plan, tokens: int, layers: int, all_layers: int, machine: Machine) -> Plan:
    changed = {}
    if plan.trainer.get("activation_checkpointing") and layers < all_layers:
        changed[CHECKPOINTING] = _checkpointing_decision(layers, all_layers, machine)
    if tokens != plan.batching.tokens:
        old = next(one for one in plan.decisions if one.key == BATCHING)
        changed[BATCHING] = replace(old, value=f"{plan.batching.kind}, up to {tokens:,} tokens at once")
    partial = 0 < layers < all_layers
    checkpointing = bool(plan.trainer.get("activation_checkpointing")) and layers > 0
    decisions = tuple(changed.get(old.key, old) for old in plan.decisions if checkpointing or old.key != RANDOM_STATE)
    return replace(
        plan,
        trainer={**plan.trainer, "activation_checkpointing": checkpointing},
        batching=replace(plan.batching, tokens=tokens),
        checkpointed_blocks=layers if partial else None,
        decisions=decisions,
        optimizations=plan.optimizations if checkpointing else plan.optimizations - {"skip_rng_state"},
    )


def _checkpointing_decision(layers: int, all_layers: int, machine: Machine) -> Decision:
    if layers == 0:
        return Decision(CHECKPOINTING, "off", f"the activations of all {all_layers} layers fit in {machine.name}")
    reason = f"the activations of the other layers fit in {machine.name}, so they are not recomputed"
    return Decision(CHECKPOINTING, f"{layers} of {all_layers} layers", reason)
