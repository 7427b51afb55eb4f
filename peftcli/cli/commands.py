"""The bodies of the heavy commands: call the packages below and print what they return."""

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.cli.console import Shown, Streams, console, quiet
from peftcli.cli.pointers import Pointers
from peftcli.cli.recipes import find_recipe, is_run_folder
from peftcli.cli.text import JSON_OUTPUT, printable
from peftcli.errors import Aborted, DataError, GateNotMet, MemoryExhausted, RecipeError
from peftcli.plan.answered_rows import answered_digest
from peftcli.plan.plan import DTYPE_BYTES
from peftcli.plan.smoke import check_schedules, smoke_notices, smoke_recipe
from peftcli.recipe.load import Loaded, load_recipe, load_run_recipe
from peftcli.recipe.schema import Recipe
from peftcli.report.build import make_report, write_report
from peftcli.report.data import data_section
from peftcli.report.load import Stages, load_stages
from peftcli.report.terminal import print_blocks, render_terminal, section_blocks
from peftcli.results import DataJson, EnvironmentJson, EvalJson, MetricsJson, as_text, load_or_default, save
from peftcli.results.evaluation import VALIDATED
from peftcli.run_dir import RunDir, file_sha256, is_external_adapter
from peftcli.summary import refuse_lost, unmet, write_metrics
from peftcli.tasks.registry import TASKS
from peftcli.train.disk import check_disk_space, merge_forecast
from peftcli.train.stop import is_first_process
from peftcli.typed_json import parse

DEFAULT_BATCH = 16
"""Rows that a model without a plan of its own is given at once."""


@dataclass(frozen=True)
class GenerateFlags:
    """The flags of `generate`."""

    raw: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    as_json: bool


def data_command(name: str, overrides: Sequence[str], *, preview: int, smoke: bool, as_json: bool) -> None:
    """Print the statistics of a recipe's data and how some rows will be trained."""
    loaded = load(name, overrides, smoke=smoke)
    with shown_run(None) as (shown, streams):
        from peftcli.cli.pipeline import inspect_data

        begun = time.monotonic()
        data = inspect_data(loaded.recipe, shown, smoke=smoke, preview=preview)
        data.facts["prepare_seconds"] = round(time.monotonic() - begun, 3)
        if as_json:
            print_json(streams, data.facts | {"crossed": data.crossed})
        else:
            made = data_section(Stages(data=parse(DataJson, data.facts)))
            print_blocks(section_blocks([made]), console(streams.out))
        data.raise_if_crossed(f"peftcli data {loaded.path}")


def eval_command(name: str, recipe: str | None, pointers: Pointers, *, with_base: bool, as_json: bool) -> None:
    """Evaluate a target and print the table; the `eval.json` of a run folder is updated."""
    with shown_run(None) as (shown, streams):
        from peftcli.evaluate import evaluate

        loaded, plan, (target, data), is_own = _to_evaluate(name, recipe, pointers, shown)
        run = target.run
        updates = target.kind == "adapter" and is_own
        if run is not None and updates:
            refuse_lost(run, rewritten=run.eval)
            if not run.eval.exists() and not with_base:
                shown.note(f"note: {run.eval} was missing; pass --base to measure the base again too")
        value = evaluate(
            target,
            data,
            plan.evaluation,
            batch_rows=plan.evaluation_batch,
            seed=plan.seed,
            with_base=with_base,
            progress=shown,
        )
        if run is not None and updates:
            before = load_or_default(EvalJson, run.eval)
            same_rows = answered_digest(before) == answered_digest(value)
            base = value.base or (before.base if same_rows else None)
            # Forgetting was measured during training; it does not depend on the test rows.
            value = replace(value, base=base, retention=before.retention)
            value = replace(value, **{name: getattr(before, name) for name in VALIDATED})
            save(run.eval, value)
            finish(run, loaded.recipe)
        if as_json:
            print_json(streams, value)
            return
        figures = MetricsJson(task=plan.task, base=value.base, adapter=value.adapter, merged=value.merged)
        _show(Stages(metrics=figures, eval=value), ("results", "classes"), streams)


