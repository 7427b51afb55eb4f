"""Sessions in two to five seconds each: a process that has imported everything once is forked for every command.

The child runs `peftcli.cli.main.main` as the real command does, in a folder and an environment of its own, and ends
with its exit code. That this makes no difference is itself a case of the table: three sessions of the real command
give the same bits. What a fork adds is exact timing: a child may be told to signal itself at a named call of a
function.
"""

import importlib
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workspace import TIMEOUT, Ended, Workspace, wait_for

ROOMS = (
    "peftcli.cli.main",
    "peftcli.cli.train",
    "peftcli.cli.pipeline",
    "peftcli.train.run",
    "peftcli.evaluate",
    "peftcli.merge.merge",
    "peftcli.generate",
    "peftcli.report.plots",
    "bitsandbytes",
)
PHASES = {
    "reading data": "peftcli.cli.pipeline:prepare_data",
    "loading the base": "peftcli.train.run:load_base",
    "baseline": "peftcli.train.run:_baseline",
    "micro-batch": "peftcli.train.trainers:Trainer.training_step",
    "evaluation in training": "peftcli.train.trainers:Trainer.evaluation_loop",
    "saving": "peftcli.train.trainers:Trainer._save_checkpoint",
    "writing the adapter": "peftcli.train.run:save_adapter",
    "last evaluation": "peftcli.train.run:_measure",
    "report": "peftcli.cli.train:finish",
}
"""What a session does, each with the function that does it."""
PHASE_BYTES = 64
Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Moment:
    """The n-th call of a function in a session.

    Attributes:
        where: module and attribute, such as `peftcli.train.trainers:Trainer.training_step`.
        after: when the call has ended, in place of when it begins.
    """

    where: str
    nth: int = 1
    after: bool = False

    def arm(self, act: Callable[[], None]) -> None:
        """Call `act` at this moment; for the process at hand, and for good."""
        owner, name = owner_of(self.where)
        whole = getattr(owner, name)
        calls = 0

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.nth and not self.after:
                act()
            result = whole(*args, **kwargs)
            if calls == self.nth and self.after:
                act()
            return result

        setattr(owner, name, watched)


def owner_of(where: str) -> tuple[Any, str]:
    """The module or class that a name stands in, and its last part."""
    module, path = where.split(":")
    owner: Any = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    return owner, name


def send(*numbers: signal.Signals) -> Callable[[], None]:
    """An act that sends these signals to the process itself."""

    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return act


class Zygote:
    """Forks a session for each command; made at first use, since its imports take ten seconds."""

    def __init__(self) -> None:
        self._phase = mmap.mmap(-1, PHASE_BYTES)
        self._warm = False

    def warm_up(self) -> None:
        """Import all that a session imports."""
        if self._warm:
            return
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
        for room in ROOMS:
            importlib.import_module(room)
        self._warm = True

    def run(self, ground: Workspace, *words: str, hook: Callable[[], None] | None = None) -> Ended:
        """Run one session to its end.

        Args:
            hook: called in the child before the command.
        """
        pid, begun = self.start(ground, *words, hook=hook)
        return self.end(ground, pid, begun)

    def start(
        self, ground: Workspace, *words: str, hook: Callable[[], None] | None = None, command: Command | None = None
    ) -> tuple[int, float]:
        """Fork a session; its process id, and when it began.

        Args:
            command: in place of peftcli, to run another program in the same way.
        """
        self.warm_up()
        self._set_phase("before the data")
        begun = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = self._session(ground, words, hook, command)
            except BaseException:  # nothing of the child may run on in the parent's code
                traceback.print_exc()
            finally:
                os._exit(code)
        return pid, begun

    def end(self, ground: Workspace, pid: int, begun: float) -> Ended:
        """Wait for a session."""
        code, peak, cpu = wait_for(pid, begun + TIMEOUT)
        seconds = time.perf_counter() - begun
        out, err = (ground.said(ground.folder / name) for name in (".out", ".err"))
        return Ended(code, seconds, out, err, peak, cpu)

    def phase(self) -> str:
        """What the session was doing last."""
        return self._phase[:PHASE_BYTES].rstrip(b"\0").decode()

    def _session(
        self, ground: Workspace, words: Sequence[str], hook: Callable[[], None] | None, command: Command | None
    ) -> int:
        os.setsid()
        os.chdir(ground.folder)
        os.environ.clear()
        os.environ.update(ground.environment)
        for number, name in ((1, ".out"), (2, ".err")):
            descriptor = os.open(ground.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        # Where pytest captures, these objects write elsewhere.
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.stdin.close()
        sys.argv = ["peftcli", *words]
        for phase, where in PHASES.items():
            self._mark(phase, where)
        if hook is not None:
            hook()
        from peftcli.cli.main import main  # imported already; the light cases never come here

        code = (command or main)(list(words))
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def _mark(self, phase: str, where: str) -> None:
        """Let a function of the child tell the parent that it is running."""
        owner, name = owner_of(where)
        whole = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            if self.phase() in PHASES:  # a part of something larger, which says more
                return whole(*args, **kwargs)
            self._set_phase(phase)
            result = whole(*args, **kwargs)
            self._set_phase(f"after {phase}")
            return result

        setattr(owner, name, marked)

    def _set_phase(self, phase: str) -> None:
        self._phase[:PHASE_BYTES] = phase.encode().ljust(PHASE_BYTES, b"\0")


ZYGOTE = Zygote()
