"""Activation memory: the bytes that autograd saves for the backward pass, tensor by tensor.

Each term is a tensor that one operation of the forward pass saves. They were counted with
`torch.autograd.graph.saved_tensors_hooks` on models of eleven families (transformers 5.23, peft 0.21, torch 2.13);
`tests/unit/plan/memory/test_forecast.py` compares them with that count. Terms that differ on a GPU are from the
source named there.
"""

from dataclasses import replace

from peftcli.plan.memory.model_shape import Linear, ModelDimensions, Norm
from peftcli.plan.memory.training_setup import ActivationFit, TrainingSetup

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers that read the same tensor, which is saved once unless one of them copies it."""
ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Layers that may read what attention saves anyway."""


def saved_activation_bytes(shape: ModelDimensions, setting: TrainingSetup, tokens: int, longest: int) -> float:
    """Bytes that all blocks save for one micro-batch without checkpointing.

    Args:
        tokens: of the micro-batch, padding included.
        longest: tokens of its longest row; masked attention grows with it.
    """
    a_token = (
        sum(norm_bytes(norm, setting) * norm.count for norm in shape.norms)
        + attention_bytes(shape, setting, longest) * shape.layers
        + setting.width * shape.mlp * shape.mlp_kept * shape.mlp_layers
        + adapter_bytes(shape, setting)
        + expert_bytes(shape, setting)
    )
    whole = a_token * tokens + fitted_bytes(setting) + expert_copies(shape, setting)
    return whole * (1 - setting.first_block / shape.layers)


def end_bytes(shape: ModelDimensions, setting: TrainingSetup, tokens: int) -> float:
    """Bytes saved by the final norm and the output layer."""
    return (norm_bytes(shape.final_norm, setting) + setting.base_bytes * shape.hidden) * tokens


def stream_bytes(shape: ModelDimensions, setting: TrainingSetup, tokens: int) -> float:
    """Bytes of the inputs of all blocks, which is what checkpointing saves."""
    return float(setting.base_bytes * shape.hidden * shape.layers * tokens)


def norm_bytes(norm: Norm, setting: TrainingSetup) -> int:
    """Bytes per token that a norm saves: its input, in float32 if it computes so, and one or two statistics.

    On a GPU, autocast runs LayerNorm in float32 on a copy; on a CPU it does not. The fused RMSNorm saves
    its input unchanged, whether its weight is trained or not.

    Source: the list of operations that autocast to float32, https://docs.pytorch.org/docs/stable/amp.html;
    `_fused_rms_norm` in torchgen/packaged/autograd/derivatives.yaml, torch 2.13.
    """
    if norm.fusible and setting.norms_fused:
        return setting.base_bytes * norm.width + 4
    # The gradient of trained norm weights needs the normalized input.
    own = setting.width * norm.width if setting.norms_trained else 0
    if norm.in_float32:
        return 4 * norm.width + 4 + own
    return own + (4 if setting.autocast and setting.on_gpu else setting.base_bytes) * norm.width + 4


def attention_bytes(shape: ModelDimensions, setting: TrainingSetup, longest: int) -> float:
    """Bytes per token that attention saves in one block.

    `flash` saves queries, keys, values, the output and one float32 per head; `repeated` is `flash` with keys and values
    repeated for all query heads; `masked` saves the repeated keys and values and the token's row of the mask; `math`
    saves everything in float32 with the probabilities; `eager` saves probabilities in float32 and in the compute dtype.
    """
    width, wide = setting.width, 4 * shape.queries
    own = 2 * shape.queries + 2 * shape.keys
    # A value that is a view keeps the whole output of the fused QKV layer alive.
    view = shape.queries + shape.keys if shape.fused_qkv and shape.rotary else 0
    sums = 4 * shape.heads
    if setting.attention == "flash":
        return (width * (own + view) + sums) * setting.filling
    if setting.attention == "repeated":
        return (width * (wide + view) + sums) * setting.filling
    if setting.attention == "math":
        return 4 * 3 * shape.queries + width * shape.queries + 4 * shape.heads * longest
    if setting.attention == "eager":
        return width * wide + (4 + width) * shape.heads * longest
    return width * ((wide if shape.grouped else own + view) + longest) + sums


