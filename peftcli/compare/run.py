"""Trains one variant in a separate process, so that its memory is freed and its peak is measured separately."""

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
"""Option of Linux's prctl: the signal that a process gets when its parent dies."""
ERROR, STOPPED = "error: ", "stopped "


class VariantRunner:
    """Trains one variant after another; as a context manager it forwards SIGTERM and Ctrl-C to the running one.

    The child runs in its own session, so a Ctrl-C in the terminal reaches it only through this class.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self.at_once = False
        self._shown: set[str] = set()
        self._child: subprocess.Popen[str] | None = None
        self._handlers = ExitStack()

    def __enter__(self) -> "VariantRunner":
        self._handlers.enter_context(handle_stop_signals(self._forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()

    def train(self, variant: Variant, folder: Path, flags: Sequence[str], progress: Progress) -> tuple[int, str | None]:
        """Run `peftcli train`; its messages go to `progress`, prefixed with the name of the variant.

        A message that an earlier variant printed already is not repeated.

        Returns:
            Its exit code and, unless that is 0, its error message without the prefix.
        """
        overrides = [word for text in variant.overrides for word in ("--set", text)]
        command = [sys.executable, "-m", "peftcli", "train", str(variant.recipe), *overrides, *flags]
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
        if self.stopped_by is not None:  # a signal arrived while the child was started
            self._child.send_signal(signal.SIGTERM)
        error: list[str] = []
        assert self._child.stderr is not None
        with self._child.stderr as lines:
            for line in (_in_comparison(line, folder) for line in lines):
                if error or line.startswith((ERROR, STOPPED)):
                    error.append(line.rstrip().removeprefix(ERROR))
                if error or line not in self._shown:
                    progress.note(f"{variant.name} | {line.rstrip()}")
                self._shown.add(line)
        code = self._child.wait()
        self._child = None
        # For a process that was killed by a signal this is the negative number of the signal; shells use 128 + number.
        code = 128 - code if code < 0 else code
        return code, None if code == 0 else "\n".join(error) or f"ended with exit code {code}"

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.stopped_by is not None and number == signal.SIGINT
        self.stopped_by = signal.Signals(number).name
        if self._child is not None:
            self._child.send_signal(number)


def _in_comparison(line: str, folder: Path) -> str:
    """A message of `train` with the advice that fits a variant; `compare` has no --overwrite."""
    if line.startswith(f"{folder} is already finished"):
        return f"finished earlier; remove {folder} to train it again\n"
    return line.replace("pass --overwrite", f"remove {folder}")


def _end_with_parent() -> None:
    # Linux only; elsewhere the child outlives a killed parent.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
