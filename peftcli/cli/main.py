"""The commands of peftcli and their options; each body is imported when its command runs."""

import errno
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from peftcli.cli.environment import set_variables
from peftcli.cli.failure import COMMAND_LINE_ERROR, TRACEBACK, Failures
from peftcli.cli.paths import expanded
from peftcli.cli.pointers import Pointers
from peftcli.cli.text import JSON_OUTPUT, say
from peftcli.errors import PeftcliError, RecipeError

NO_MEMORY_SIGNS = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")
"""Messages of the dynamic loader if a library does not fit into memory."""
MORE_MEMORY = "close other programs, raise the limit of this shell or container (ulimit -v), or use a larger machine"
MACHINE_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
    errno.ESTALE,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
"""Operating system errors caused by the machine, not by peftcli."""


class Commands(TyperGroup):
    """The commands; their help shows the whole first sentence of each, however narrow the terminal is."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        rows = [(name, self.commands[name].help or "") for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, text.partition(". ")[0].rstrip(".")) for name, text in rows])


app = typer.Typer(
    name="peftcli",
    cls=Commands,
    help="Fine-tune a language model from one recipe, and measure the result.",
    epilog=(
        "\b\nStart with:\n  peftcli validate RECIPE\n  peftcli train RECIPE --smoke\n  peftcli train RECIPE\n"
        "  peftcli merge runs/NAME"
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(callback=expanded, help="A recipe file, or the name of a bundled one such as quickstart.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, the rest to stderr.")]
AdapterRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", callback=expanded, help="For an adapter of another tool: the recipe with its base and dataset."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH",
        callback=expanded,
        help="Where the base model is now, if it was moved: a folder or a Hub id.",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        callback=expanded,
        help="Where the rows are now, if they were moved: a file, or the folder with the files of the recipe.",
    ),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="Quick offline rehearsal on a CPU: a tiny model, a few rows and steps.")
]
RunArgument = Annotated[Path, typer.Argument(callback=expanded, help="A run folder.")]

COLLECTED_AFTER = (100_000, 20, 20)
"""Thresholds of Python's garbage collector; the defaults are 700, 10, 10.

Importing the libraries of a heavy command creates half a million objects; with the defaults, collections take a seventh
of the import time."""


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version of peftcli.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --version: also print library versions.")] = False,
    show_trace: Annotated[
        bool, typer.Option(TRACEBACK, help="Also print the Python traceback of an error; allowed after a command too.")
    ] = False,
) -> None:
    """Options before a command."""
    del show_trace  # `without_traceback` has taken it out of the command line, wherever it was
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
def validate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    data: Annotated[
        bool, typer.Option(help="Also open the local data files and compare their columns with the recipe.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe and the columns of its data files, and report every problem. No model is loaded."""
    from peftcli.cli.recipes import find_recipe
    from peftcli.recipe.load import load_recipe
    from peftcli.recipe.local_config import check_local_config

    loaded = load_recipe(find_recipe(recipe), set_ or ())
    check_local_config(loaded.recipe)
    if data:
        from peftcli.data.first_rows import check_first_rows

        check_first_rows(loaded.recipe)
    if as_json:
        _print_json({"recipe": str(loaded.path), "valid": True, "notices": list(loaded.notices)})
        return
    for notice in loaded.notices:
        say(f"note: {notice}", sys.stderr)
    say(f"{loaded.path}: valid", sys.stdout)


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
    output_dir: Annotated[
        Path | None, typer.Option(callback=expanded, help="The run folder. Default: runs/NAME.")
    ] = None,
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
        typer.Option(
            metavar="RUN",
            callback=expanded,
            help="Reuse this run's baseline evaluation if nothing it depends on changed.",
        ),
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
    target: Annotated[
        str, typer.Argument(callback=expanded, help="A run, an adapter, a merged model, or a base model with --recipe.")
    ],
    recipe: Annotated[
        str | None, typer.Option(callback=expanded, help="The recipe with the test rows. Default: that of the run.")
    ] = None,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    base: Annotated[bool, typer.Option(help="Also evaluate the base model of an adapter.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model on the whole test split."""
    from peftcli.cli.targets import check_target

    check_target(target, takes_base=True, with_recipe=recipe is not None)
    from peftcli.cli.commands import eval_command

    eval_command(target, recipe, _pointers(model, data, set_), with_base=base, as_json=as_json)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(callback=expanded, help="A run folder, or an adapter of another tool.")],
    recipe: AdapterRecipeOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    into: Annotated[
        str,
        typer.Option(
            help="Merge into the dequantized training weights, the original ones, or whichever has the lower test loss."
        ),
    ] = "dequantized",
    output_dir: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Folder of the merged model. Default: RUN/merged or ADAPTER-merged."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for the merged model. Default: dtype of the run.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a stand-alone model and measure its drift from the adapter; above the tolerance the model is discarded."""
    from peftcli.cli.targets import check_target

    check_target(str(run))
    from peftcli.cli.commands import MergeFlags, merge_command

    merge_command(run, recipe, _pointers(model, data, set_), MergeFlags(into, output_dir, dtype, as_json))


TokensOption = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 means greedy decoding.")]
TopPOption = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling: keep tokens up to this cumulative probability.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Random seed for sampling (with --temperature > 0).")]
PrefixOption = Annotated[
    str, typer.Option(metavar="TEXT", help="Put before the names of the new columns, which the file must not have.")
]
ProbabilitiesOption = Annotated[
    bool, typer.Option("--probabilities", help="Also write the probability of each label, or of each tag.")
]
ReplaceOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output, or what another command has left of it.")
]


