"""Trains one variant in a process of its own, so that its memory is freed and its peak is its own."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType

from peftcli.compare.variants import Variant
from peftcli.progress import Progress
from peftcli.signals import handle_stop_signals

PR_SET_PDEATHSIG = 1
"""Option of Linux' prctl: the signal that a process gets when its parent dies."""
ERROR = "error: "


class VariantRunner:
    """Trains one variant after another; as a context it hands SIGTERM and Ctrl-C to the one that runs.

    The child has a session of its own: a Ctrl-C in the terminal reaches it once, through here, and a second one again.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self.at_once = False
        self._said: set[str] = set()
        self._child: subprocess.Popen[str] | None = None
        self._handlers = ExitStack()

    def __enter__(self) -> "VariantRunner":
        self._handlers.enter_context(handle_stop_signals(self._hear))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()

    def train(self, variant: Variant, folder: Path, flags: Sequence[str], progress: Progress) -> tuple[int, str | None]:
        """Run `peftcli train`; what it says goes to `progress` under the name of the variant.

        What an earlier variant has said in the same words, of the data and the machine, is not said again.

        Returns:
            Its exit code and, unless that is 0, its error without the word before it.
        """
        words = [word for text in variant.overrides for word in ("--set", text)]
        command = [sys.executable, "-m", "peftcli", "train", str(variant.recipe), *words, *flags]
        self._child = subprocess.Popen(
            [*command, "--output-dir", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        if self.stopped_by is not None:  # heard while the child was made
            self._child.send_signal(signal.SIGTERM)
        said: list[str] = []
        assert self._child.stderr is not None
        with self._child.stderr as lines:
            for line in lines:
                if said or line.startswith(ERROR):
                    said.append(line.rstrip().removeprefix(ERROR))
                if said or line not in self._said:
                    progress.note(f"{variant.name} | {line.rstrip()}")
                self._said.add(line)
        code = self._child.wait()
        self._child = None
        # A process that a signal killed has that signal's number, negative; a shell adds it to 128.
        code = 128 - code if code < 0 else code
        return code, None if code == 0 else "\n".join(said) or f"ended with exit code {code}"

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.stopped_by is not None and number == signal.SIGINT
        self.stopped_by = signal.Signals(number).name
        if self._child is not None:
            self._child.send_signal(number)


def _end_with_parent() -> None:
    # Linux only; elsewhere a killed parent leaves the child, which a signal to it still ends.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
