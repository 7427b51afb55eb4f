"""How a command that fails ends: text for people on stderr, one JSON object on stdout with `--json`, an exit code."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from peftcli.cli.text import JSON_OUTPUT, printable, say
from peftcli.errors import MachineError, MemoryExhausted, PeerLost, PeftcliError, RecipeError, Stopped
from peftcli.train.stop import is_first_of_machine, is_first_process

BUG = "this is a bug in peftcli; please report it with the lines above and the output of `pip list`"
TRACEBACK = "--traceback"
USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]
COMMAND_LINE_ERROR: type[Any] = USAGE_ERROR.__bases__[0]
"""Errors of a command line; typer exports only their subclass, from a module that differs between its versions."""


@dataclass(frozen=True)
class Failures:
    """Reports the failures of one command line.

    Attributes:
        as_json: with `--json`: print one object on stdout, unless the result was already printed there.
        show_trace: print the traceback of a known error too.
    """

    as_json: bool
    show_trace: bool

    @classmethod
    def of(cls, words: Sequence[str]) -> "Failures":
        """The choices of a command line."""
        options = words[: words.index("--")] if "--" in words else words
        return cls("--json" in options, TRACEBACK in options or os.environ.get("PEFTCLI_TRACEBACK") == "1")

    def known(self, error: PeftcliError) -> int:
        """Report an error that a user can cause. A stop on request is not called an error."""
        if self.show_trace:
            traceback.print_exc()
        # Only one process per machine prints, unless a process runs out of memory or loses contact on its own.
        if is_first_of_machine() or isinstance(error, MemoryExhausted | PeerLost):
            say(f"{'' if isinstance(error, Stopped) else 'error: '}{error}", sys.stderr)
        self._print_object(error.exit_code, error.kind, str(error))
        return error.exit_code

    def usage(self, error: Any) -> int:
        """Report a wrong command line, a `COMMAND_LINE_ERROR`."""
        if type(error).__name__ == "NoArgsIsHelpError":
            message = "no command given"
            error.show()
        else:
            message = error.format_message()
            if not message.endswith("?"):
                command = error.ctx.command_path if isinstance(error, USAGE_ERROR) and error.ctx else "peftcli"
                message = f"{message.rstrip('.')}; see `{command} --help`"
            say(f"error: {message}", sys.stderr)
        self._print_object(RecipeError.exit_code, "usage", message)
        return RecipeError.exit_code

    def machine(self, message: str) -> int:
        """Report that this machine does not support the request."""
        if self.show_trace:
            traceback.print_exc()
        say(f"error: {message}", sys.stderr)
        self._print_object(MachineError.exit_code, MachineError.kind, message)
        return MachineError.exit_code

    def bug(self) -> int:
        """Report an exception that is a bug."""
        traceback.print_exc()
        say(f"error: {BUG}", sys.stderr)
        self._print_object(1, "bug", f"{BUG}: {traceback.format_exc().strip().splitlines()[-1]}")
        return 1

    def _print_object(self, exit_code: int, kind: str, message: str) -> None:
        if self.as_json and is_first_process() and not JSON_OUTPUT.is_written:
            error = {"exit_code": exit_code, "kind": kind, "message": printable(message)}
            JSON_OUTPUT.write(json.dumps({"schema": 1, "error": error}, ensure_ascii=False), sys.stdout)