@app.command()
def generate(
    target: Annotated[str, typer.Argument(callback=expanded, help="A run, an adapter or a merged model.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts. Default: read from standard input.")] = None,
    recipe: AdapterRecipeOption = None,
    set_: SetOption = None,
    model: ModelOption = None,
    file: Annotated[Path | None, typer.Option(callback=expanded, help="A text file with one prompt per line.")] = None,
    input_: Annotated[
        str | None,
        typer.Option("--input", metavar="FILE", callback=expanded, help="A file of rows, with --output: as `predict`."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=expanded, help="With --input: as for `predict`.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use each prompt as is, without the run's template.")] = False,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    probabilities: ProbabilitiesOption = False,
    prefix: PrefixOption = "",
    overwrite: ReplaceOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per answer to stdout, each on its line.")
    ] = False,
) -> None:
    """Answer prompts, formatted with the run's template."""
    from peftcli.cli.targets import check_target

    check_target(target)
    if input_ is not None or output is not None:
        if input_ is None or output is None or prompts or file is not None or raw:
            raise RecipeError("--input and --output: need each other, and take no prompts, --file or --raw")
        predict(
            target, input_, output, recipe, set_, model, max_new_tokens, temperature, top_p, seed, probabilities,
            prefix, overwrite, as_json,
        )  # fmt: skip
        return
    if probabilities or prefix or overwrite:
        raise RecipeError("--probabilities, --prefix and --overwrite: only with --input and --output")
    from peftcli.cli.commands import GenerateFlags, generate_command

    flags = GenerateFlags(raw, max_new_tokens, temperature, top_p, seed, as_json)
    generate_command(target, recipe, prompts or [], file, flags, _pointers(model, None, set_))