def _to_evaluate(
    name: str, recipe: str | None, pointers: Pointers, shown: Shown
) -> tuple[Loaded, Any, tuple[Any, Any], bool]:
    """The recipe, its plan, the target with its test rows, and whether these are the rows of its run."""
    from peftcli.cli.external_adapters import opened, prepared
    from peftcli.cli.pipeline import plan_recipe, prepare_for
    from peftcli.cli.run_inputs import open_run, point
    from peftcli.model.target import open_target

    if is_external_adapter(Path(name)):
        if recipe is None:
            raise RecipeError("this model has no run folder; pass --recipe to choose the test set")
        _refuse_untested(*_both(load_recipe(find_recipe(recipe), pointers.overrides)))
        with opened(Path(name), recipe, pointers, shown) as (loaded, planned, target):
            return loaded, planned.plan, prepared(planned, target, shown), False
    if recipe is not None:
        loaded = point(load_recipe(find_recipe(recipe), pointers.overrides), pointers)
        _refuse_untested(*_both(loaded))
        planned = plan_recipe(loaded)
        return loaded, planned.plan, prepare_for(planned, open_target(name, planned.plan.base), shown), False
    run = open_run(name, pointers, shown)
    _refuse_untested(*_both(run.loaded))
    if run.target.run is not None:
        _note_edited(run.target.run, shown)
    planned = plan_recipe(run.loaded, smoke=bool(run.target.identity.get("smoke")))
    return run.loaded, planned.plan, prepare_for(planned, run.target, shown), run.same_rows


def _note_edited(run: RunDir, shown: Shown) -> None:
    """Say that the recipe of a run is not as training wrote it."""
    written = load_or_default(EnvironmentJson, run.environment).recipe_sha256
    if written is not None and file_sha256(run.recipe) != written:
        shown.note(f"note: {run.recipe} was edited after training; its present values are used")


def _both(loaded: Loaded) -> tuple[Loaded, Recipe]:
    """A recipe with and without its `--set` overrides."""
    return loaded, (load_run_recipe if loaded.of_run else load_recipe)(loaded.path).recipe


@dataclass(frozen=True)
class MergeFlags:
    """The flags of `merge`."""

    into: str
    output_dir: Path | None
    dtype: str | None
    as_json: bool


def merge_command(path: Path, recipe: str | None, pointers: Pointers, flags: MergeFlags) -> None:
    """Merge the adapter of a run or of another tool, and print the results.

    Args:
        recipe: for an adapter of another tool, the recipe with the rows to compare on.
    """
    into, output_dir, dtype = flags.into, flags.output_dir, flags.dtype
    for flag, value, known in (
        ("--into", into, ("dequantized", "original", "best")),
        ("--dtype", dtype or "float32", ("float32", "bfloat16", "float16")),
    ):
        if value not in known:
            raise RecipeError(f"{flag} {value}: must be one of {', '.join(known)}")
    if is_external_adapter(path):
        _merge_external_adapter(path, recipe, pointers, flags)
        return
    run = RunDir(path)
    if not run.recipe.is_file():
        raise RecipeError(
            f"{path}: not a run folder (no recipe.yaml), and not an adapter of another tool; pass the run folder"
        )
    if recipe is not None:
        raise RecipeError(f"--recipe {recipe}: {path} is a run and has its own recipe; remove --recipe")
    with shown_run(run.library_log) as (shown, streams):
        from peftcli.cli.pipeline import plan_recipe, prepare_for
        from peftcli.cli.run_inputs import open_run
        from peftcli.merge.fold import refuse_unmergeable
        from peftcli.merge.merge import DriftTooLarge, MergeSettings, merge

        opened = open_run(str(path), pointers, shown)
        target, loaded = opened.target, opened.loaded
        if target.adapter is None:
            raise RecipeError(f"{path}: this run has only a merged model and no adapter, so there is nothing to merge")
        refuse_unmergeable(target.adapter)
        _note_edited(run, shown)
        refuse_lost(run, rewritten=run.merge)
        planned = plan_recipe(loaded, smoke=bool(target.identity.get("smoke")))
        plan = planned.plan
        target, data = prepare_for(planned, target, shown)
        stored = DTYPE_BYTES[dtype or plan.base.dtype]
        # Fully trained modules replace those of the base; LoRA on a tied weight can add one to the merged model.
        merged = plan.total_parameters - (plan.trainable_parameters if plan.frees_base else 0)
        check_disk_space(output_dir or run.merged, merge_forecast(merged * stored, run.adapter))
        settings = MergeSettings(into, dtype, plan.gates, plan.evaluation, plan.evaluation_batch, plan.seed)
        try:
            found = merge(target, data, output_dir or run.merged, settings, shown)
        except DriftTooLarge as problem:
            save(run.merge, problem.merge)
            finish(run, loaded.recipe)
            raise
        save(run.merge, found)
        metrics = finish(run, loaded.recipe)
        if flags.as_json:
            print_json(streams, found)
        else:
            where = [f"merged model  {output_dir or run.merged}", f"report        {run.report_html}"]
            _show(load_stages(run), ("merge", "results", "samples"), streams, where)
        raise_unmet(metrics)


