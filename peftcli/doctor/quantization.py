"""Checks one 4-bit and one 8-bit layer where a run would train: output and gradient against the unpacked weights."""

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
"""Largest relative distance between the product of a 4-bit layer and that of its unpacked weights."""
NF4_TOLERANCE = 0.2
"""Largest relative distance between a matrix of normal numbers and the same in NF4; about 0.09 is usual."""

INT8_TOLERANCE = 0.02
"""Largest relative distance between a matrix of normal numbers and the same in 8 bits; about 0.007 is usual."""


@dataclass(frozen=True)
class Trial:
    """What a 4-bit layer did.

    Attributes:
        device: `cuda` or `cpu`.
        dtype: of the products.
        answer, product, gradient: relative distance from what the unpacked weights give: of a product of one row
            without gradients, of one in training after an evaluation, and of the gradient of its input.
        loss: relative distance between the weights and what was unpacked.
        repacks: this CPU would pack the weights anew in an evaluation, which loses the gradients; we switch it off.
        problem: what was raised, empty for nothing.
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
    """Quantize one layer on a device, evaluate it, train it, and measure.

    Args:
        dtype: that of the products, which a recipe would get here.
    """
    try:
        return _measure(device, dtype)
    except Exception as problem:  # a wheel without its library raises anything, AttributeError of None included
        return Trial(device, dtype, problem=f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}")


def _measure(device: str, dtype: str) -> Trial:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    layer = Linear4bit(INPUTS, OUTPUTS, bias=False, compute_dtype=DTYPES[dtype], quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to(device)
    repacks = device == "cpu" and bool(getattr(layer, FAST_CPU_PATH, False))
    keep_gradients_of_4bit(layer)
    unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return replace(run_layer(layer, unpacked, weight, dtype), repacks=repacks)


def run_layer(layer: torch.nn.Module, unpacked: torch.Tensor, weight: torch.Tensor, dtype: str) -> Trial:
    """Evaluate a quantized layer, train it, and hold what comes out against its unpacked weights.

    Args:
        unpacked: the weights that it computes with, (outputs, inputs), on its device.
        weight: those that it was made from.
        dtype: of its inputs.
    """
    generator = torch.Generator().manual_seed(1)
    device, kind = unpacked.device, DTYPES[dtype]
    unpacked = unpacked.double()
    rows = torch.randn(ROWS, INPUTS, generator=generator).to(device, kind)
    layer.eval()
    with torch.no_grad():
        one = layer(rows[:1])
    layer.train()
    rows.requires_grad_()
    product = layer(rows)
    upstream = torch.randn(ROWS, OUTPUTS, generator=generator).to(device, kind)
    product.backward(upstream)
    assert rows.grad is not None
    exact = rows.detach().double()
    return Trial(
        device.type,
        dtype,
        answer=_distance(one, exact[:1] @ unpacked.T),
        product=_distance(product.detach(), exact @ unpacked.T),
        gradient=_distance(rows.grad, upstream.double() @ unpacked),
        loss=_distance(unpacked, weight.to(device)),
    )


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def check_4bit(trial: Trial, *, asked: bool = True) -> Check:
    """Whether 4-bit training can be trusted here.

    Args:
        asked: False for a recipe without quantization, which goes on whatever comes out.
    """
    return check_trial(trial, "4-bit", "NF4", NF4_TOLERANCE, asked=asked)


def check_trial(trial: Trial, name: str, what: str, most_loss: float, *, asked: bool) -> Check:
    """Whether training on weights of a kind can be trusted here.

    Args:
        name: of the verdict.
        what: the kind of the weights.
        most_loss: largest relative distance between a matrix of normal numbers and its unpacked weights.
        asked: False where the recipe goes on whatever comes out.
    """
    bad = FAIL if asked else WARN
    fix = "pip install --upgrade bitsandbytes, or train without `quantization`"
    place = {"cpu": "CPU", "cuda": "GPU"}[trial.device]
    if trial.problem:
        return Check(name, bad, f"bitsandbytes fails on the {place}: {trial.problem}", fix)
    parts = {"answers": trial.answer, "products": trial.product, "gradients": trial.gradient}
    most = MOST_ERROR[trial.dtype]
    wrong = [f"{part} by {error:.2g}" for part, error in parts.items() if not error <= most]
    if not trial.loss <= most_loss:
        wrong.append(f"the unpacked weights by {trial.loss:.2g}")
    if wrong:
        return Check(name, bad, f"{what} in {trial.dtype} is wrong on the {place}: {', '.join(wrong)}", fix)
    there = f"{what} in {trial.dtype} on the {place}: products and gradients are those of the unpacked weights"
    there += f" to {max(parts.values()):.0e}"
    if trial.repacks:
        there += (
            "; this CPU has AVX512_BF16, where plain bitsandbytes rounds products to bfloat16 in evaluation and loses "
            "gradients afterwards; peftcli switches that kernel off (docs/4bit-on-cpu.md)"
        )
    return Check(name, OK, there)


def try_8bit(device: str, dtype: str) -> Trial:
    """Quantize one layer on a device, evaluate it, train it, and measure.

    Args:
        dtype: that of the products, which a recipe would get here.
    """
    try:
        weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
        layer = Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": weight})
        layer = layer.to(device)
        compute_in_float(layer)
        return run_layer(layer, dequantized_weight(layer), weight, dtype)
    except Exception as problem:  # a wheel without its library raises anything, AttributeError of None included
        return Trial(device, dtype, problem=f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}")


def check_8bit(trial: Trial) -> Check:
    """Whether the 8-bit training that a recipe asks for can be trusted here."""
    return check_trial(trial, "8-bit", "int8", INT8_TOLERANCE, asked=True)
