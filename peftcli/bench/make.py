"""The model that is measured, made by seed into the cache; and what this machine is."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from peftcli.bench.job import ALPHA, RANK
from peftcli.bench.regimes import END, SPECIAL
from peftcli.bench.shapes import BenchShape, choose_shape
from peftcli.cache import built_once, cache_root
from peftcli.errors import MachineError
from peftcli.model.hardware import describe_environment, probe_machine
from peftcli.model.inspect import read_shape
from peftcli.plan.gpus import gpu_of
from peftcli.plan.memory.estimate import NF4_BITS
from peftcli.plan.memory.forecast import match_linears
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.memory.step_time import token_flops
from peftcli.plan.memory.training_setup import FULL_LOGITS_HEAD, TrainingSetup
from peftcli.typed_json import dump

VERSION = 1
"""Raised with every change that changes the files."""


def make(given: dict[str, Any]) -> dict[str, Any]:
    """Make the model of a shape, at first use.

    Args:
        given: `shape` as asked for and `bits`.

    Returns:
        `folder`, `shape`, `device`, the machine under `environment` and `flash`, and the work of a token under `flops`.

    Raises:
        MachineError: the disk has no room for the model.
    """
    machine = probe_machine()
    shape = choose_shape(given["shape"], given["bits"], machine)
    config = AutoConfig.for_model(shape.family, **shape.widths, pad_token_id=0, bos_token_id=1, eos_token_id=END)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    folder = built_once(cache_root(None), f"bench-{shape.key}-{VERSION}", _builder(shape, config, empty))
    read = read_shape(empty, config)
    card = gpu_of(machine)
    environment = dump(describe_environment(machine, "bench"))
    del environment["command"]
    return {
        "folder": str(folder),
        "shape": shape.key,
        "device": machine.device,
        "flash": "flash_attention_2" in machine.flash_attention,
        "environment": environment,
        "parameters": int(empty.num_parameters()),
        "peak_flops": None if card is None else card.tflops * 1e12,
        "flops": None if read is None else flops(read, given["bits"]),
    }


def flops(shape: ModelDimensions, bits: int) -> dict[str, float]:
    """The work of a token: `token`, and `attended` for each token it sees; `again...` is what checkpointing adds.

    Source: `peftcli.plan.memory.step_time`; the logits and the forward pass count once, however often they are made.
    """
    targets = match_linears({linear.leaf: linear.count for linear in shape.linears}, shape)
    trainable = sum(RANK * (linear.inputs + linear.outputs) * linear.count for linear in targets)
    setting = TrainingSetup(
        on_gpu=False,
        base_bytes=2,
        weight_bits=NF4_BITS[True] if bits == 4 else None,
        autocast=True,
        state_bytes=8,
        targets=targets,
        r=RANK,
        trainable=trainable,
        head=FULL_LOGITS_HEAD,
    )
    twice = replace(setting, checkpointing=1.0)
    none, one = (token_flops(shape, setting, seen) for seen in (0.0, 1.0))
    again, again_one = (token_flops(shape, twice, seen) for seen in (0.0, 1.0))
    return {
        "token": none,
        "attended": one - none,
        "again": again - none,
        "again_attended": again_one - again - one + none,
    }


def _builder(shape: BenchShape, config: Any, empty: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        dtype = getattr(torch, shape.dtype)
        needed = int(empty.num_parameters() * dtype.itemsize * 1.1)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise MachineError(
                f"the model of --shape {shape.key} takes {needed / 2**30:.1f} GiB and the cache has "
                f"{free / 2**30:.1f} GiB free; take a smaller --shape, or name a folder in PEFTCLI_CACHE"
            )
        torch.manual_seed(0)
        config.dtype = dtype
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        make_tokenizer(int(shape.widths["vocab_size"]), int(shape.widths["max_position_embeddings"])).save_pretrained(
            folder
        )
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, adapter).save_pretrained(folder / "adapter")

    return build


def make_tokenizer(vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """One word, one token: whatever tokenizes the rows gets the ids that they were drawn as."""
    words = [*SPECIAL, *(f"w{number}" for number in range(vocabulary - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