def _merge_external_adapter(path: Path, recipe: str | None, pointers: Pointers, flags: MergeFlags) -> None:
    """Merge an adapter of another tool and print the results."""
    with shown_run(None) as (shown, streams):
        from peftcli.cli.external_adapters import merge_external_adapter

        found, folder = merge_external_adapter(path, recipe, pointers, flags, shown)
        if flags.as_json:
            print_json(streams, found)
            return
        figures = MetricsJson(merged=found.metrics)
        _show(Stages(metrics=figures, merge=found), ("merge", "results"), streams, [f"merged model  {folder}"])


def _open_for_prompts(name: str, recipe: str | None, pointers: Pointers, shown: Shown) -> tuple[Any, int]:
    """The target of `generate`, and its batch size."""
    from peftcli.cli.run_inputs import open_model

    if is_external_adapter(Path(name)):
        from peftcli.cli.external_adapters import opened

        with opened(Path(name), recipe, pointers, shown) as (_, _, target):
            return target, DEFAULT_BATCH
    if recipe is not None:
        raise RecipeError(f"--recipe {recipe}: only for adapters of other tools; {name} has its own; remove --recipe")
    target, loaded = open_model(name, pointers, ("model.name", "evaluation.batch_size"))
    return target, evaluation_batch(target, loaded)


def evaluation_batch(target: Any, changed: Loaded | None) -> int:
    """The rows that a target is given at once.

    Args:
        changed: the recipe of its run with the overrides of the command line; None if there are none.
    """
    asked = None if changed is None else changed.recipe.evaluation.batch_size
    return asked if isinstance(asked, int) else int(target.identity.get("evaluation_batch", DEFAULT_BATCH))


def generate_command(
    name: str, recipe: str | None, prompts: list[str], file: Path | None, flags: GenerateFlags, pointers: Pointers
) -> None:
    """Answer prompts.

    Args:
        recipe: for an adapter of another tool, the recipe with its base and prompt template.
    """
    if file is not None and not file.is_file():
        raise RecipeError(f"--file {file}: no such file")
    with shown_run(None) as (shown, streams):
        # Imported here, so that what the libraries print on import goes to the log.
        from peftcli.generate import generate, label, read_prompts, refuse_rows, refuse_table
        from peftcli.model.generation import Decoding

        if file is not None:
            refuse_table(file)
        try:
            lines = file.read_text(encoding="utf-8").split("\n") if file is not None else sys.stdin
            texts = prompts or read_prompts(lines)
            for text in texts:
                text.encode("utf-8")  # where Python let other bytes pass, it has put surrogates in their place
        except UnicodeDecodeError as problem:
            raise DataError(
                f"{file or 'standard input'}: byte {problem.start} is not UTF-8; convert the prompts to UTF-8"
            ) from problem
        except UnicodeEncodeError as problem:
            where = "a prompt" if prompts else str(file or "standard input")
            byte = ord(problem.object[problem.start]) & 0xFF
            raise DataError(f"{where}: byte 0x{byte:02x} is not UTF-8; convert the text to UTF-8") from problem
        target, rows = _open_for_prompts(name, recipe, pointers, shown)
        if not flags.raw and not prompts:
            refuse_rows(texts, target.identity, str(file or "standard input"))
        decoding = Decoding(flags.max_new_tokens, flags.temperature, flags.top_p, flags.seed)
        if not TASKS[target.base.task].generates:
            made: Iterator[Any] = label(target, texts, raw=flags.raw, batch_rows=rows, progress=shown)
            _show_made(made, _label_line, flags, streams, several=len(texts) > 1)
            return
        made = generate(target, texts, decoding, raw=flags.raw, batch_rows=rows, progress=shown)
        _show_made(made, _answer_line, flags, streams, several=len(texts) > 1)


