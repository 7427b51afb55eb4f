"""Tokenizers, base models and adapters, loaded in one way for every verb."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftcli.adapters.register import register
from peftcli.errors import MachineError, RecipeError
from peftcli.model.absorb import absorb
from peftcli.model.heads import AUTO_CLASSES, load_with_head, unquantized_modules
from peftcli.model.hub import explain_missing, look_for_network
from peftcli.model.images import load_image_reader
from peftcli.model.shards import leave_dividing_to_the_plan
from peftcli.model.tensors import explain_unfit, refuse_unfit
from peftcli.nearest import nearest
from peftcli.plan.plan import Base, TokenizerChoice
from peftcli.recipe.rules import CAUSAL, SEQUENCE

FAST_CPU_PATH = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' Linear4bit."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(choice: TokenizerChoice, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, with the recipe's chat template and end token, and a pad token.

    Args:
        choice: of the plan.
        path: a folder to load from instead, such as an adapter's, which has its template and end token.

    Raises:
        MachineError: there is none, or the chat template file cannot be read.
        RecipeError: the tokenizer has no such end token.
    """
    look_for_network(path or choice.path)
    if choice.images:
        return load_image_reader(path or choice.path, choice, revision=None if path else choice.revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path or choice.path,
            revision=None if path else choice.revision,
            trust_remote_code=choice.trust_remote_code,
        )
    except (OSError, ValueError) as problem:
        raise MachineError(explain_missing(path or choice.path, problem)) from problem
    except Exception as problem:
        if type(problem) is not Exception:  # what the tokenizers library raises for a damaged tokenizer.json
            raise
        raise MachineError(f"{path or choice.path}: its tokenizer.json is damaged ({problem}); restore it") from problem
    if choice.chat_template is not None and path is None:
        try:
            tokenizer.chat_template = Path(choice.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise MachineError(f"model.chat_template {choice.chat_template}: cannot be read: {problem}") from problem
    if choice.eos_token is not None and path is None:
        _set_end(tokenizer, choice.eos_token)
    if tokenizer.pad_token is None:
        # Labels are masked by length and never by token, so an end token that pads is still trained.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _set_end(tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    known = tokenizer.get_vocab()
    if end not in known:
        near = nearest(end, [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
        raise RecipeError(
            f"model.eos_token = {end}: the tokenizer has no such token"
            + (f"; did you mean {near}?" if near else f"; its special tokens are {_listed(tokenizer)}")
        )
    tokenizer.eos_token = end


def _listed(tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(tokenizer.all_special_tokens[:12]) or "none"


def load_base(base: Base, *, quantized: bool = True, shards: int = 1) -> PreTrainedModel:
    """Load the weights of a base model onto its device.

    Args:
        base: of the plan.
        quantized: False loads the weights as they are even where the plan quantizes.
        shards: processes that each hold a part of the weights, all of this launch; 1 for whole weights.

    Raises:
        MachineError: the weights cannot be had, or this machine cannot load them.
    """
    leave_dividing_to_the_plan()
    register()  # an adapter of ours may be folded into it, or loaded on it
    arguments: dict[str, Any] = {
        "dtype": DTYPES[base.dtype],
        "attn_implementation": base.attention,
        "revision": base.revision,
        "trust_remote_code": base.trust_remote_code,
        "use_safetensors": True,
        "device_map": {"": local_device(base.device)},
    }
    if quantized and base.quantization is not None:
        arguments["quantization_config"] = quantization_config(base)
    look_for_network(base.path)
    try:
        model = _load(base, arguments, shards)
    except ImportError as problem:
        raise MachineError(f"{base.name}: a package is missing: {' '.join(str(problem).split())[:300]}") from problem
    except (OSError, ValueError) as problem:
        raise MachineError(explain_missing(base.path, problem)) from problem
    except RuntimeError as problem:
        if not re.search("size mismatch|SafetensorError|corrupt", str(problem)):
            raise
        raise MachineError(f"{base.path}: the weights do not fit the configuration: {problem}") from problem
    keep_gradients_of_4bit(model)
    if eight_bit(base):
        # It brings bitsandbytes, whose import takes seconds on a CUDA machine.
        from peftcli.model.eight_bit import compute_in_floats

        compute_in_floats(model)
    if base.task == SEQUENCE:
        # The last token that is no padding decides for a decoder, which its configuration must know.
        model.config.get_text_config().pad_token_id = load_tokenizer(base.tokenizer).pad_token_id or 0
    return absorb(model, base.absorbed)


def _load(base: Base, arguments: dict[str, Any], shards: int) -> PreTrainedModel:
    if shards > 1:
        # It brings bitsandbytes, whose import takes seconds on a CUDA machine.
        from peftcli.model.divided import load_divided

        return load_divided(base.path, arguments, shards)
    if base.task != CAUSAL:
        return load_with_head(base, arguments)
    model: PreTrainedModel = AUTO_CLASSES[CAUSAL].from_pretrained(base.path, **arguments)
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter onto its base, for inference.

    Args:
        folder: of an adapter whose files were checked.

    Raises:
        MachineError: it does not fit the base, or only a part of it does.
    """
    place = str(folder)
    device = str(model.device)
    try:
        tuned = PeftModel.from_pretrained(model, place, torch_device=device)
        renamed = getattr(model, "_checkpoint_conversion_mapping", {})
        fit = _fit(tuned, place, device, renamed)
    except (RuntimeError, ValueError, KeyError) as problem:
        raise MachineError(explain_unfit(folder, problem)) from problem
    # PEFT hands the vectors of a prompt to its encoder by itself, under another name.
    taken = {"prompt_embeddings"} if tuned.active_peft_config.is_prompt_learning else set()
    unexpected = [name for name in fit.unexpected_keys if name not in taken]
    refuse_unfit(folder, _unfilled(tuned, fit.missing_keys), unexpected)
    return tuned


def _fit(tuned: PeftModel, place: str, device: str, renamed: Any) -> Any:
    """Read the adapter a second time for what PEFT says: the first only warns of weights that are missing."""
    config = tuned.active_peft_config
    cut = config.peft_type == PeftType.ADALORA
    pattern = config.rank_pattern if cut else None
    if cut:
        config.rank_pattern = None  # the first reading has cut the ranks already
    fit = tuned.load_adapter(place, "default", torch_device=device, key_mapping=renamed)
    if cut:
        config.rank_pattern = pattern
    return fit


def _unfilled(model: PeftModel, missing: list[str]) -> list[str]:
    """The names among the missing ones that no other name stands for: what layers share is stored once."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    return [name for name in missing if id(tensors.get(name)) not in filled]


def quantization_config(base: Base) -> BitsAndBytesConfig:
    """The 4-bit or 8-bit configuration of a plan."""
    assert base.quantization is not None
    if eight_bit(base):
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantized_modules(base))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantization["type"],
        bnb_4bit_use_double_quant=base.quantization["double_quant"],
        bnb_4bit_compute_dtype=DTYPES[base.quantization["compute_dtype"]],
        llm_int8_skip_modules=unquantized_modules(base),
    )


def eight_bit(base: Base) -> bool:
    """Whether the linear layers of a base are stored in 8 bits."""
    return base.quantization is not None and base.quantization["bits"] == 8


def keep_gradients_of_4bit(model: torch.nn.Module) -> None:
    """Keep 4-bit layers on the path that has gradients, also after an evaluation.

    On a CPU with AVX512_BF16, bitsandbytes 0.50 packs the weights of a layer anew in its first evaluation; the packed
    product has no gradient and training does not unpack, so every later gradient is wrong and the loss looks normal.
    """
    for module in model.modules():
        if hasattr(module, FAST_CPU_PATH):
            setattr(module, FAST_CPU_PATH, False)


def local_device(device: str) -> torch.device:
    """The device of this process: its own card among several, or the CPU."""
    if device != "cuda":
        return torch.device("cpu")
    import os

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
