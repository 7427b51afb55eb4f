"""Methods that PEFT does not have: our own tuners, with PEFT's interface."""

from collections.abc import Mapping
from types import MappingProxyType

from peftcli.methods.base import Method

_SWITCH = frozenset({"bool"})

BOTTLENECK_WIDTH = 16.0
LAST_LAYERS = 2
_NEW_TOKENS: Mapping[str, frozenset[str]] = MappingProxyType({"trainable_token_indices": frozenset({"list", "none"})})

CUSTOM = (
    Method(
        name="bottleneck",
        title="Bottleneck adapters",
        what="a small two-layer network after the attention and the feed-forward part of each block",
        paper="Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247",
        config="BottleneckConfig",
        peft_module=None,
        argument_names={"dropout": "dropout"},
        defaults={
            "dropout": 0.0,
            "placement": "houlsby",
            "reduction_factor": BOTTLENECK_WIDTH,
            "non_linearity": "relu",
        },
        arguments={
            "placement": frozenset({"str"}),
            "reduction_factor": frozenset({"float"}),
            "non_linearity": frozenset({"str"}),
            "modules_to_save": frozenset({"list", "none"}),
        },
        choices={
            "placement": ("houlsby", "pfeiffer"),
            "non_linearity": ("relu", "gelu", "gelu_new", "silu", "swish", "tanh", "sigmoid", "leaky_relu", "linear"),
        },
        targets="writers",
        merge="it is not linear, so it cannot be folded into a weight",
        counted=True,
    ),
    Method(
        name="freeze",
        title="Freezing",
        what="the last blocks of the model are trained in full, the rest is frozen",
        paper="Lee et al. 2019, arXiv:1911.03090",
        config="WholeConfig",
        peft_module=None,
        defaults={"last_layers": LAST_LAYERS, "head": False, "embeddings": False},
        arguments={
            "last_layers": frozenset({"int"}),
            "head": _SWITCH,
            "embeddings": _SWITCH,
            **_NEW_TOKENS,
        },
        targets="whole",
        counted=True,
    ),
    Method(
        name="full",
        title="Full fine-tuning",
        what="all weights of the model are trained, in a copy next to the frozen base",
        paper="the usual baseline",
        config="WholeConfig",
        peft_module=None,
        defaults={"everything": True},
        targets="whole",
        four_bit="it trains all weights, and 4-bit weights have no gradient",
        eight_bit="it trains all weights, and 8-bit weights have no gradient",
        counted=True,
    ),
)
