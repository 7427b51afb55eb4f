"""The bodies of the heavy commands: call the rooms, print what they return."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.cli.quiet import Streams, quiet
from peftcli.cli.recipes import find_recipe
from peftcli.cli.show import Shown, console, metric_table, retention_line, sample_table
from peftcli.cli.show_data import show_data
from peftcli.errors import DataError, GateNotMet, MemoryExhausted, RecipeError
from peftcli.plan.plan import DTYPE_BYTES
from peftcli.plan.smoke import smoke_recipe
from peftcli.recipe.load import Loaded, load_recipe
from peftcli.recipe.schema import Recipe
from peftcli.recipe.tasks import CAUSAL
from peftcli.report.write import write_report
from peftcli.rundir import RunDir, read_json, write_json
from peftcli.summary import unmet, write_metrics
from peftcli.train.disk import RESERVE_BYTES, Forecast, check_room
from peftcli.train.stops import is_first_process


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
    """Print what the data of a recipe hold, and how some rows will be trained."""
    loaded = load(name, overrides, smoke=smoke)
    with shown_run(None) as (shown, streams):
        from peftcli.cli.steps import look_at_data

        begun = time.monotonic()
        data = look_at_data(loaded.recipe, shown, smoke=smoke, preview=preview)
        data.facts["prepare_seconds"] = round(time.monotonic() - begun, 3)
        if as_json:
            print_json(streams, data.facts | {"crossed": data.crossed})
        else:
            show_data(data.facts, console(streams.out))
        data.raise_if_crossed(f"peftcli data {loaded.path}")


def eval_command(name: str, recipe: str | None, overrides: Sequence[str], *, with_base: bool, as_json: bool) -> None:
    """Measure a target and print the table; a run folder's `eval.json` is written again."""
    with shown_run(None) as (shown, streams):
        from peftcli.cli.steps import plan_recipe, prepare_for
        from peftcli.evaluate import evaluate
        from peftcli.model.target import open_target

        target = open_target(name) if recipe is None else None
        loaded = _recipe_for(recipe, target.run if target is not None else None, overrides)
        smoke = bool(target is not None and target.identity.get("smoke"))
        planned = plan_recipe(loaded, shown, smoke=smoke)
        plan = planned.plan
        target, data = prepare_for(planned, target or open_target(name, plan.base), shown)
        value = evaluate(
            target,
            data,
            plan.evaluation,
            batch_rows=plan.evaluation_batch,
            seed=plan.seed,
            with_base=with_base,
            progress=shown,
        )
        run = target.run
        if run is not None and target.kind == "adapter" and not overrides and recipe is None:
            before = read_json(run.eval) if run.eval.is_file() else {}
            value["base"] = value["base"] or before.get("base")
            if "retention" in before:  # of the training; the test rows say nothing about it
                value["retention"] = before["retention"]
            write_json(run.eval, value)
            finish(run, loaded.recipe)
        if as_json:
            print_json(streams, value)
            return
        out = console(streams.out)
        out.print(metric_table({key: value.get(key) for key in ("base", "adapter", "merged")}))


def merge_command(path: Path, into: str, output_dir: Path | None, dtype: str | None, *, as_json: bool) -> None:
    """Merge the adapter of a run and print what was measured."""
    for flag, value, known in (
        ("--into", into, ("dequantized", "original", "best")),
        ("--dtype", dtype or "float32", ("float32", "bfloat16", "float16")),
    ):
        if value not in known:
            raise RecipeError(f"{flag} {value}: may be {', '.join(known)}")
    run = RunDir(path)
    if not run.recipe.is_file():
        raise RecipeError(f"{path}: no run folder (recipe.yaml is missing); `peftcli train` makes one")
    with shown_run(run.library_log) as (shown, streams):
        from peftcli.cli.steps import plan_recipe, prepare_for
        from peftcli.merge.refuse import refuse_unmergeable
        from peftcli.merge.run import DriftTooLarge, MergeSettings, merge
        from peftcli.model.target import open_target

        target = open_target(str(path))
        if target.adapter is not None:
            refuse_unmergeable(target.adapter)
        loaded = load_recipe(run.recipe)
        planned = plan_recipe(loaded, shown, smoke=bool(target.identity.get("smoke")))
        plan = planned.plan
        target, data = prepare_for(planned, target, shown)
        stored = DTYPE_BYTES[dtype or plan.base.dtype]
        check_room(output_dir or run.merged, Forecast(0, 0, 0, plan.total_parameters * stored, RESERVE_BYTES))
        settings = MergeSettings(into, dtype, plan.gates, plan.evaluation, plan.evaluation_batch, plan.seed)
        try:
            found = merge(target, data, output_dir or run.merged, settings, shown)
        except DriftTooLarge as problem:
            write_json(run.merge, problem.merge)
            finish(run, loaded.recipe)
            raise
        write_json(run.merge, found)
        metrics = finish(run, loaded.recipe)
        if as_json:
            print_json(streams, found)
        else:
            _show_merge(run, found, metrics, output_dir or run.merged, streams)
        raise_unmet(metrics)