def _show_made(
    made: Iterator[Any],
    line: Callable[..., str],
    flags: GenerateFlags,
    streams: Streams,
    *,
    several: bool,
) -> None:
    """Print each result as soon as it is there: a line of JSON, or the line that `line` makes of it."""
    masks = streams.out.isatty()
    for one in made:
        if flags.as_json:
            JSON_OUTPUT.write(json.dumps(one.as_dict(), ensure_ascii=False), streams.out)
        else:
            text = line(one, several=several)
            streams.out.write((printable(text) if masks else text) + "\n")
        streams.out.flush()


def _answer_line(one: Any, *, several: bool) -> str:
    return (f"{one.asked}\t" if several else "") + str(one.answer.strip())


def _label_line(one: Any, *, several: bool) -> str:
    # The line of a tagged text already contains the text.
    before = f"{_one_line(one.asked)}\t" if several and not hasattr(one, "words") else ""
    return f"{before}{_one_line(one.line())}"


def _one_line(text: str) -> str:
    """Text that stays on its line, with control characters made visible."""
    return printable(text).replace("\n", "\N{SYMBOL FOR LINE FEED}")


def load(name: str, overrides: Sequence[str], *, smoke: bool) -> Loaded:
    # The recipe of a run may use the key names of an earlier version.
    read = load_run_recipe if is_run_folder(Path(name)) else load_recipe
    loaded = replace(read(find_recipe(name), overrides), of_run=False)
    if not smoke:
        return loaded
    check_schedules(loaded.recipe)
    notices = (*loaded.notices, *smoke_notices(loaded.recipe))
    return Loaded(smoke_recipe(loaded.recipe), notices, loaded.path)


def _refuse_untested(loaded: Loaded, written: Recipe) -> None:
    """Refuse to evaluate without test rows, or on rows that were trained on.

    Args:
        loaded: the recipe with its `--set` overrides.
        written: the same without; rows that it trains on cannot be test rows later.

    Raises:
        RecipeError: there are no test rows, or they would be split off rows that were all trained on.
    """
    trained_on_all = not written.dataset.holds_out and loaded.recipe.dataset.test is None
    if trained_on_all or not loaded.recipe.dataset.holds_out:
        raise RecipeError(
            f"{loaded.path}: dataset.split.test_size is 0, so all rows were trained on and none is left to "
            "evaluate on; pass a recipe with other rows with --recipe"
        )


def finish(run: RunDir, recipe: Recipe) -> MetricsJson:
    metrics = write_metrics(run, recipe.gates)
    write_report(run)
    return metrics


def show_result(run: RunDir, metrics: MetricsJson, streams: Streams, *, as_json: bool) -> None:
    if as_json:
        print_json(streams, metrics)
        return
    _show(load_stages(run), ("results", "samples"), streams, [f"report  {run.report_html}"])


def _show(stages: Stages, names: Collection[str], streams: Streams, more: Sequence[str] = ()) -> None:
    """Print some sections of the report of a run, followed by more lines."""
    out = console(streams.out)
    render_terminal(make_report(stages), out, names)
    for line in more:
        out.print(printable(line))


def raise_unmet(metrics: MetricsJson) -> None:
    missed = unmet(metrics)
    if missed:
        raise GateNotMet("; ".join(missed))


@contextmanager
def shown_run(log: Path | None) -> Iterator[tuple[Shown, Streams]]:
    with quiet(log) as streams:
        shown = Shown(console(streams.err), speaks=is_first_process())
        try:
            yield shown, streams
        except KeyboardInterrupt as problem:  # training handles Ctrl-C itself
            raise Aborted("stopped by Ctrl-C") from problem
        except Exception as problem:
            if not _is_out_of_memory(problem):
                raise
            raise MemoryExhausted(
                f"out of memory: {' '.join(str(problem).split())[:200]}; halve trainer.per_device_train_batch_size and "
                "double trainer.gradient_accumulation_steps, lower dataset.max_length or evaluation.batch_size, or set "
                "quantization: {bits: 4} if the base is not quantized"
            ) from problem
        finally:
            shown.end()


def _is_out_of_memory(problem: Exception) -> bool:
    if "torch" not in sys.modules:  # the light commands do not import it
        return isinstance(problem, MemoryError)
    from peftcli.model.oom import is_out_of_memory

    return is_out_of_memory(problem)


def print_json(streams: Streams, value: Any) -> None:
    JSON_OUTPUT.write(as_text(value), streams.out)
