"""One 8-bit layer, tried where a run would train: its product and its gradient against the unpacked weights."""

import torch
from bitsandbytes.nn import Linear8bitLt

from peftcli.adapters.quantized import unpacked_weight
from peftcli.doctor.fourbit import INPUTS, OUTPUTS, Trial, judge_trial, run_layer
from peftcli.doctor.verdict import Verdict
from peftcli.model.int8_linear import compute_in_floats

INT8_TOLERANCE = 0.02
"""Largest relative distance between a matrix of normal numbers and the same in 8 bits; about 0.007 is usual."""


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
        compute_in_floats(layer)
        return run_layer(layer, unpacked_weight(layer), weight, dtype)
    except Exception as problem:  # a wheel without its library raises anything, AttributeError of None included
        return Trial(device, dtype, problem=f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}")


def judge_8bit(trial: Trial) -> Verdict:
    """Whether the 8-bit training that a recipe asks for can be trusted here."""
    return judge_trial(trial, "8-bit", "int8", INT8_TOLERANCE, asked=True)
