"""The loss of every tool's adapter on the same held-out rows, by one and the same code."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peftcli.bench.regimes import IGNORED
from peftcli.bench.weights import give_weights


def judge(given: dict[str, Any]) -> dict[str, float]:
    """Measure adapters of one base.

    Args:
        given: `model`, `bits`, `device`, `dtype`, `rows` (a file of ids and labels) and `adapters`, folders by name.

    Returns:
        Nats per trained token by name.
    """
    dtype = getattr(torch, given["dtype"])
    quantization = None
    if given["bits"] == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(
        given["model"], dtype=dtype, quantization_config=quantization, device_map={"": given["device"]}
    )
    rows = [json.loads(line) for line in Path(given["rows"]).read_text(encoding="utf-8").splitlines()]
    folders = {name: Path(folder) for name, folder in given["adapters"].items()}
    model = PeftModel.from_pretrained(base, next(iter(folders.values())))
    for module in model.modules():  # the packed product of bitsandbytes on a CPU is not the one that was trained with
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    losses = {}
    for name, folder in folders.items():
        give_weights(model, folder)
        losses[name] = held_out_loss(model.eval(), rows, given["device"])
    return losses


@torch.inference_mode()
def held_out_loss(model: Any, rows: list[dict[str, list[int]]], device: str) -> float:
    """Nats per trained token over all rows, each run alone."""
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        labels = torch.tensor(row["labels"][1:], device=device)
        logits = model(input_ids=ids).logits[0, :-1]
        learned = labels != IGNORED
        total += float(torch.nn.functional.cross_entropy(logits[learned].float(), labels[learned], reduction="sum"))
        tokens += int(learned.sum())
    return total / tokens
