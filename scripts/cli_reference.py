"""Print docs/cli.md, the reference of commands, from the Typer app; with --write, write the file."""

import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from peftcli.cli.main import app

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
KINDS = {"<int range>": "N", "<float range>": "X", "<int>": "N", "<path>": "PATH", "<str>": "TEXT"}
"""Types of values as Typer shows them, and as the page does."""
INTRODUCTION = """\
# Command reference

<!-- Written by scripts/cli_reference.py from the Typer app; do not edit. -->

Every command takes `-h` and `--help`, and `peftcli help COMMAND` shows the same. Known errors are a few lines on stderr
without a traceback; `--traceback`, anywhere on the command line, or `PEFTCLI_TRACEBACK=1` in the environment, shows it.
A terminal gets lines wrapped to its width; in a file or a pipe each message stays on one line.

With `--json` a command prints one JSON object on stdout (`generate` one for each answer, each on its line) and
everything else on stderr: its result or, if it fails before there is one, its error as
`{"schema": 1, "error": {"exit_code": 3, "kind": "data", "message": "..."}}`. The kinds are `usage`, `recipe`, `data`,
`machine`, `memory`, `diverged`, `gate`, `stopped`, `aborted` and `bug`.

A RECIPE is a file or the name of a shipped recipe.
"""
EXIT_CODES = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | a bug in peftcli; the traceback is shown |
| 2 | the recipe or the command line is wrong |
| 3 | the data is wrong: a missing file or column, nothing to train on, a limit exceeded |
| 4 | the machine or the environment cannot do it: no GPU, missing package or kernels, disk full, model not found |
| 5 | out of memory, even after splitting the batch |
| 6 | training diverged: a loss or a gradient is not finite |
| 7 | a gate, or the tolerance of a merge, was not met |
| 75 | stopped early on purpose; the same command resumes from a complete checkpoint |
| 130 | stopped at once by a second Ctrl-C; the last checkpoint is complete |

## Environment variables

| variable | effect |
|---|---|
| `PEFTCLI_CACHE` | folder for tokenized data and the tiny models; `~/.cache/peftcli` if unset |
| `PEFTCLI_DEADLINE` | time by which a run must have saved everything, such as `2026-11-21T18:00:00Z`, or a Unix time |
| `PEFTCLI_QUOTA` | a folder and the bytes that it may hold, such as `/data=20GiB` |
| `PEFTCLI_TRACEBACK` | `1` shows the traceback of known errors |
| `HF_HUB_OFFLINE` | `1` keeps peftcli, like every Hugging Face library, off the network |
"""


def main() -> None:
    """Print the page, or write it."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(cli_reference(), encoding="utf-8")
    else:
        sys.stdout.write(cli_reference())


def cli_reference() -> str:
    """The whole page."""
    group: Any = get_command(app)
    summary = ["| command | what it does |", "|---|---|"]
    summary += [f"| [`{name}`](#{name}) | {_cell(command.help)} |" for name, command in group.commands.items()]
    parts = [INTRODUCTION, "\n".join(summary) + "\n"]
    if options := _options(group, group.make_context("peftcli", [], resilient_parsing=True)):
        parts.append("## Global options\n\n" + options)
    parts += [_command(name, command) for name, command in group.commands.items()]
    return "\n".join([*parts, EXIT_CODES])


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["[OPTIONS]", *map(_usage, arguments)])
    parts = [f"## {name}\n", f"{command.help}\n", f"```text\npeftcli {name} {usage}\n```\n"]
    if arguments:
        rows = ["| argument | meaning |", "|---|---|"]
        rows += [f"| `{_argument(one)}` | {_cell(one.help)} |" for one in arguments]
        parts.append("\n".join(rows) + "\n")
    if options := _options(command, context):
        parts.append(options)
    return "\n".join(parts)


def _argument(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper()


def _usage(argument: Any) -> str:
    shown = _argument(argument) + ("..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def _options(command: Any, context: Any) -> str:
    """The table of a command's options, except those of every command; empty if there are none."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for one in command.params:
        if one.param_type_name != "option" or one.hidden or {"--install-completion", "--show-completion"} & {*one.opts}:
            continue
        names = _cell(one.get_help_record(context)[0])
        for kind, word in KINDS.items():
            names = names.replace(kind, word)
        meaning = _cell(one.help) + (" May be repeated." if one.multiple and "repeated" not in one.help else "")
        rows.append(f"| `{names}` | {_default(one)} | {meaning} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def _default(option: Any) -> str:
    if any(option.default is nothing for nothing in (None, False)) or callable(option.default):
        return ""
    return f"`{str(option.default).lower()}`" if isinstance(option.default, bool) else f"`{option.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