def generate_command(name: str, prompts: list[str], file: Path | None, flags: GenerateFlags) -> None:
    """Answer prompts."""
    from peftcli.generate import read_prompts

    if file is not None and not file.is_file():
        raise RecipeError(f"--file {file}: no such file")
    try:
        lines = file.read_text(encoding="utf-8").split("\n") if file is not None else sys.stdin
        asked = prompts or read_prompts(lines)
    except UnicodeDecodeError as problem:
        raise DataError(f"{file or 'standard input'}: byte {problem.start} is not UTF-8") from problem
    with shown_run(None) as (shown, streams):
        from peftcli.generate import generate, label
        from peftcli.model.answer import Decoding
        from peftcli.model.target import open_target

        target = open_target(name)
        decoding = Decoding(flags.max_new_tokens, flags.temperature, flags.top_p, flags.seed)
        rows = int(target.identity.get("evaluation_batch", 16))
        if target.base.task != CAUSAL:
            _show_labels(label(target, asked, raw=flags.raw, batch_rows=rows, progress=shown), flags, streams)
            return
        made = generate(target, asked, decoding, raw=flags.raw, batch_rows=rows, progress=shown)
        if flags.as_json:
            print_json(streams, {"answers": [vars(one) for one in made]})
            return
        for one in made:
            streams.out.write((f"{one.asked}\t" if len(made) > 1 else "") + one.answer.strip() + "\n")


def _show_labels(made: Sequence[Any], flags: GenerateFlags, streams: Streams) -> None:
    if flags.as_json:
        print_json(streams, {"answers": [one.as_dict() for one in made]})
        return
    for one in made:
        # A tagged line shows its words already.
        before = f"{one.asked}\t" if len(made) > 1 and not hasattr(one, "words") else ""
        streams.out.write(before + one.line() + "\n")


def load(name: str, overrides: Sequence[str], *, smoke: bool) -> Loaded:
    loaded = load_recipe(find_recipe(name), overrides)
    return Loaded(smoke_recipe(loaded.recipe), loaded.notices, loaded.path) if smoke else loaded


def _recipe_for(name: str | None, run: RunDir | None, overrides: Sequence[str]) -> Loaded:
    if name is not None:
        return load_recipe(find_recipe(name), overrides)
    if run is not None and run.recipe.is_file():
        return load_recipe(run.recipe, overrides)
    raise RecipeError("this target stands alone; name the recipe whose test rows count with --recipe")


def finish(run: RunDir, recipe: Recipe) -> dict[str, Any]:
    metrics = write_metrics(run, recipe.gates)
    write_report(run)
    return metrics


def show_result(run: RunDir, metrics: dict[str, Any], streams: Streams, *, as_json: bool) -> None:
    if as_json:
        print_json(streams, metrics)
        return
    out = console(streams.out)
    if metrics["smoke"]:
        out.print("smoke run: a tiny random stand-in; the numbers say nothing about the real model")
    if metrics["base"] or metrics["adapter"]:
        out.print(metric_table({name: metrics[name] for name in ("base", "adapter", "merged")}))
    if metrics["retention"]:
        out.print(retention_line(metrics["retention"]))
    if run.eval.is_file():
        samples = read_json(run.eval)["samples"]
        if samples:
            out.print()
            out.print(sample_table(samples))
    out.print()
    out.print(f"report  {run.report_html}")


def _show_merge(run: RunDir, found: dict[str, Any], metrics: dict[str, Any], folder: Path, streams: Streams) -> None:
    out = console(streams.out)
    out.print(
        f"merged into the {found['into']} base ({found['dtype']}): top-1 agreement {found['top1_agreement']:.4%} over "
        f"{found['positions']:,} positions, largest logit difference {found['max_abs_logit_difference']:.2g}"
        + ("" if found["kl_nats"] is None else f", KL {found['kl_nats']:.2g} nats")
    )
    out.print(metric_table({name: metrics[name] for name in ("base", "adapter", "merged")}))
    if run.eval.is_file():
        merged = {sample["prompt"]: sample["merged"] for sample in found["samples"]}
        out.print()
        samples = read_json(run.eval)["samples"]
        out.print(sample_table([sample | {"merged": merged.get(sample["prompt"])} for sample in samples]))
    out.print()
    out.print(f"merged model  {folder}")
    out.print(f"report        {run.report_html}")


def raise_unmet(metrics: dict[str, Any]) -> None:
    missed = unmet(metrics)
    if missed:
        raise GateNotMet("; ".join(missed))


@contextmanager
def shown_run(log: Path | None) -> Iterator[tuple[Shown, Streams]]:
    with quiet(log) as streams:
        shown = Shown(console(streams.err), speaks=is_first_process())
        try:
            yield shown, streams
        except Exception as problem:
            if not _is_out_of_memory(problem):
                raise
            raise MemoryExhausted(
                f"out of memory: {' '.join(str(problem).split())[:200]}; halve trainer.per_device_train_batch_size and "
                "double trainer.gradient_accumulation_steps, lower dataset.max_length or evaluation.batch_size, or set "
                "quantization: {bits: 4} where the base is wider"
            ) from problem
        finally:
            shown.end()


def _is_out_of_memory(problem: Exception) -> bool:
    if "torch" not in sys.modules:  # which the light commands do not import
        return isinstance(problem, MemoryError)
    from peftcli.model.memory import is_out_of_memory

    return is_out_of_memory(problem)


def print_json(streams: Streams, value: dict[str, Any]) -> None:
    streams.out.write(json.dumps(value, ensure_ascii=False) + "\n")
    streams.out.flush()
