"""Let torch say that its GPU is of sm_75 and has no bfloat16, as a T4.

    python scripts/gpu/as_t4.py train quickstart ...     # peftcli as on a T4

peftcli then takes float16 with a gradient scaler, the memory-efficient attention kernel, and repeated key heads; all
of it runs on whatever GPU is here. It says nothing of a T4's speed, nor of Triton's on sm_75.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

CAPABILITY = (7, 5)


class Properties:
    """The properties of a GPU with another capability."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.major, self.minor = CAPABILITY

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextmanager
def as_t4() -> Iterator[None]:
    """Inside, peftcli sees a GPU of sm_75; without a GPU nothing changes."""
    import torch

    from peftcli.model import varlen_attention

    if not torch.cuda.is_available():
        yield
        return
    real = torch.cuda.get_device_properties
    varlen_attention._chosen.cache_clear()
    with (
        patch.object(torch.cuda, "get_device_properties", lambda *given: Properties(real(*given))),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False),
    ):
        yield
    varlen_attention._chosen.cache_clear()


if __name__ == "__main__":
    from peftcli.cli.main import main

    with as_t4():
        code = main(sys.argv[1:])
    raise SystemExit(code)
