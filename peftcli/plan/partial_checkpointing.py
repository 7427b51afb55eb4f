"""Activation checkpointing for as few blocks as the memory requires."""

from dataclasses import replace

from peftcli.methods.registry import METHODS
from peftcli.plan.choices import CHECKPOINTING
from peftcli.plan.machine import Machine
from peftcli.plan.memory.forecast import micro_batch_memory, rows_of
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.plan import Decision, Plan

USED = 0.85
"""Share of a card that the forecast may fill: what it does not foresee, and evaluation, need the rest."""


def choose_checkpointed_layers(plan: Plan, shape: ModelDimensions | None, machine: Machine, asked: object) -> Plan:
    """The plan with as few checkpointed blocks as its card has room for.

    A block that keeps its activations need not run again in the backward pass, which is a quarter of the work of a
    step; the loss is the same either way. The rows are taken to be as long as the recipe allows.

    Args:
        shape: of the model; without it nothing is changed.
        asked: what the recipe says of activation checkpointing; only where it says nothing there is a choice.
    """
    if asked is not None or shape is None or not plan.trainer.get("activation_checkpointing"):
        return plan
    if machine.device != "cuda" or plan.base.device != "cuda" or not METHODS[plan.adapter.method].is_lora:
        return plan
    load = micro_batch_memory(plan, shape, machine, rows_of(plan, None))
    room = USED * machine.memory_bytes
    for blocks in range(shape.layers + 1):
        setting = replace(load.setting, checkpointing=blocks / shape.layers)
        if replace(load, setting=setting).total <= room:
            return _with_blocks(plan, blocks, shape.layers, machine)
    return plan


def _with_blocks(plan: Plan, blocks: int, layers: int, machine: Machine) -> Plan:
    if blocks == layers:
        return plan
    value, reason = f"{blocks} of {layers} blocks", f"the others fit into {machine.name} as they are, run once"
    if blocks == 0:
        value, reason = "off", f"all {layers} blocks fit into {machine.name}, so none runs twice"
    decision = Decision(CHECKPOINTING, value, reason)
    return replace(
        plan,
        trainer={**plan.trainer, "activation_checkpointing": blocks > 0},
        checkpointed_blocks=blocks or None,
        decisions=tuple(decision if old.key == CHECKPOINTING else old for old in plan.decisions),
    )
