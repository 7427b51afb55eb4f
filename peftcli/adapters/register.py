"""Registers our tuners with PEFT, so that it wraps, saves and loads them like its own."""

from functools import cache

from peft import PeftConfig, PeftType
from peft.utils import register_peft_method

from peftcli.adapters.bottleneck import BottleneckConfig, BottleneckModel
from peftcli.adapters.full import WholeConfig, WholeModel


@cache
def register() -> None:
    """Add our methods to PEFT, once; called wherever an adapter is created or loaded."""
    _add_types("BOTTLENECK", "WHOLE")
    register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
    register_peft_method(name="whole", config_cls=WholeConfig, model_cls=WholeModel)


def own_config(name: str) -> type[PeftConfig]:
    """Our configuration class of that name, registered with PEFT."""
    register()
    classes: dict[str, type[PeftConfig]] = {one.__name__: one for one in (BottleneckConfig, WholeConfig)}
    return classes[name]


def _add_types(*names: str) -> None:
    """Add members to PEFT's enum of methods, which has no API for it."""
    for name in names:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