@app.command()
def predict(
    target: Annotated[str, typer.Argument(callback=expanded, help="A run, an adapter or a merged model.")],
    file: Annotated[
        str,
        typer.Argument(
            callback=expanded,
            help="CSV, TSV, JSONL, JSON or Parquet; a folder of images; - for JSONL from stdin.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            callback=expanded,
            help="File to write; .csv, .tsv, .jsonl or .parquet decides its format.",
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(callback=expanded, help="The recipe with the columns, for a model without a run folder."),
    ] = None,
    set_: SetOption = None,
    model: ModelOption = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    probabilities: ProbabilitiesOption = False,
    prefix: PrefixOption = "",
    overwrite: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict for every row of a file, and write the rows with the predictions. Run it again to continue."""
    from peftcli.cli.targets import check_target

    check_target(target)
    from peftcli.cli.predict import PredictFlags, predict_command

    flags = PredictFlags(output, max_new_tokens, temperature, top_p, seed, probabilities, prefix, overwrite, as_json)
    predict_command(target, recipe, file, flags, _pointers(model, None, set_))


@app.command()
def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Regenerate report.md and report.html of a run from its JSON files."""
    from peftcli.cli.targets import check_run
    from peftcli.report.build import write_report
    from peftcli.run_dir import RunDir, read_json

    check_run(str(run))
    folder = RunDir(run)
    write_report(folder)
    if as_json:
        _print_json(read_json(folder.metrics))
        return
    typer.echo(str(folder.report_html))


@app.command()
def pack(
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=expanded,
            help="The archive, .tar.gz or .zip. Default: the run's name with .tar.gz.",
        ),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Pack the merged model instead of the adapter.")] = False,
    with_test_rows: Annotated[
        bool, typer.Option("--with-test-rows", help="Pack the test rows, so that eval needs no other file.")
    ] = False,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Pack the base model too; otherwise it is named with its hash.")
    ] = False,
    model: ModelOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pack a run into one file for another machine, without any path, user name or host name of this one."""
    from peftcli.cli.pack import PackFlags, pack_command

    flags = PackFlags(output, merged, with_test_rows, with_base, as_json)
    pack_command(run, _pointers(model, data, None), flags)


@app.command()
def compare(
    targets: Annotated[list[str], typer.Argument(callback=expanded, help="Recipes to train, or existing run folders.")],
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Values to try; repeat the option to try every combination."),
    ] = None,
    set_: SetOption = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            help="Folder of the comparison and its runs. Default: runs/FILE-compare, after the recipe's file name.",
        ),
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
        str | None,
        typer.Argument(callback=expanded, help="Recipe to check against this machine; omit for a general check."),
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
    output: Annotated[
        Path | None, typer.Option(callback=expanded, help="A file for the JSON result, to share.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, the rest to stderr.")
    ] = False,
) -> None:
    """Measure how fast this machine trains: peftcli and plain SFTTrainer on the same rows, at equal loss."""
    from peftcli.bench.compare import BenchRequest
    from peftcli.cli.bench import bench_command

    bench_command(BenchRequest(shape, bits, rounds, minutes), output, sys.stdout, sys.stderr, as_json=as_json)


app.command()(bench)


def _pointers(model: str | None, data: list[str] | None, overrides: list[str] | None) -> Pointers:
    return Pointers(model, tuple(data or ()), tuple(overrides or ()))


@app.command("help")
def help_(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(help="A command; omit it for the list of commands.")] = None,
) -> None:
    """Show the help of peftcli or of a command, like --help."""
    root: Any = context.parent
    if command is None:
        typer.echo(root.get_help())
        return
    name, found, _ = root.command.resolve_command(root, [command])  # an unknown one is a usage error with a hint
    typer.echo(found.get_help(found.make_context(name, [], parent=root, resilient_parsing=True)))


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
    failures = Failures.of(words)
    JSON_OUTPUT.is_written = False
    try:
        code = get_command(app)(without_traceback(words), prog_name="peftcli", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    except PeftcliError as error:
        return failures.known(error)
    except COMMAND_LINE_ERROR as error:
        return failures.usage(error)
    except OSError as problem:
        if problem.errno not in MACHINE_FAULTS:
            return failures.bug()
        return failures.machine(f"{problem.filename or 'the disk'}: {os.strerror(problem.errno)}")
    except MemoryError:
        return failures.machine(f"this process ran out of memory; {MORE_MEMORY}")
    except ImportError as problem:
        if not any(sign in str(problem) for sign in NO_MEMORY_SIGNS):
            return failures.bug()
        return failures.machine(f"the libraries do not fit into memory ({problem}); {MORE_MEMORY}")
    except Exception:
        return failures.bug()


def without_traceback(words: Sequence[str]) -> list[str]:
    """A command line without `--traceback`, which is allowed anywhere before `--`.

    >>> without_traceback(["train", "--traceback", "a.yaml", "--", "--traceback"])
    ['train', 'a.yaml', '--', '--traceback']
    """
    end = words.index("--") if "--" in words else len(words)
    return [*(word for word in words[:end] if word != TRACEBACK), *words[end:]]


def entry() -> None:
    """The console script."""
    raise SystemExit(main())


def _print_json(value: dict[str, Any]) -> None:
    JSON_OUTPUT.write(json.dumps(value, ensure_ascii=False), sys.stdout)


def settle_process() -> None:
    """Set the environment variables and the garbage collector's thresholds."""
    set_variables()
    gc.set_threshold(*COLLECTED_AFTER)
