"""Loads tokenizers, image processors, base models and adapters in the same way for every command.

The adapters of earlier stages are merged into a base when it is loaded.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from peft import PeftModel, PeftType
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.chat_template_utils import render_jinja_template

from peftcli.adapters.quantized import dequantized_weight, hide_quantization_flag, is_quantized_layer
from peftcli.adapters.register import register
from peftcli.data.image_processor import ImageProcessor, need_pillow
from peftcli.data.template_settings import settle
from peftcli.errors import MachineError, RecipeError
from peftcli.model.adapter_weights import WEIGHTS, explain_unfit, hash_files, refuse_unfit
from peftcli.model.distributed import disable_accelerate_fsdp
from peftcli.model.files import weights_damage
from peftcli.model.heads import auto_class, load_with_head, unquantized_modules
from peftcli.model.hub import explain_missing, look_for_network
from peftcli.model.new_tokens import extend_embeddings, extend_tokenizer, ids_of
from peftcli.model.padding_free import use_fused_attention
from peftcli.model.quantized_files import dequantizing
from peftcli.nearest import nearest
from peftcli.plan.plan import Base, TokenizerChoice
from peftcli.tasks.registry import TASKS

FAST_CPU_PATH = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' Linear4bit."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PREFIX = "base_model.model."
"""Prefix that PEFT adds to the names of the base."""


def load_tokenizer(choice: TokenizerChoice, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, with the recipe's chat template and EOS token, and a pad token.

    Args:
        choice: of the plan.
        path: a folder to load from instead, such as an adapter's, which contains its template and EOS token.

    Raises:
        MachineError: there is none, or the chat template file cannot be read.
        RecipeError: the tokenizer has no such EOS token.
    """
    look_for_network(path or choice.path)
    if choice.images:
        return load_image_processor(path or choice.path, choice, revision=None if path else choice.revision)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path or choice.path,
            revision=None if path else choice.revision,
            trust_remote_code=choice.trust_remote_code,
        )
    except (OSError, ValueError) as problem:
        raise MachineError(explain_missing(path or choice.path, problem)) from problem
    except Exception as problem:
        if type(problem) is not Exception:  # the tokenizers library raises this for a damaged tokenizer.json
            raise
        raise MachineError(f"{path or choice.path}: its tokenizer.json is damaged ({problem}); restore it") from problem
    if choice.chat_template is not None and path is None:
        try:
            tokenizer.chat_template = Path(choice.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise MachineError(f"model.chat_template {choice.chat_template}: cannot be read: {problem}") from problem
        _check_syntax(tokenizer.chat_template, choice.chat_template)
    if choice.add_tokens and path is None:
        extend_tokenizer(tokenizer, choice.add_tokens)
    if path is None or choice.template:
        tokenizer.chat_template = _settled(tokenizer.chat_template, choice)
    if choice.eos_token is not None and path is None:
        _set_end(tokenizer, choice.eos_token)
    if tokenizer.pad_token is None:
        # Labels are masked by length and never by token, so an EOS token used for padding is still trained.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _settled(template: Any, choice: TokenizerChoice) -> Any:
    """The chat template with the settings of the recipe written into it."""
    if template is None and choice.template:
        raise RecipeError(
            "model.template, dataset.thinking and dataset.system are settings of the chat template, but the tokenizer "
            "has none; set model.chat_template to a Jinja file, or remove them"
        )
    try:
        return settle(template, choice.template or {}, choice.chat_template)
    except TemplateSyntaxError:  # of the tokenizer's own template; rows that need it are rejected when they are read
        return template


def _check_syntax(template: str, file: str) -> None:
    """Compile a chat template, so that its error is reported once and not for each row."""
    try:
        render_jinja_template(conversations=[], chat_template=template)
    except TemplateSyntaxError as problem:
        raise RecipeError(
            f"{file}:{problem.lineno}: the chat template is not valid Jinja: {problem.message}; fix it there"
        ) from problem


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


def load_base(
    base: Base, *, quantized: bool = True, shards: int = 1, max_memory: Mapping[int | str, int] | None = None
) -> PreTrainedModel:
    """Load the weights of a base model onto its device.

    Args:
        base: of the plan.
        quantized: False loads the weights unquantized even if the plan quantizes.
        shards: number of processes across which the weights are sharded; 1 for no sharding.
        max_memory: bytes of weights per GPU, and in RAM under `cpu`, for a model that does not fit on one device; None
            for whole weights on the device of the base.

    Raises:
        MachineError: the weights are not available, or this machine cannot load them.
    """
    disable_accelerate_fsdp()
    use_fused_attention(local_device(base.device))
    register()  # one of our own adapters may be merged or loaded
    arguments: dict[str, Any] = {
        "dtype": DTYPES[base.dtype],
        "attn_implementation": base.attention,
        "revision": base.revision,
        "trust_remote_code": base.trust_remote_code,
        "use_safetensors": True,
        "device_map": {"": local_device(base.device)},
    }
    if max_memory is not None:
        arguments |= {"device_map": "auto", "max_memory": dict(max_memory)}
    if quantized and base.quantization is not None:
        arguments["quantization_config"] = quantization_config(base)
    look_for_network(base.path)
    try:
        if base.quantization is None:
            trust = base.trust_remote_code
            config = AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=trust)
            arguments |= dequantizing(config)
        model = _load(base, arguments, shards)
    except ImportError as problem:
        raise MachineError(f"{base.name}: a package is missing: {' '.join(str(problem).split())[:300]}") from problem
    except (OSError, ValueError) as problem:
        raise MachineError(explain_missing(base.path, problem)) from problem
    except SafetensorError as problem:
        raise MachineError(
            weights_damage(Path(base.path)) or f"{base.path}: its weights cannot be read: {problem}"
        ) from problem
    except RuntimeError as problem:
        if not re.search("size mismatch|SafetensorError|corrupt", str(problem)):
            raise
        raise MachineError(f"{base.path}: the weights do not match the configuration: {problem}") from problem
    if base.add_tokens:
        extend_embeddings(model, ids_of(load_tokenizer(base.tokenizer), base.add_tokens))
    keep_gradients_of_4bit(model)
    if eight_bit(base):
        # It imports bitsandbytes, which takes seconds on a CUDA machine.
        from peftcli.model.int8_linear import compute_in_float

        compute_in_float(model)
    if TASKS[base.task].labels_texts:
        # A decoder classifies by the last token that is not padding, so its configuration must have the pad token.
        model.config.get_text_config().pad_token_id = load_tokenizer(base.tokenizer).pad_token_id or 0
    return merge_previous_stages(model, base.absorbed)


