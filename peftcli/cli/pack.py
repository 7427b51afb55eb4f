"""The body of `pack`."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.cli.commands import print_json, shown_run
from peftcli.cli.console import Shown, printable
from peftcli.cli.pointers import Pointers
from peftcli.errors import DataError, RecipeError
from peftcli.recipe.load import load_run_recipe
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir

if TYPE_CHECKING:
    from peftcli.cli.run_inputs import OpenedTarget
    from peftcli.results import PackJson


@dataclass(frozen=True)
class PackFlags:
    """The flags of `pack`."""

    output: Path | None
    merged: bool
    with_test_rows: bool
    with_base: bool
    as_json: bool


def pack_command(path: Path, pointers: Pointers, flags: PackFlags) -> None:
    """Write a run into one file for another machine.

    Raises:
        RecipeError: the path is no run, or the file extension is unknown.
        MachineError: the run has no model, or its base was not found.
        DataError: the test rows were not found, or cannot be packed.
    """
    run = RunDir(path)
    if not run.recipe.is_file():
        raise RecipeError(f"{path}: not a run folder (no recipe.yaml); pass the folder that `peftcli train` wrote")
    with shown_run(None) as (shown, streams):
        from peftcli.pack.archive import write_archive, writer_of

        output = flags.output or Path(f"{run.path.resolve().name}.tar.gz")
        writer_of(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=output.parent.absolute(), prefix=f".{output.name}.stage."))
        try:
            described = _fill(run, stage, pointers, flags, shown)
            size = write_archive(stage, output, described.name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        if flags.as_json:
            print_json(streams, {"archive": str(output), "bytes": size, **vars(described)})
            return
        for line in _summary(described, output, size):
            streams.out.write(printable(line) + "\n")


def _fill(run: RunDir, stage: Path, pointers: Pointers, flags: PackFlags, shown: Shown) -> "PackJson":
    """Write the content of the archive into an empty folder; returns its description."""
    from peftcli.model.manifest import read_manifest
    from peftcli.pack.private import Private
    from peftcli.pack.stage import PackOptions, finish_stage, packed_base, private_paths, stage_run
    from peftcli.results import PackJson

    recipe = load_run_recipe(run.recipe).recipe
    base = _local_base(run, pointers) if flags.with_base and not flags.merged else None
    options = PackOptions(flags.merged, base)
    manifest = read_manifest(run.merged if flags.merged else run.adapter)
    paths = private_paths(run, recipe, manifest or {"base": {"name": "", "path": ""}})
    private = Private.of_machine([*paths, str(stage)])
    rows = None
    if flags.with_test_rows:
        recipe, rows = _with_test_rows(run, stage, pointers, shown)
    staged = stage_run(run, recipe, options, stage)
    assert manifest is not None  # otherwise `stage_run` has refused the run
    found = packed_base(manifest, options)
    described = PackJson(
        name=recipe.name,
        model="merged" if flags.merged else "adapter",
        base=found,
        test_rows=rows,
        needs=_needs(found.found_by, rows, recipe),
    )
    finish_stage(staged, private, described)
    return described


def _needs(found_by: str | None, rows: int | None, recipe: Recipe) -> tuple[str, ...]:
    from peftcli.pack.stage import NEEDS_DATA, NEEDS_MODEL
    from peftcli.recipe.paths import data_keys, input_paths

    reads_files = bool(set(data_keys(recipe)) & input_paths(recipe).keys())
    return (
        *([NEEDS_MODEL] if found_by == "model_option" else []),
        *([NEEDS_DATA] if rows is None and reads_files else []),
    )


def _local_base(run: RunDir, pointers: Pointers) -> Path | None:
    """The folder of the base on this machine.

    Raises:
        MachineError: it is not on this machine.
    """
    from peftcli.cli.run_inputs import open_model
    from peftcli.errors import MachineError
    from peftcli.model.files import local_folder

    target, _ = open_model(str(run.path), pointers, ())
    folder = local_folder(target.base.path, target.base.revision)
    if folder is None:
        raise MachineError(f"--with-base: {target.base.path} is not on this machine; download it, or leave it out")
    return folder


def _with_test_rows(run: RunDir, stage: Path, pointers: Pointers, shown: Shown) -> tuple[Recipe, int]:
    """Write `test.jsonl`; returns the recipe that reads it, and the number of rows.

    Raises:
        DataError: the rows are not all there, or would not be read as the same rows again.
    """
    from peftcli.cli.pipeline import plan_recipe, prepare_for, run_record
    from peftcli.cli.run_inputs import open_run
    from peftcli.data.prepare import prepare
    from peftcli.pack.test_rows import FILE, dataset_of_rows, write_test_rows
    from peftcli.tasks.registry import TASKS

    opened = open_run(str(run.path), pointers, shown)
    recipe, record = opened.loaded.recipe, run_record(run)
    if record is None:
        raise DataError(f"{run.path}: this run recorded no test rows; pack it without --with-test-rows")
    if TASKS[recipe.model.task].images:
        raise DataError("--with-test-rows: images are not packed; copy their folder, and pass it with --data")
    planned = plan_recipe(opened.loaded, smoke=_is_smoke(opened))
    target, data = prepare_for(planned, opened.target, shown)
    split = data.facts["split"]
    if split["missing"] or not split["recorded"]:
        raise DataError(
            f"{run.path}: {split['missing']:,} of its {len(record.test):,} test rows are no longer in the data; "
            "restore the file, pass the original with --data, or pack without --with-test-rows"
        )
    columns = write_test_rows(data.test_split, stage / FILE)
    labels = target.base.labels if data.problem_type != "regression" else ()
    dataset = dataset_of_rows(recipe.dataset, stage / FILE, columns, tuple(labels))
    plan = planned.plan
    again = prepare(dataset, data.tokenizer, plan.labels, plan.seed, shown, record=record)
    if again.facts["fingerprint"]["test"] != data.facts["fingerprint"]["test"]:
        raise DataError(
            "--with-test-rows: the rows of this recipe cannot be written as separate rows (dataset.too_long); pack "
            "without it, and pass the original file with --data"
        )
    updated = {"dataset": dataset, "model": recipe.model.model_copy(update=_known_problem(data.problem_type))}
    return recipe.model_copy(update=updated), len(data.test_split.rows)


def _is_smoke(opened: "OpenedTarget") -> bool:
    return bool(opened.target.identity.get("smoke"))


def _known_problem(problem_type: str | None) -> dict[str, Any]:
    """The problem type that all rows decided, which the test rows alone may not."""
    return {} if problem_type is None else {"problem_type": problem_type}


def _summary(described: "PackJson", output: Path, size: int) -> Sequence[str]:
    base = described.base
    where = {
        None: "merged into the model",
        "archive": f"in the archive ({base.name})",
        "built_in": f"{base.name}, built by peftcli",
        "hub": f"{base.name} from the Hub",
        "model_option": f"{base.name}, not in the archive: copy it, and pass it with --model",
    }[base.found_by]
    rows = "not in the archive" if described.test_rows is None else f"{described.test_rows:,} in the archive"
    use = " ".join(["peftcli eval", described.name, *described.needs])
    return [
        f"archive     {output} ({size:,} bytes)",
        f"base model  {where}",
        f"test rows   {rows}",
        f"elsewhere   unpack it; {use}",
    ]
