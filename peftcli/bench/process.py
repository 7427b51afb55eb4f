"""A child process with its time and the peak of its memory, watched from outside."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_SECONDS = 0.05
CARD_SECONDS = 0.5
ALIKE = {"GOMP_SPINCOUNT": "2000", "CUDA_VISIBLE_DEVICES": "0"}
"""For all tools, unless it is set: one card, and idle threads that do not spin, which would cost a plain script more
than anything else on shared cores; peftcli does both itself."""
SHOWN_LINES = 3
ERROR = re.compile(r"error: |[\w.]*(Error|Exception|Exhausted|Interrupt)\b")
"""How the line begins that says why a process failed, ours and Python's."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: of its exit, negative for a signal.
        seconds: from its start to its exit.
        peak_bytes: of its resident memory and that of its children; Linux never says less than what the process that
            started it had, so start it from a small one.
        card_bytes: how far the used memory of the first card rose while it ran; None without a card.
        said: the end of what it wrote.
    """

    code: int
    seconds: float
    peak_bytes: int
    said: str
    card_bytes: int | None = None

    @property
    def error(self) -> str | None:
        """The last words of one that failed, None where it did not."""
        if self.code == 0:
            return None
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        first = next((place for place, line in reversed(list(enumerate(lines))) if ERROR.match(line)), -SHOWN_LINES)
        return " / ".join(lines[first:][:SHOWN_LINES]).removeprefix("error: ") or f"ended with exit code {self.code}"


class Card:
    """The used memory of the first card, asked of its driver now and then."""

    def __init__(self) -> None:
        self._tool = shutil.which("nvidia-smi")
        self._asked = 0.0
        self._before = self.used()
        self._most = self._before

    def used(self) -> int | None:
        """Bytes in use by all processes, None without a card."""
        if self._tool is None:
            return None
        asked = [self._tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        return int(said) * 2**20 if said.isdigit() else None

    def look(self) -> None:
        """Ask again, unless that was done a moment ago."""
        if self._most is None or time.monotonic() - self._asked < CARD_SECONDS:
            return
        self._asked = time.monotonic()
        self._most = max(self._most, self.used() or 0)

    @property
    def risen(self) -> int | None:
        """How far it rose."""
        return None if self._most is None or self._before is None else self._most - self._before


def run_process(
    words: Sequence[str], log: Path, look: Callable[[], None] | None = None, more: Mapping[str, str] | None = None
) -> Ended:
    """Run a command to its end; one that is interrupted here ends too.

    Args:
        words: the command.
        log: file for what it writes.
        look: called every `LOOK_SECONDS`.
        more: environment variables besides our own.
    """
    card = Card()
    settings = {**ALIKE, **os.environ, **(more or {})}
    with log.open("wb") as sink:
        begun = time.monotonic()
        child = subprocess.Popen(words, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=settings)
        try:
            done = 0
            while not done:
                time.sleep(LOOK_SECONDS)
                card.look()
                if look is not None:
                    look()
                done, status, used = os.wait4(child.pid, os.WNOHANG)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if child.returncode is None:
                child.kill()
                child.wait()
        seconds = time.monotonic() - begun
    kib = 1 if sys.platform == "darwin" else 1024
    text = log.read_text(encoding="utf-8", errors="replace")
    return Ended(child.returncode, seconds, used.ru_maxrss * kib, text[-4000:], card.risen)
