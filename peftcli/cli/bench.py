"""The options of `bench`; what it does is loaded when it is called."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def bench(
    shape: Annotated[
        str, typer.Option(metavar="auto|tiny|0.6b|3b|8b", help="Model with random weights; auto goes by the machine.")
    ] = "auto",
    bits: Annotated[int, typer.Option(metavar="4|16", help="Bits of each weight of the base.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each tool, taking turns.")] = 3,
    minutes: Annotated[float, typer.Option(min=0.1, help="About how long; ten steps at least are run.")] = 2.0,
    output: Annotated[Path | None, typer.Option(help="A file for the object of --json, to send in.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else on stderr.")] = False,
) -> None:
    """Measure how fast this machine trains: peftcli beside plain SFTTrainer on the same rows, at equal loss."""
    from peftcli.bench.quick import Asked
    from peftcli.cli.benching import bench_command

    bench_command(Asked(shape, bits, rounds, minutes), output, sys.stdout, sys.stderr, as_json=as_json)
