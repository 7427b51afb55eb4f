"""The body of `compare`: variants or existing runs, the table and the report."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.cli.console import Shown, console
from peftcli.cli.recipes import find_recipe
from peftcli.cli.targets import missing_folder
from peftcli.cli.text import JSON_OUTPUT
from peftcli.compare.results import RESULT, Entry, collect, is_run, open_runs
from peftcli.compare.run import VariantRunner
from peftcli.compare.variants import Variant, check_variants, make_variants, read_axes
from peftcli.errors import Aborted, RecipeError, Stopped
from peftcli.recipe.load import load_run_recipe
from peftcli.report.compare import make_comparison, winner, write_comparison
from peftcli.report.format import several
from peftcli.report.terminal import render_terminal
from peftcli.results import CompareJson, as_text, save
from peftcli.run_dir import RunDir
from peftcli.train.resume import DEFAULT_EPOCHS, can_be_longer

GATE_NOT_MET = 7


@dataclass(frozen=True)
class CompareFlags:
    """The flags of `compare`."""

    vary: tuple[str, ...]
    overrides: tuple[str, ...]
    output_dir: Path | None
    smoke: bool
    as_json: bool


def compare_command(targets: Sequence[str], flags: CompareFlags, out: Any, err: Any) -> int:
    """Compare existing runs, or train the variants of recipes first.

    Args:
        targets: run folders, or recipes.
        out: stream for the result.
        err: stream for progress and notes.

    Returns:
        The exit code: 0 if every variant finished, otherwise that of the first one that did not.
    """
    if all(is_run(Path(target)) for target in targets):
        return _compare_runs([Path(target) for target in targets], flags, out)
    for target in targets:
        if is_run(Path(target)):
            raise RecipeError(f"{target} is a run and other targets are recipes; compare only runs or only recipes")
        if Path(target).suffix not in (".yaml", ".yml") and len(Path(target).parts) > 1 and not Path(target).exists():
            raise missing_folder(Path(target))
    recipes = [find_recipe(target) for target in targets]
    variants = make_variants(recipes, read_axes(flags.vary), flags.overrides)
    check_variants(variants)
    name = recipes[0].stem if len(recipes) == 1 else "recipes"
    home = Path(os.path.abspath(flags.output_dir or Path("runs") / f"{name}-compare{'-smoke' if flags.smoke else ''}"))
    shown = Shown(console(err))
    shown.note(f"{len(variants)} variants, one after the other, in {home}; finished variants are not trained again")
    entries: list[Entry] = []
    with VariantRunner() as children:
        for number, variant in enumerate(variants, start=1):
            if children.stopped_by is None:
                shown.note(f"variant {number} of {len(variants)}: {variant.name}")
                entries.append(_train(children, variant, home, entries, flags.smoke, shown))
            else:
                entries.append(Entry(variant.name, home / variant.name, dict(variant.varied)))
    comparison = _write(name, entries, home)
    _say_cache(comparison, shown)
    if flags.as_json or any(row.is_finished for row in comparison.variants):
        _show(comparison, entries, home, flags, out)
    _raise_if_stopped(children, entries)
    return _ended(entries, shown)


def _compare_runs(folders: Sequence[Path], flags: CompareFlags, out: Any) -> int:
    if flags.vary or flags.overrides or flags.smoke:
        raise RecipeError("--vary, --set and --smoke need recipes, but the targets are runs; remove these options")
    entries = open_runs(folders)
    default = folders[0] if len(folders) == 1 else Path("runs") / "compare"
    home = Path(os.path.abspath(flags.output_dir or default))
    _show(_write(home.name, entries, home), entries, home, flags, out)
    return 0


def _train(
    children: VariantRunner, variant: Variant, home: Path, before: Sequence[Entry], smoke: bool, shown: Shown
) -> Entry:
    folder = home / variant.name
    source_run = next((entry.folder for entry in before if entry.exit_code in (0, GATE_NOT_MET)), None)
    flags = [*(["--smoke"] if smoke else []), *([] if source_run is None else ["--baseline-from", str(source_run)])]
    code, error = children.train(variant, folder, flags, shown)
    if children.stopped_by is not None and code not in (0, GATE_NOT_MET):
        # The exit code differs if the signal arrived before the child had installed its handler.
        code, error = Stopped.exit_code, None
    return Entry(variant.name, folder, dict(variant.varied), code, error)


def _write(name: str, entries: Sequence[Entry], home: Path) -> CompareJson:
    comparison = collect(name, entries, home)
    save(home / RESULT, comparison)
    write_comparison(comparison, home)
    return comparison


def _show(comparison: CompareJson, entries: Sequence[Entry], home: Path, flags: CompareFlags, out: Any) -> None:
    if flags.as_json:
        JSON_OUTPUT.write(as_text(comparison), out)
        return
    shown = console(out)
    render_terminal(make_comparison(comparison), shown)
    shown.print(f"report  {home / 'compare.html'}")
    if further := _further(comparison, entries):
        shown.print(further, soft_wrap=True)


def _further(comparison: CompareJson, entries: Sequence[Entry]) -> str | None:
    """The command that trains the best variant further; None without one, or where it cannot be."""
    best = winner(comparison.variants)
    if best is None or comparison.smoke or not best.steps:
        return None
    folder = next(entry.folder for entry in entries if entry.name == best.name)
    recipe = load_run_recipe(RunDir(folder).recipe).recipe
    if not can_be_longer(recipe):
        return None
    planned, epochs = recipe.trainer.get("max_steps", -1), recipe.trainer.get("num_train_epochs", DEFAULT_EPOCHS)
    more = f"trainer.max_steps={2 * best.steps}" if planned > 0 else f"trainer.num_train_epochs={2 * epochs:g}"
    words = ["peftcli", "train", os.path.relpath(folder), "--set", more]
    return f"to train {best.name} further, for example twice as long: {shlex.join(words)}"


def _say_cache(comparison: CompareJson, shown: Shown) -> None:
    caches = [row.data_cache for row in comparison.variants if row.data_cache]
    if caches:
        made, reused = caches.count("made"), caches.count("reused")
        shown.note(f"data prepared by {several(made, 'variant', 'variants')}, reused from the cache by {reused}")


def _raise_if_stopped(children: VariantRunner, entries: Sequence[Entry]) -> None:
    if children.stopped_by is None:
        return
    done = sum(entry.exit_code in (0, GATE_NOT_MET) for entry in entries)
    if done == len(entries):
        return
    progress = f"with {done} of {len(entries)} variants finished; run the same command again to resume"
    if children.at_once:
        raise Aborted(f"stopped at once {progress} from the last checkpoint")
    raise Stopped(f"stopped by {children.stopped_by} {progress}")


def _ended(entries: Sequence[Entry], shown: Shown) -> int:
    bad = [entry for entry in entries if entry.exit_code]
    if not bad:
        return 0
    first = bad[0]
    shown.note(f"{len(bad)} of {len(entries)} variants failed; the exit code {first.exit_code} is that of {first.name}")
    return first.exit_code or 0
