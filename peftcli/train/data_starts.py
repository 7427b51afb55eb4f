"""LoRA that begins as the directions in which the inputs of each layer vary (EVA)."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer, initialize_lora_eva_weights
from torch import Tensor

from peftcli.errors import DataError, RecipeError
from peftcli.model.scoring import pad_right

MOST_ROWS = 2048
LEAST_ROWS = 8
"""Rows of a batch; it goes on until the directions stand still."""
MOST_BATCHES = 4096
"""After which they will never stand still; some tens are usual."""


def begin_from_data(model: PeftModel, rows: Sequence[list[int]], pad_id: int, *, pooled: bool = False) -> None:
    """Begin as the principal directions of each layer's inputs, and give more rank to layers that need it.

    Args:
        rows: token ids of training rows.
        pad_id: token id that fills short rows.
        pooled: some layers read one vector a row and not one a token, as those behind an encoder's pooler do.

    Raises:
        RecipeError: a layer has fewer inputs than directions are looked for, or the directions never stand still.
        DataError: the rows are fewer than the directions.

    Source: Paischer et al. 2024, arXiv:2410.07170.
    """
    rho = model.peft_config["default"].eva_config.rho
    layers = [one for one in model.modules() if isinstance(one, LoraLayer) and "default" in one.r]
    components = max(round(layer.r["default"] * rho) for layer in layers)
    narrowest = min(int(layer.in_features) for layer in layers)
    if components > narrowest:
        raise RecipeError(
            f"adapter.init_lora_weights eva looks for {components} directions (r times {rho:g}, the rho of "
            f"adapter.eva_config) among the {narrowest} inputs of a layer; lower adapter.r"
        )
    device = next(model.parameters()).device
    batches = []
    for some in _shared_out(rows, components, pooled=pooled):
        ids, _, mask = pad_right(list(some), list(some), pad_id)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    seen = 0

    def forward(given: Any, inputs: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > MOST_BATCHES:
            raise RecipeError(
                f"adapter.init_lora_weights eva: the directions still turn after {MOST_BATCHES} batches; lower "
                "adapter.r, or the tau of adapter.eva_config"
            )
        given(**inputs)

    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=forward,
        prepare_layer_inputs_fn=_inputs,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _shared_out(rows: Sequence[list[int]], components: int, *, pooled: bool) -> list[Sequence[list[int]]]:
    """Batches with an input for each direction: PEFT leaves out smaller ones, and waits for ever where all are.

    Raises:
        DataError: there are fewer inputs than directions.
    """
    found: list[Sequence[list[int]]] = []
    begin = inputs = 0
    for end, row in enumerate(rows, start=1):
        inputs += 1 if pooled else len(row)
        if inputs >= components and end - begin >= min(LEAST_ROWS, len(rows)):
            found.append(rows[begin:end])
            begin, inputs = end, 0
    if not found:
        have = f"{inputs} {'rows' if pooled else 'tokens'} of training"
        raise DataError(
            f"adapter.init_lora_weights eva looks for {components} directions in {have}; lower adapter.r, or leave it "
            "out"
        )
    return found


def _inputs(given: Any, places: Tensor, _: str) -> Tensor:
    """(tokens or rows, width), what a layer reads, filling left out."""
    found: Tensor = given[0] if isinstance(given, tuple | list) else given
    return (found[tuple(places.T)] if found.dim() > 2 else found).contiguous()