def adapter_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes per token that all adapters save: their inputs, the outputs of A, and what dropout and DoRA add."""
    if setting.activation_fit:
        return _fitted_token_bytes(shape, setting)
    inputs = sum(_own_input(linear, setting) * linear.count for linear in setting.targets)
    if not setting.casts_inputs and not setting.dropout:
        inputs -= _saved_by_sharing(shape, setting)
    inner = sum(setting.width * setting.r * linear.count for linear in setting.targets)
    outputs = (
        sum(2 * setting.width * linear.outputs * linear.count for linear in setting.targets) if setting.dora else 0
    )
    return inputs + inner + outputs


def fitted_bytes(setting: TrainingSetup) -> float:
    """Bytes per layer, independent of the tokens, that adapters of methods other than LoRA save."""
    return sum(
        linear.count * _fit_of(linear, setting).layer_bytes(linear.inputs, linear.outputs)
        for linear in (setting.targets if setting.activation_fit else ())
    )


def _fitted_token_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    found, reading = 0.0, []
    for linear in setting.targets:
        fit = _fit_of(linear, setting)
        found += linear.count * fit.token_bytes(linear.inputs, linear.outputs)
        if fit.reads_input:
            found += linear.count * setting.width * linear.inputs
            reading.append(linear)
    return found - _saved_by_sharing(shape, replace(setting, targets=tuple(reading)))


def _fit_of(linear: Linear, setting: TrainingSetup) -> ActivationFit:
    return setting.activation_fit.get(linear.leaf) or setting.activation_fit[""]


def _own_input(linear: Linear, setting: TrainingSetup) -> int:
    """Bytes per token of an adapter's input: a separate copy if PEFT casts it, and the dropout mask.

    Dropout saves one byte per element on a GPU, and the scaled mask itself on a CPU.

    Source: `native_dropout` and `dropout` in aten/src/ATen/native/Dropout.cpp.
    """
    narrow = setting.width if setting.autocast else max(setting.adapter_bytes, setting.width)
    if not setting.dropout:
        return narrow * linear.inputs
    cast = setting.adapter_bytes if setting.casts_inputs else narrow
    return (narrow + (1 if setting.on_gpu else cast)) * linear.inputs


def _saved_by_sharing(shape: ModelDimensions, setting: TrainingSetup) -> int:
    """Bytes per token that adapters do not save, because another layer saves the same tensor."""
    # Norm weights trained in float32 upcast the output, which autocast then casts separately for each layer.
    apart = setting.norms_trained and setting.autocast and setting.adapter_bytes > setting.width
    groups = [[] if apart else list(group) for group in SHARED_INPUTS]
    if shape.parallel:
        groups[0] += ["fc1", "c_fc", "dense_h_to_4h"]
    saved = 0
    for group in groups:
        members = [linear for linear in setting.targets if linear.leaf in group]
        saved += sum(linear.inputs * linear.count for linear in members[1:])
    if setting.attention in ("flash", "masked") and setting.filling == 1.0:
        outputs = [linear for linear in setting.targets if linear.leaf in ATTENTION_OUTPUTS]
        saved += sum(linear.inputs * linear.count for linear in outputs if "att" in linear.name)
    return setting.width * saved


def expert_bytes(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes per token that the experts save: both factors of the gate, the activation, the input and the output."""
    experts = shape.experts
    if experts is None:
        return 0.0
    inner = 4 if setting.expert_adapters else 3
    outer = 2 if setting.expert_adapters else 1
    each = inner * experts.mlp + outer * shape.hidden
    return setting.width * experts.layers * (experts.per_token * each + shape.hidden)


def expert_copies(shape: ModelDimensions, setting: TrainingSetup) -> float:
    """Bytes of the expert weights with their adapters added, which PEFT creates in each forward pass."""
    if shape.experts is None or not setting.expert_adapters:
        return 0.0
    return float(setting.width * shape.experts.parameters)


def backward_bytes(shape: ModelDimensions, setting: TrainingSetup, tokens: int) -> float:
    """Bytes of gradients that exist at once in the backward pass of a block: two of the inner width, one outer.

    PEFT's cast makes them float32. Measured with torch's profiler on five families: within 5 %.
    """
    experts = shape.experts
    inner = max(shape.mlp, 0 if experts is None else experts.mlp * experts.per_token)
    width = 4 if setting.casts_inputs else setting.width
    return float(width * (2 * inner + shape.hidden) * tokens)