def _load(base: Base, arguments: dict[str, Any], shards: int) -> PreTrainedModel:
    if shards > 1:
        # It imports bitsandbytes, which takes seconds on a CUDA machine.
        from peftcli.model.fsdp import load_sharded

        return load_sharded(base.path, arguments, shards)
    if not TASKS[base.task].generates:
        return load_with_head(base, arguments)
    model: PreTrainedModel = auto_class(base.task).from_pretrained(base.path, **arguments)
    return model


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load a saved adapter onto its base, for inference.

    Args:
        folder: of an adapter whose files were checked.

    Raises:
        MachineError: it does not fit the base, or only partly.
    """
    place = str(folder)
    device = str(model.device)
    try:
        tuned = PeftModel.from_pretrained(model, place, torch_device=device)
        renamed = getattr(model, "_checkpoint_conversion_mapping", {})
        fit = _fit(tuned, place, device, renamed)
    except (RuntimeError, ValueError, KeyError) as problem:
        raise MachineError(explain_unfit(folder, problem)) from problem
    # PEFT passes the vectors of a prompt to its encoder itself, under another name.
    taken = {"prompt_embeddings"} if tuned.active_peft_config.is_prompt_learning else set()
    unexpected = [name for name in fit.unexpected_keys if name not in taken]
    refuse_unfit(folder, _unfilled(tuned, fit.missing_keys), unexpected)
    return tuned


def _fit(tuned: PeftModel, place: str, device: str, renamed: Any) -> Any:
    """Load the adapter a second time for PEFT's report: the first load only warns about missing weights."""
    config = tuned.active_peft_config
    cut = config.peft_type == PeftType.ADALORA
    pattern = config.rank_pattern if cut else None
    if cut:
        config.rank_pattern = None  # the first load has already reduced the ranks
    fit = tuned.load_adapter(place, "default", torch_device=device, key_mapping=renamed)
    if cut:
        config.rank_pattern = pattern
    return fit


