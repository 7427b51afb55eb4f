"""The work of the child processes: `python -m peftcli.bench.child VERB SPEC.json RESULT.json`.

`make` builds the model, `sft` trains it with plain SFTTrainer, `judge` scores adapters on the held-out rows.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peftcli.bench.workload import ALPHA, END, IGNORED, RANK, SPECIAL, BenchShape, choose_shape
from peftcli.cache import built_once, cache_root
from peftcli.errors import MachineError, PeftcliError
from peftcli.model.hardware import describe_environment, peak_memory_bytes, probe_machine, resident_bytes
from peftcli.plan.gpus import gpu_of
from peftcli.plan.memory.estimate import NF4_BITS
from peftcli.plan.memory.forecast import match_linears
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.memory.step_time import token_flops
from peftcli.plan.memory.training_setup import FULL_LOGITS_HEAD, TrainingSetup
from peftcli.typed_json import dump

VERSION = 1
"""Part of the model's cache key: raised with every change that changes its files."""


def main(words: Sequence[str]) -> None:
    """Do one piece of work and write its result."""
    verb, spec, result = words
    try:
        found = VERBS[verb](json.loads(Path(spec).read_text(encoding="utf-8")))
    except PeftcliError as problem:
        sys.stderr.write(f"error: {problem}\n")
        raise SystemExit(problem.exit_code) from None
    Path(result).write_text(json.dumps(found), encoding="utf-8")


# make: the model


def make(given: dict[str, Any]) -> dict[str, Any]:
    """Make the model of a shape at first use, and describe this machine.

    Args:
        given: `shape` as requested and `bits`.

    Returns:
        `folder`, `shape`, `device`, the machine under `environment` and `flash`, and FLOPs per token under `flops`.

    Raises:
        MachineError: the disk has no room for the model.
    """
    # Imported here: SFTTrainer's process would pay for it in time and memory.
    from peftcli.model.inspect import read_shape

    machine = probe_machine()
    shape = choose_shape(given["shape"], given["bits"], machine)
    config = AutoConfig.for_model(shape.family, **shape.sizes, pad_token_id=0, bos_token_id=1, eos_token_id=END)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    folder = built_once(cache_root(None), f"bench-{shape.key}-{VERSION}", _builder(shape, config, empty))
    dimensions = read_shape(empty, config)
    gpu = gpu_of(machine)
    environment = dump(describe_environment(machine, "bench"))
    del environment["command"]
    return {
        "folder": str(folder),
        "shape": shape.key,
        "device": machine.device,
        "flash": "flash_attention_2" in machine.flash_attention,
        "environment": environment,
        "parameters": int(empty.num_parameters()),
        "peak_flops": None if gpu is None else gpu.tflops * 1e12,
        "flops": None if dimensions is None else flops(dimensions, given["bits"]),
    }


def flops(shape: ModelDimensions, bits: int) -> dict[str, float]:
    """FLOPs of a token: `token`, and `attended` for each token it attends to; `again...` is what checkpointing adds.

    Source: `peftcli.plan.memory.step_time`; the logits and the forward pass count once, however often they are made.
    """
    targets = match_linears({linear.leaf: linear.count for linear in shape.linears}, shape)
    trainable = sum(RANK * (linear.inputs + linear.outputs) * linear.count for linear in targets)
    setup = TrainingSetup(
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
    checkpointed = replace(setup, checkpointing=1.0)
    none, one = (token_flops(shape, setup, attended) for attended in (0.0, 1.0))
    again, again_one = (token_flops(shape, checkpointed, attended) for attended in (0.0, 1.0))
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
                f"{free / 2**30:.1f} GiB free; use a smaller --shape, or set PEFTCLI_CACHE to another folder"
            )
        torch.manual_seed(0)
        config.dtype = dtype
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        tokenizer = make_tokenizer(int(shape.sizes["vocab_size"]), int(shape.sizes["max_position_embeddings"]))
        tokenizer.save_pretrained(folder)
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(model, adapter).save_pretrained(folder / "adapter")

    return build


