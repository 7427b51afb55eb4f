"""Copies a run into a folder for an archive, with relative paths only, and checks that nothing private is left."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.data.input_files import content_hash
from peftcli.errors import DataError, MachineError
from peftcli.model.adapter_weights import hash_files
from peftcli.model.manifest import MANIFEST, MODEL_FILES, hash_model_files, read_manifest
from peftcli.pack.archive import packed_files
from peftcli.pack.private import Private
from peftcli.recipe.dump import dump_recipe
from peftcli.recipe.fields import freeze_mapping
from peftcli.recipe.paths import MODEL, data_keys, input_paths, with_paths
from peftcli.recipe.problems import KeyPath, dotted
from peftcli.recipe.schema import Recipe
from peftcli.report.build import write_report
from peftcli.results import InputFile, InputsJson, PackedBase, PackJson, load_or_default, save
from peftcli.run_dir import RunDir, read_json, write_json, write_plain_json, write_text
from peftcli.tiny.build import NAMES as TINY_NAMES
from peftcli.tiny.tokenizer_files import tokenizer_files

NEEDS_MODEL, NEEDS_DATA = "--model PATH", "--data PATH"
DESCRIPTION = "pack.json"
WITH_ROWS = ("data.json", "eval.json", "merge.json", "metrics.json", "compare.json")
"""Files that quote rows, in which a path may be part of a text."""
CLEANED = ("adapter_config.json", "tokenizer_config.json", "config.json", "generation_config.json", "peftcli.json")
"""JSON files of a model that may hold paths; the others are only checked."""


@dataclass(frozen=True)
class PackOptions:
    """What goes into an archive.

    Attributes:
        merged: the merged model instead of the adapter.
        base: folder of the base model to include; None to leave it out.
    """

    merged: bool = False
    base: Path | None = None


def stage_run(run: RunDir, recipe: Recipe, options: PackOptions, folder: Path) -> RunDir:
    """Copy the files of a run into an empty folder, without anything that names this machine.

    Args:
        recipe: of the run, with the paths of its files on this machine.

    Raises:
        MachineError: there is no adapter, or no merged model.
    """
    staged = RunDir(folder)
    source, target = (run.merged, staged.merged) if options.merged else (run.adapter, staged.adapter)
    manifest = read_manifest(source)
    if manifest is None:
        fix = f"`peftcli merge {run.path}`" if options.merged else "`peftcli train` again to finish it"
        raise MachineError(f"{source}: no such model; run {fix} first")
    private = Private.of_machine(private_paths(run, recipe, manifest))
    for file in _json_files(run):
        name = file.relative_to(run.path)
        all_paths = file.name not in WITH_ROWS
        write_json(folder / name, private.clean_json(read_json(file), all_paths=all_paths))
    for file in (run.log, run.rows):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    _copy_model(source, target, private)
    _rewrite_manifest(target, manifest, private)
    if options.base is not None:
        _copy_model(options.base, folder / base_folder_name(manifest), private)
    _write_recipe(staged, run, recipe)
    return staged


def private_paths(run: RunDir, recipe: Recipe, manifest: Mapping[str, Any]) -> list[str]:
    """The absolute paths of a run, its base and its files, now and at the time of training."""
    recorded = [one.path for one in load_or_default(InputsJson, run.inputs).inputs]
    base = [str(manifest["base"][key]) for key in ("name", "path")]
    stages = [str(part) for part in run.stages.glob("*")]
    found = [str(run.path.absolute()), *stages, *recorded, *input_paths(recipe).values(), *base]
    return [path for path in found if os.path.isabs(path)]


def base_folder_name(manifest: Mapping[str, Any]) -> str:
    """The name of the folder in the run folder where a local base of a packed run is looked for."""
    return Path(str(manifest["base"]["path"])).name


def _json_files(run: RunDir) -> Iterator[Path]:
    files = (run.plan, run.environment, run.data, run.train, run.eval, run.merge, run.metrics, run.ranks, run.selection)
    earlier = [part / name for part in sorted(run.stages.glob("*")) for name in (run.plan.name, run.metrics.name)]
    yield from (file for file in (*files, *earlier) if file.is_file())


def _copy_model(source: Path, target: Path, private: Private) -> None:
    for file, name in packed_files(source):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        if file.name in CLEANED:
            _copy_json(file, copy, private)
        elif file.name == "README.md":
            write_text(copy, private.clean(file.read_text(encoding="utf-8")))
        else:
            shutil.copyfile(file, copy)


def _copy_json(file: Path, copy: Path, private: Private) -> None:
    """Copy a JSON file; one that names nothing private keeps its bytes, and so its hash."""
    value = read_json(file)
    cleaned = private.clean_json(value)
    if cleaned == value:
        shutil.copyfile(file, copy)
    else:
        write_plain_json(copy, cleaned)


def _rewrite_manifest(folder: Path, manifest: dict[str, Any], private: Private) -> None:
    """Write `peftcli.json` with relative paths, and the hashes of the files without private paths."""
    base = private.clean_json(manifest["base"])
    if os.path.isabs(manifest["base"]["path"]):
        place = f"../{base_folder_name(manifest)}"
        base |= {"path": place, "beside": place}
    found = private.clean_json(manifest) | {"base": base}
    if manifest["kind"] == "adapter":
        found["files"] = hash_files(folder)
    elif MODEL_FILES in manifest:
        found[MODEL_FILES] = hash_model_files(folder)
    if manifest.get("tokenizer") is not None:
        hashes = {str(file.relative_to(folder)): _sha256(file) for file in tokenizer_files(folder)}
        found["tokenizer"] = manifest["tokenizer"] | {"files": hashes}
    write_json(folder / MANIFEST, found)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_recipe(staged: RunDir, run: RunDir, recipe: Recipe) -> None:
    """Write the recipe with all of its files in the run folder, and `inputs.json`."""
    hashes = {one.key: one.sha256 for one in load_or_default(InputsJson, run.inputs).inputs}
    named = _own_names(input_paths(recipe))
    places = {key: str(staged.path / name) for key, name in named.items()}
    of_data = set(data_keys(recipe))
    inputs = tuple(
        InputFile(key=dotted(key), path=name, beside=name, sha256=_hash_of(key, places[key], hashes))
        for key, name in named.items()
        if key in of_data or key == MODEL
    )
    trainer = {key: os.path.basename(one) if _is_path(one) else one for key, one in recipe.trainer.items()}
    packed = with_paths(recipe, places).model_copy(update={"output_dir": None, "trainer": freeze_mapping(trainer)})
    packed._relative = frozenset(map(dotted, places))
    write_text(staged.recipe, dump_recipe(packed, staged.recipe))
    save(staged.inputs, InputsJson(inputs=inputs))


def _hash_of(key: KeyPath, place: str, hashes: Mapping[str, str | None]) -> str | None:
    return content_hash(place) if os.path.exists(place) and key != MODEL else hashes.get(dotted(key))


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and os.path.isabs(value)


def _own_names(paths: Mapping[KeyPath, str]) -> dict[KeyPath, str]:
    """The last component of each path; two files of one name in different folders get different names."""
    names: dict[KeyPath, str] = {}
    for key, path in paths.items():
        name, number = os.path.basename(path), 1
        while any(names[other] == name and paths[other] != path for other in names):
            number += 1
            stem, ending = os.path.splitext(os.path.basename(path))
            name = f"{stem}-{number}{ending}"
        names[key] = name
    return names


def packed_base(manifest: Mapping[str, Any], options: PackOptions) -> PackedBase:
    """How another machine gets the base of a run."""
    base = manifest["base"]
    local = os.path.isabs(base["path"])
    if options.merged:
        found_by = None
    elif base["name"] in TINY_NAMES:
        found_by = "built_in"
    elif options.base is not None:
        found_by = "archive"
    else:
        found_by = "model_option" if local else "hub"
    return PackedBase(
        name=Path(base["name"]).name if os.path.isabs(base["name"]) else base["name"],
        found_by=found_by,
        commit=base.get("commit"),
        config_sha256=base.get("config_sha256"),
        weights_sha256=base.get("weights_sha256"),
    )


def finish_stage(staged: RunDir, private: Private, described: PackJson) -> None:
    """Write the reports and `pack.json`, and check every file.

    Raises:
        DataError: a test row has something private.
        MachineError: another file has.
    """
    write_report(staged)
    files = {name: _sha256(file) for file, name in packed_files(staged.path)}
    save(staged.path / DESCRIPTION, PackJson(**vars(described) | {"files": files}))
    for file, name in packed_files(staged.path):
        refuse_private(file, name, private)


def refuse_private(file: Path, name: str, private: Private) -> None:
    """Refuse a file that names this machine.

    Raises:
        DataError: it has test rows; the message has the first line.
        MachineError: it has none.
    """
    leaks = private.leaks(name.encode() + b"\n" + file.read_bytes(), name)
    if not leaks:
        return
    if name.endswith(".jsonl"):
        lines = file.read_bytes().split(b"\n")
        line = next((number for number, row in enumerate(lines, start=1) if private.leaks(row, name)), 1)
        raise DataError(
            f"{name}:{line}: this test row has {leaks[0]} of this machine, which an archive must not have; mask it in "
            "the data, or pack without --with-test-rows"
        )
    raise MachineError(
        f"{name}: has {leaks[0]} of this machine, which an archive must not have; remove it from that file of the run"
    )
