"""The commands of peftcli and their options; each body is imported when its command runs."""

import errno
import gc
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from peftcli.cli.environment import set_variables
from peftcli.errors import MachineError, MemoryExhausted, PeerLost, PeftcliError, RecipeError
from peftcli.train.stop import is_first_of_machine

NO_MEMORY_SIGNS = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")
"""Messages of the dynamic loader if a library does not fit into memory."""
BUG = "error: this is a bug in peftcli; please report it with the lines above and the output of `pip list`"
MACHINE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Operating system errors caused by the machine, not by peftcli."""

app = typer.Typer(
    name="peftcli",
    help="Fine-tune a language model from one recipe, and measure the result.",
    epilog="Start with: validate RECIPE; train RECIPE --smoke; train RECIPE; merge runs/NAME.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled one such as quickstart.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, the rest to stderr.")]
AdapterRecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="For an adapter of another tool: the recipe with its base and dataset.")
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="Quick offline rehearsal on a CPU: a tiny model, a few rows and steps.")
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.")]

COLLECTED_AFTER = (100_000, 20, 20)
"""Thresholds of Python's garbage collector; the defaults are 700, 10, 10.

Importing the libraries of a heavy command creates half a million objects; with the defaults, collections take a seventh
of the import time."""


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version of peftcli.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --version: also print library versions.")] = False,
) -> None:
    """Options before a command."""
    if version:
        from peftcli.doctor.packages import version_lines

        for line in version_lines() if verbose else version_lines()[:1]:
            typer.echo(line)
        raise typer.Exit()
    if verbose:
        raise RecipeError("--verbose: only valid with --version; run `peftcli --version --verbose`")
    if context.invoked_subcommand is None:
        raise RecipeError("no command given; `peftcli --help` lists the commands")


@app.command()
def validate(recipe: RecipeArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Check a recipe and report every problem with its line. No model or data is loaded."""
    from peftcli.cli.recipes import find_recipe
    from peftcli.recipe.load import load_recipe
    from peftcli.recipe.local_config import check_local_config

    loaded = load_recipe(find_recipe(recipe), set_ or ())
    check_local_config(loaded.recipe)
    if as_json:
        _print_json({"recipe": str(loaded.path), "valid": True, "notices": list(loaded.notices)})
        return
    for notice in loaded.notices:
        typer.echo(f"note: {notice}", err=True)
    typer.echo(f"{loaded.path}: valid")


@app.command()
def data(
    recipe: RecipeArgument,
    set_: SetOption = None,
    preview: Annotated[int, typer.Option(min=0, help="Number of rows to show token by token.")] = 3,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what will be trained: rows, tokens, duplicates, leaks, and sample rows with the trained tokens marked."""
    from peftcli.cli.commands import data_command

    data_command(recipe, set_ or (), preview=preview, smoke=smoke, as_json=as_json)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Plan for a GPU by name, such as t4 or a100-80, instead of this machine."),
    ] = None,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show each choice with its reason, and the memory, time and disk that training needs. No weights are loaded."""
    from peftcli.cli.plan import plan_command

    plan_command(recipe, set_ or (), gpu=gpu, smoke=smoke, as_json=as_json)


@app.command()
def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    output_dir: Annotated[Path | None, typer.Option(help="The run folder. Default: runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest complete checkpoint, or fail.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the existing run first.")] = False,
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Resume even though this changed since the checkpoint: a recipe key, data, base or versions.",
        ),
    ] = None,
    smoke: SmokeOption = False,
    max_time: Annotated[
        str | None, typer.Option(metavar="8h30m", help="Stop with a checkpoint and a report within this time.")
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of processes; each runs the recipe's batch size. Default: the batch is split across all GPUs.",
        ),
    ] = None,
    baseline_from: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Reuse this run's baseline evaluation if nothing it depends on changed."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train: plan, data, baseline, training, evaluation, report. Run the same command again to resume."""
    from peftcli.cli.launcher import launch

    overrides = [*(set_ or ()), *([f"budget.wall_clock={max_time}"] if max_time else [])]
    code = launch(recipe, overrides, num_processes, smoke=smoke)
    if code is not None:
        raise typer.Exit(code)
    from peftcli.cli.train import TrainFlags, train_command

    flags = TrainFlags(output_dir, resume, overwrite, smoke, as_json, tuple(force or ()), baseline_from)
    train_command(recipe, overrides, flags)


