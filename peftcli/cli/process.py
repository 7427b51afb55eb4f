"""What a process of ours sets before anything heavy is imported."""

import gc
import os

SPIN = ("GOMP_SPINCOUNT", "2000")
"""Idle OpenMP threads spin before they sleep. On cores shared with another process the default keeps both from working
(measured: 40 times slower); a short spin costs nothing when alone. Read when torch is first imported."""
COLLECTED_AFTER = (100_000, 20, 20)
"""Objects, and collections of the younger kind, after which Python collects; its own numbers are 700, 10, 10.

The imports of a heavy command leave half a million objects, over which it would go again and again: a seventh of their
time."""


def settle_process() -> None:
    """Set what torch and Python read later; a spin count of the user's own stays."""
    os.environ.setdefault(*SPIN)
    gc.set_threshold(*COLLECTED_AFTER)