def _unfilled(model: PeftModel, missing: list[str]) -> list[str]:
    """The missing names without an alias in the file: shared weights are stored once."""
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
    """Keep 4-bit layers on the path with gradients, also after an evaluation.

    On a CPU with AVX512_BF16, bitsandbytes 0.50 repacks the weights of a layer in its first evaluation; the repacked
    matmul has no gradient and training does not undo it, so all later gradients would be wrong with a normal loss.
    """
    for module in model.modules():
        if hasattr(module, FAST_CPU_PATH):
            setattr(module, FAST_CPU_PATH, False)


def local_device(device: str) -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    if device != "cuda":
        return torch.device("cpu")
    import os

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def input_device(model: torch.nn.Module) -> torch.device:
    """The device on which a model takes its inputs; layers that wait in RAM have no weights between their turns."""
    return next(weight.device for weight in model.parameters() if weight.device.type != "meta")


def merge_previous_stages(model: PreTrainedModel, folders: Sequence[str]) -> PreTrainedModel:
    """Merge adapters into a base, one after the other.

    A quantized layer that an adapter changes is converted to floats: quantizing it again would change the result.

    Args:
        model: the loaded base; its weights are changed.
        folders: of the adapters, in training order.

    Raises:
        MachineError: one cannot be merged.
    """
    for folder in folders:
        try:
            unpack_layers(model, changed_layers(model, Path(folder)))
            with hide_quantization_flag(model):
                wrapped = PeftModel.from_pretrained(model, folder, torch_device=str(model.device))
                model = wrapped.merge_and_unload(safe_merge=True)
        except (OSError, RuntimeError, ValueError, KeyError) as problem:
            raise MachineError(explain_unfit(Path(folder), problem)) from problem
    if folders:
        model.requires_grad_(False)
    return model


def base_hash(base: str | None, folders: Sequence[str]) -> str | None:
    """A hash of a base together with the adapters merged into it.

    Args:
        base: hash of its own weights.
    """
    if not folders:
        return base
    parts = [str(base), *(hash_files(Path(folder))[WEIGHTS] for folder in folders)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def changed_layers(model: torch.nn.Module, folder: Path) -> list[str]:
    """Names of the quantized layers that an adapter has weights for."""
    with safe_open(str(folder / WEIGHTS), framework="pt") as stream:
        keys = [key.removeprefix(PREFIX) for key in stream.keys()]  # noqa: SIM118  # not a mapping, despite the name
    return [
        name
        for name, module in model.named_modules()
        if is_quantized_layer(module) and any(key.startswith(f"{name}.") for key in keys)
    ]


def unpack_layers(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Replace quantized layers by linear layers with the dequantized weights."""
    for name in names:
        packed: Any = model.get_submodule(name)
        weight = dequantized_weight(packed)
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight.to(_dtype_of(packed, model)), requires_grad=False)
        if packed.bias is not None:
            plain.bias = torch.nn.Parameter(packed.bias.data, requires_grad=False)
        model.set_submodule(name, plain)


def _dtype_of(packed: Any, model: torch.nn.Module) -> torch.dtype:
    """The compute dtype of a quantized layer: that of 4-bit matmuls, or that of the model."""
    if getattr(packed, "compute_dtype", None) is not None:
        asked: torch.dtype = packed.compute_dtype
        return asked
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point())


def load_image_processor(path: str, choice: TokenizerChoice, *, revision: str | None) -> ImageProcessor:
    """Load the image processor of a folder or Hub id, in its Pillow version, which is the same on every machine.

    Raises:
        MachineError: there is none, or Pillow is not installed.
    """
    need_pillow()
    try:
        processor = AutoImageProcessor.from_pretrained(
            path, revision=revision, trust_remote_code=choice.trust_remote_code, backend="pil"
        )
    except (OSError, ValueError, ImportError) as problem:
        if "preprocessor_config" not in str(problem) and not isinstance(problem, ImportError):
            raise MachineError(explain_missing(path, problem)) from problem
        raise MachineError(
            f"{path}: has no supported image processor (preprocessor_config.json): "
            f"{' '.join(str(problem).split())[:200]}; set model.name to a model with one"
        ) from problem
    return ImageProcessor(processor)