@app.command("eval")
def eval_(
    target: Annotated[str, typer.Argument(help="A run, an adapter, a merged model, or a base model with --recipe.")],
    recipe: Annotated[str | None, typer.Option(help="The recipe with the test rows. Default: that of the run.")] = None,
    set_: SetOption = None,
    base: Annotated[bool, typer.Option(help="Also evaluate the base model of an adapter.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model on the whole test split."""
    from peftcli.cli.commands import eval_command

    eval_command(target, recipe, set_ or (), with_base=base, as_json=as_json)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter of another tool.")],
    recipe: AdapterRecipeOption = None,
    into: Annotated[
        str,
        typer.Option(
            help="Merge into the dequantized training weights, the original ones, or whichever has the lower test loss."
        ),
    ] = "dequantized",
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the merged model. Default: RUN/merged or ADAPTER-merged.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for the merged model. Default: dtype of the run.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a stand-alone model and measure its drift from the adapter; above the tolerance the model is discarded."""
    from peftcli.cli.commands import merge_command

    merge_command(run, recipe, into, output_dir, dtype, as_json=as_json)


@app.command()
def generate(
    target: Annotated[str, typer.Argument(help="A run, an adapter or a merged model.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts. Default: read from standard input.")] = None,
    recipe: AdapterRecipeOption = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use each prompt as is, without the run's template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 means greedy decoding.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling: keep tokens up to this cumulative probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling (with --temperature > 0).")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts, formatted with the run's template."""
    from peftcli.cli.commands import GenerateFlags, generate_command

    flags = GenerateFlags(raw, max_new_tokens, temperature, top_p, seed, as_json)
    generate_command(target, recipe, prompts or [], file, flags)


@app.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Regenerate report.md and report.html of a run from its JSON files."""
    from peftcli.report.build import write_report
    from peftcli.run_dir import RunDir, read_json

    folder = RunDir(run)
    write_report(folder)
    if as_json:
        _print_json(read_json(folder.metrics))
        return
    typer.echo(str(folder.report_html))


@app.command()
def compare(
    targets: Annotated[list[str], typer.Argument(help="Recipes to train, or existing run folders.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Values to try; repeat the option to try every combination."),
    ] = None,
    set_: SetOption = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the comparison and its runs. Default: runs/NAME-compare.")
    ] = None,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train variants one after the other and compare quality, forgetting, size, memory and time."""
    from peftcli.cli.compare import CompareFlags, compare_command

    flags = CompareFlags(tuple(vary or ()), tuple(set_ or ()), output_dir, smoke, as_json)
    raise typer.Exit(compare_command(targets, flags, sys.stdout, sys.stderr))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method to show in detail.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the methods: what each trains, its 4-bit and merge support, and the tasks it supports."""
    from peftcli.cli.methods import methods_command

    methods_command(name, as_json=as_json)


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="Recipe to check against this machine; omit for a general check.")
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: versions, GPU, precision, 4 bit, memory, disk, Hub. Each check reports a result and a fix."""
    from peftcli.cli.doctor import doctor_command

    doctor_command(recipe, set_ or (), as_json=as_json)


def bench(
    shape: Annotated[
        str, typer.Option(metavar="auto|tiny|0.6b|3b|8b", help="Model size (random weights); auto picks one.")
    ] = "auto",
    bits: Annotated[int, typer.Option(metavar="4|16", help="Bits per base weight.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Runs per tool, interleaved.")] = 3,
    minutes: Annotated[float, typer.Option(min=0.1, help="Approximate duration; at least ten steps are run.")] = 2.0,
    output: Annotated[Path | None, typer.Option(help="A file for the JSON result, to share.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, the rest to stderr.")
    ] = False,
) -> None:
    """Measure how fast this machine trains: peftcli and plain SFTTrainer on the same rows, at equal loss."""
    from peftcli.bench.compare import BenchRequest
    from peftcli.cli.bench import bench_command

    bench_command(BenchRequest(shape, bits, rounds, minutes), output, sys.stdout, sys.stderr, as_json=as_json)


app.command()(bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the arguments after the program's name; None for those of this process.
    """
    settle_process()
    code = _run(argv)
    if "LOCAL_RANK" not in os.environ:
        return code
    from peftcli.cli.launcher import hand_over

    return hand_over(code)


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    show_trace = "--traceback" in words or os.environ.get("PEFTCLI_TRACEBACK") == "1"
    words = [word for word in words if word != "--traceback"]
    try:
        get_command(app)(words, prog_name="peftcli")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except PeftcliError as error:
        from peftcli.cli.console import printable

        if show_trace:
            traceback.print_exc()
        # Only one process per machine prints, unless a process runs out of memory or loses contact on its own.
        if is_first_of_machine() or isinstance(error, MemoryExhausted | PeerLost):
            typer.echo(f"error: {printable(str(error))}", err=True)
        return error.exit_code
    except OSError as problem:
        if problem.errno not in MACHINE_FAULTS:
            return _bug()
        if show_trace:
            traceback.print_exc()
        typer.echo(f"error: {problem.filename or 'the disk'}: {os.strerror(problem.errno)}", err=True)
        return MachineError.exit_code
    except MemoryError:
        return _out_of_memory("this process ran out of memory", show_trace=show_trace)
    except ImportError as problem:
        if not any(sign in str(problem) for sign in NO_MEMORY_SIGNS):
            return _bug()
        return _out_of_memory(f"the libraries do not fit into memory ({problem})", show_trace=show_trace)
    except Exception:
        return _bug()
    return 0


def _bug() -> int:
    traceback.print_exc()
    typer.echo(BUG, err=True)
    return 1


def _out_of_memory(what: str, *, show_trace: bool) -> int:
    if show_trace:
        traceback.print_exc()
    fix = "close other programs, raise the limit of this shell or container (ulimit -v), or use a larger machine"
    typer.echo(f"error: {what}; {fix}", err=True)
    return MachineError.exit_code


def entry() -> None:
    """The console script."""
    raise SystemExit(main())


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def settle_process() -> None:
    """Set the environment variables and the garbage collector's thresholds."""
    set_variables()
    gc.set_threshold(*COLLECTED_AFTER)
