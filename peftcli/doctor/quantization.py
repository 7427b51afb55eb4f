"""Checks a 4-bit and an 8-bit layer on the training device: output and gradient against the dequantized weights."""

from dataclasses import dataclass, replace

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from peftcli.adapters.quantized import dequantized_weight
from peftcli.doctor.check import FAIL, OK, WARN, Check
from peftcli.model.int8_linear import compute_in_float
from peftcli.model.load import DTYPES, FAST_CPU_PATH, keep_gradients_of_4bit

INPUTS, OUTPUTS, ROWS = 256, 192, 8
MOST_ERROR = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Maximum relative error of the output of a quantized layer, compared with its dequantized weights."""
NF4_TOLERANCE = 0.2
"""Maximum relative quantization error of a normally distributed matrix in NF4; about 0.09 is usual."""

INT8_TOLERANCE = 0.02
"""Maximum relative quantization error of a normally distributed matrix in 8 bits; about 0.007 is usual."""


@dataclass(frozen=True)
class Trial:
    """The measurements of a quantized layer.

    Attributes:
        device: `cuda` or `cpu`.
        dtype: compute dtype.
        answer, product, gradient: relative errors compared with the dequantized weights: of the output for one row in
            evaluation, of the output in training after an evaluation, and of the gradient of the input.
        loss: relative quantization error of the weights.
        repacks: whether bitsandbytes would repack the weights in evaluation on this CPU, which loses the gradients;
            peftcli switches that off.
        problem: the error, empty for none.
    """

    device: str
    dtype: str
    answer: float = float("nan")
    product: float = float("nan")
    gradient: float = float("nan")
    loss: float = float("nan")
    repacks: bool = False
    problem: str = ""


def try_4bit(device: str, dtype: str) -> Trial:
    """Quantize a layer to 4 bits on a device, run it in evaluation and in training, and measure its errors.

    Args:
        dtype: compute dtype that a recipe would get on this machine.
    """
    try:
        return _measure(device, dtype)
    except Exception as problem:  # a wheel without its native library can raise anything, even AttributeError on None
        return Trial(device, dtype, problem=f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}")


def _measure(device: str, dtype: str) -> Trial:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    layer = Linear4bit(INPUTS, OUTPUTS, bias=False, compute_dtype=DTYPES[dtype], quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device)
    repacks = device == "cpu" and bool(getattr(layer, FAST_CPU_PATH, False))
    keep_gradients_of_4bit(layer)
    dequantized = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return replace(run_layer(layer, dequantized, weight, dtype), repacks=repacks)


def run_layer(layer: torch.nn.Module, dequantized: torch.Tensor, weight: torch.Tensor, dtype: str) -> Trial:
    """Run a quantized layer in evaluation and in training, and compare it with its dequantized weights.

    Args:
        dequantized: its weights, (outputs, inputs), on its device.
        weight: the original weights.
        dtype: of its inputs.
    """
    generator = torch.Generator().manual_seed(1)
    device, torch_dtype = dequantized.device, DTYPES[dtype]
    dequantized = dequantized.double()
    rows = torch.randn(ROWS, INPUTS, generator=generator).to(device, torch_dtype)
    layer.eval()
    with torch.no_grad():
        one = layer(rows[:1])
    layer.train()
    rows.requires_grad_()
    product = layer(rows)
    upstream = torch.randn(ROWS, OUTPUTS, generator=generator).to(device, torch_dtype)
    product.backward(upstream)
    assert rows.grad is not None
    exact = rows.detach().double()
    return Trial(
        device.type,
        dtype,
        answer=_relative_error(one, exact[:1] @ dequantized.T),
        product=_relative_error(product.detach(), exact @ dequantized.T),
        gradient=_relative_error(rows.grad, upstream.double() @ dequantized),
        loss=_relative_error(dequantized, weight.to(device)),
    )


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def check_4bit(trial: Trial, *, asked: bool = True) -> Check:
    """Whether 4-bit training works correctly on this machine.

    Args:
        asked: False for a recipe without 4-bit quantization, which is not affected.
    """
    return check_trial(trial, "4-bit", "NF4", NF4_TOLERANCE, asked=asked)


def check_trial(trial: Trial, name: str, what: str, most_loss: float, *, asked: bool) -> Check:
    """Whether training on quantized weights works correctly on this machine.

    Args:
        name: of the check.
        what: the format of the weights.
        most_loss: maximum relative quantization error of a normally distributed matrix.
        asked: False if the recipe is not affected.
    """
    bad = FAIL if asked else WARN
    fix = "pip install --upgrade bitsandbytes, or train without `quantization`"
    device = {"cpu": "CPU", "cuda": "GPU"}[trial.device]
    if trial.problem:
        return Check(name, bad, f"bitsandbytes fails on the {device}: {trial.problem}", fix)
    parts = {"outputs in evaluation": trial.answer, "outputs in training": trial.product, "gradients": trial.gradient}
    most = MOST_ERROR[trial.dtype]
    wrong = [f"{part} by {error:.2g}" for part, error in parts.items() if not error <= most]
    if not trial.loss <= most_loss:
        wrong.append(f"dequantized weights by {trial.loss:.2g}")
    if wrong:
        return Check(name, bad, f"{what} in {trial.dtype} is wrong on the {device}: {', '.join(wrong)}", fix)
    found = f"{what} in {trial.dtype} on the {device}: outputs and gradients match the dequantized weights"
    found += f" to {max(parts.values()):.0e}"
    if trial.repacks:
        found += (
            "; this CPU has AVX512_BF16, where plain bitsandbytes rounds outputs to bfloat16 in evaluation and loses "
            "gradients afterwards; peftcli switches that kernel off (docs/4bit-on-cpu.md)"
        )
    return Check(name, OK, found)


def try_8bit(device: str, dtype: str) -> Trial:
    """Quantize a layer to 8 bits on a device, run it in evaluation and in training, and measure its errors.

    Args:
        dtype: compute dtype that a recipe would get on this machine.
    """
    try:
        weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
        layer = Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": weight})
        layer = layer.to(device)
        compute_in_float(layer)
        return run_layer(layer, dequantized_weight(layer), weight, dtype)
    except Exception as problem:  # a wheel without its native library can raise anything, even AttributeError on None
        return Trial(device, dtype, problem=f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}")


def check_8bit(trial: Trial) -> Check:
    """Whether 8-bit training works correctly on this machine."""
    return check_trial(trial, "8-bit", "int8", INT8_TOLERANCE, asked=True)
