"""Suggests changes that make a recipe fit in memory, the cheapest first, each with its effect."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS
from peftcli.plan.memory.estimate import INT8_BITS, NF4_BITS, MicroBatchMemory
from peftcli.plan.memory.training_setup import TrainingSetup
from peftcli.plan.optimizer import optimizer_bytes
from peftcli.plan.parallelism import asking
from peftcli.plan.plan import Plan

LEAST_SHARE = 0.01
"""Share of the total that a change must save to be suggested."""
SMALL_OPTIMIZER = "paged_adamw_8bit"
FEW_TARGETS = ("q_proj", "v_proj")
SHORTEST = 128
"""Minimum `dataset.max_length` that is suggested."""


@dataclass(frozen=True)
class Suggestion:
    """One change.

    Attributes:
        keys: the recipe keys to set.
        load: the resulting memory.
    """

    keys: str
    load: MicroBatchMemory


Change = Callable[[MicroBatchMemory], Suggestion | None]
"""Returns the changed micro-batch; None if the change is already made or does not apply."""


def suggest(load: MicroBatchMemory, plan: Plan, memory_bytes: int) -> list[Suggestion]:
    """All changes that reduce memory, each on its own, followed by a combination if no single one is enough.

    Args:
        memory_bytes: memory that the micro-batch should fit in.
    """
    changes = list(_changes(plan, memory_bytes))
    single = [fix for change in changes if (fix := change(load)) is not None and _helps(fix.load, load)]
    if any(fix.load.total <= memory_bytes for fix in single):
        return single
    keys, now = [], load
    for change in changes:
        fix = change(now)
        if fix is None or not _helps(fix.load, now):
            continue
        keys.append(fix.keys)
        now = fix.load
        if now.total <= memory_bytes:
            break
    return [*single, Suggestion("\n".join(keys), now)] if len(keys) > 1 else single


def _helps(after: MicroBatchMemory, before: MicroBatchMemory) -> bool:
    return after.total < before.total * (1 - LEAST_SHARE)


def _changes(plan: Plan, memory_bytes: int) -> Iterator[Change]:
    yield lambda load: _quantize(load, METHODS[plan.adapter.method])
    if plan.batching.kind == "padding_free":
        yield lambda load: _fewer_tokens(load, memory_bytes)
    else:
        yield lambda load: _smaller_batch(load, plan, memory_bytes)
    yield _checkpoint
    yield lambda load: _shard(load, plan)
    yield _shorten
    yield lambda load: _lower_rank(load, plan)
    yield _fewer_targets
    yield lambda load: _small_optimizer(load, plan)


def _quantize(load: MicroBatchMemory, method: Method) -> Suggestion | None:
    """The fewest bits that the method supports, if the weights have more."""
    now, bits = load.setting.weight_bits or 16, method.fewest_bits
    if now <= {4: NF4_BITS[False]}.get(bits, bits):
        return None
    fewer = replace(load.setting, weight_bits=NF4_BITS[True] if bits == 4 else INT8_BITS)
    return _with(load, f"quantization: {{bits: {bits}}}", fewer)


def _fewer_tokens(load: MicroBatchMemory, memory_bytes: int) -> Suggestion | None:
    """Padding-free batches that fit, or of one row if nothing fits; the loss does not depend on their size."""
    tokens = max(load.longest, min(load.tokens, load.largest(memory_bytes) // 64 * 64))
    if tokens >= load.tokens:
        return None
    return Suggestion(f"performance: {{tokens_per_micro_batch: {tokens}}}", load.with_tokens(tokens))


def _smaller_batch(load: MicroBatchMemory, plan: Plan, memory_bytes: int) -> Suggestion | None:
    rows, accumulated, now = plan.batch.per_device, plan.batch.accumulation, load
    while rows % 2 == 0 and (now is load or now.total > memory_bytes):
        rows, accumulated = rows // 2, accumulated * 2
        now = load.with_tokens(rows * load.longest)
    if now.tokens >= load.tokens:
        return None
    keys = f"trainer: {{per_device_train_batch_size: {rows}, gradient_accumulation_steps: {accumulated}}}"
    if rows == 1 and now.setting.attention == "masked":
        now = replace(now, setting=replace(now.setting, attention="flash"))
    return Suggestion(keys, now)


def _checkpoint(load: MicroBatchMemory) -> Suggestion | None:
    if load.setting.checkpointing == 1:
        return None
    return _with(load, "trainer: {activation_checkpointing: true}", replace(load.setting, checkpointing=1.0))


def _shard(load: MicroBatchMemory, plan: Plan) -> Suggestion | None:
    """The base sharded across all available GPUs."""
    gpus = plan.possible_shards
    if not load.setting.on_gpu or load.setting.shards >= gpus:
        return None
    keys = "\n".join(asking(gpus, plan.batch.processes))
    return _with(load, keys, replace(load.setting, shards=gpus, processes=gpus))


def _shorten(load: MicroBatchMemory) -> Suggestion | None:
    longest = load.longest // 2
    if longest < SHORTEST:
        return None
    shorter = replace(load, longest=longest, tokens=max(longest, load.tokens // 2))
    return Suggestion(f"dataset: {{max_length: {longest}}}", shorter)


def _lower_rank(load: MicroBatchMemory, plan: Plan) -> Suggestion | None:
    r = load.setting.r // 2
    if r < 4 or plan.adapter.modules_to_save or plan.adapter.alpha is None:
        return None
    lower = replace(load.setting, r=r, trainable=load.setting.trainable // 2)
    return _with(load, f"adapter: {{r: {r}, alpha: {plan.adapter.alpha / 2:g}}}", lower)


def _fewer_targets(load: MicroBatchMemory) -> Suggestion | None:
    setting = load.setting
    few = tuple(linear for linear in setting.targets if linear.leaf in FEW_TARGETS)
    if len({linear.leaf for linear in few}) < 2 or len(few) == len(setting.targets) or setting.expert_adapters:
        return None
    dropped = sum(
        setting.r * (linear.inputs + linear.outputs) * linear.count for linear in setting.targets if linear not in few
    )
    fewer = replace(setting, targets=few, trainable=max(0, setting.trainable - dropped))
    return _with(load, f"adapter: {{target_modules: [{', '.join(FEW_TARGETS)}]}}", fewer)


def _small_optimizer(load: MicroBatchMemory, plan: Plan) -> Suggestion | None:
    whole = optimizer_bytes(SMALL_OPTIMIZER, plan.trained, load.setting.adapter_bytes)
    state_bytes = whole / max(1, plan.trained.parameters)
    if not load.setting.on_gpu or state_bytes >= load.setting.state_bytes:
        return None
    return _with(load, f"trainer: {{optim: {SMALL_OPTIMIZER}}}", replace(load.setting, state_bytes=state_bytes))


def _with(load: MicroBatchMemory, keys: str, setting: TrainingSetup) -> Suggestion:
    return Suggestion(keys, replace(load, setting=setting))
