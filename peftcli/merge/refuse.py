"""Adapters that no weight can hold, refused before anything is loaded."""

import json
from pathlib import Path

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from peftcli.errors import MachineError
from peftcli.methods.base import Method
from peftcli.methods.registry import METHODS


def method_of(adapter: Path) -> Method | None:
    """The method of a saved adapter, None for one that the table does not have."""
    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    return next((one for one in METHODS.values() if config is not None and one.config == config.__name__), None)


def refuse_unmergeable(adapter: Path) -> None:
    """Refuse an adapter whose method cannot be merged.

    Raises:
        MachineError: with the reason, and what to do instead.
    """
    method = method_of(adapter)
    if method is not None and method.merge:
        raise MachineError(
            f"{adapter}: {method.title} cannot be merged: {method.merge}; use the adapter as it is, "
            "`peftcli generate` and PEFT load it beside its base"
        )