def make_tokenizer(vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """One token per word, so that the text of a row is tokenized into the ids it was drawn as."""
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


# sft: plain SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Wall-clock time at which the loop began and each step ended."""

    def __init__(self) -> None:
        self.begun = self.ended = 0.0
        self.resident_before = 0
        self.steps: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.resident_before = resident_bytes()
        self.begun = time.time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps.append(time.time())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ended = time.time()


def sft(given: dict[str, Any]) -> dict[str, Any]:
    """Train the rows of a spec with SFTTrainer, set up as `trl sft` does it, and write the adapter.

    Args:
        given: what `Job.sft` makes.

    Returns:
        Seconds of the loop, when the first step ended, the losses, the peak memory, and what computed attention
        and loss.
    """
    # Imported here: the other verbs do not need them.
    from datasets import load_dataset
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

    settings = ModelConfig(
        use_peft=True,
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        lora_target_modules=["all-linear"],
        load_in_4bit=given["bits"] == 4,
        **given["model_settings"],
    )
    clock, run = Clock(), Path(given["run"])
    arguments = SFTConfig(
        output_dir=str(run),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        model_init_kwargs={"dtype": settings.dtype, "attn_implementation": settings.attn_implementation},
        **given["arguments"],
    )
    trainer = SFTTrainer(
        model=given["model"],
        args=arguments,
        train_dataset=load_dataset("json", data_files=given["rows"], split="train", cache_dir=str(run / "cache")),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        quantization_config=get_quantization_config(settings),
        peft_config=get_peft_config(settings),
        callbacks=[clock],
    )
    set_adapter_weights(trainer.model, Path(given["adapter"]))
    trainer.train()
    device = arguments.device.type
    peak = peak_memory_bytes(device)
    trainer.save_model(str(run / "adapter"))
    return {
        "seconds": clock.ended - clock.begun,
        "first_step_at": clock.steps[0],
        "step_seconds": [after - before for before, after in zip(clock.steps, clock.steps[1:], strict=False)],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "peak_memory_bytes": peak,
        "resident_before_bytes": clock.resident_before,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
        "recomputed": 1.0 if arguments.activation_checkpointing else 0.0,
        "attention": trainer.model.config._attn_implementation,
        "loss_head": f"TRL {arguments.loss_type}",
    }


# judge: the held-out loss


def judge(given: dict[str, Any]) -> dict[str, float]:
    """The loss of every tool's adapter on the same held-out rows, all by the same code.

    Args:
        given: `model`, `bits`, `device`, `dtype`, `rows` (a file of ids and labels) and `adapters`, folders by name.

    Returns:
        Nats per trained token by name.
    """
    # Imported here: SFTTrainer's process would pay for it in time and memory.
    from peftcli.model.load import keep_gradients_of_4bit

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
    keep_gradients_of_4bit(model)  # the packed matmul of an evaluation is not the one that was trained with
    losses = {}
    for name, folder in folders.items():
        set_adapter_weights(model, folder)
        losses[name] = held_out_loss(model.eval(), rows, given["device"])
    return losses


@torch.inference_mode()
def held_out_loss(model: Any, rows: list[dict[str, list[int]]], device: str) -> float:
    """Nats per trained token over all rows, each in a forward pass of its own."""
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        labels = torch.tensor(row["labels"][1:], device=device)
        logits = model(input_ids=ids).logits[0, :-1]
        trained = labels != IGNORED
        total += float(torch.nn.functional.cross_entropy(logits[trained].float(), labels[trained], reduction="sum"))
        tokens += int(trained.sum())
    return total / tokens


def set_adapter_weights(model: Any, folder: Path) -> None:
    """Replace the weights of a model's adapter by those of a folder in PEFT's format.

    Raises:
        ValueError: the folder holds another adapter; PEFT would silently skip what does not fit.
    """
    given = load_file(folder / "adapter_model.safetensors")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    unlike = set(own) ^ set(given)
    if unlike:
        raise ValueError(f"{folder.name}: {len(unlike)} tensors are on one side only, such as {min(unlike)}")
    set_peft_model_state_dict(model, given)


VERBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"make": make, "sft": sft, "judge": judge}

if __name__ == "__main__":
    main(sys.argv[1:])
