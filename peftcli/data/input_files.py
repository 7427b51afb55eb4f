"""Where the files that a run was trained on are now: a run folder, its data and its recipe may have moved since."""

import glob
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftcli.data.readers.files import list_files
from peftcli.errors import DataError
from peftcli.recipe.paths import data_keys, input_paths, path_from, relative_path, with_paths
from peftcli.recipe.problems import KeyPath, dotted
from peftcli.recipe.schema import Recipe
from peftcli.results import InputFile, InputsJson, load_or_default
from peftcli.run_dir import RunDir


@dataclass(frozen=True)
class FoundInputs:
    """The rows of a run where they are now.

    Attributes:
        recipe: with their current paths.
        missing: each key whose files are nowhere, and where they were looked for, first the place at training.
        notes: files whose content differs from what was trained on, where the user pointed to them.
    """

    recipe: Recipe
    missing: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]


def record_inputs(recipe: Recipe, run: RunDir) -> InputsJson:
    """The files that a recipe names, as `inputs.json` of its run lists them."""
    of_data = set(data_keys(recipe))
    return InputsJson(
        inputs=tuple(
            InputFile(
                key=dotted(key),
                path=path,
                beside=relative_path(path, run.path),
                sha256=content_hash(path) if key in of_data else None,
            )
            for key, path in input_paths(recipe).items()
        )
    )


def content_hash(path: str) -> str | None:
    """SHA-256 over the files of a path, a folder or a glob with their names; None if there are none."""
    try:
        files = list_files(Path(path), frozenset(), None)
        digest = hashlib.sha256()
        for file in files:
            name = file.name if len(files) > 1 else ""  # a single file may be renamed
            with file.open("rb") as stream:
                digest.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
    except (DataError, OSError):  # reading the rows gives the message
        return None
    return digest.hexdigest()


def find_inputs(recipe: Recipe, run: RunDir | None, given: Sequence[str], fixed: Collection[str]) -> FoundInputs:
    """Find the files with the rows of a recipe.

    Each is looked for at the path where it was at training, then at the same place as seen from the run folder, then
    under its name in or beside the run folder, where only the same content counts.

    Args:
        recipe: of the run, with absolute paths.
        run: None for a recipe without a run; then only `given` matters.
        given: files or folders from `--data`.
        fixed: dotted keys from `--set`, whose values are not looked for.

    Raises:
        DataError: a file from `--data` does not exist, or matches nothing in the recipe.
    """
    recorded = {} if run is None else {one.key: one for one in load_or_default(InputsJson, run.inputs).inputs}
    written = {key: path for key in data_keys(recipe) if (path := input_paths(recipe).get(key)) is not None}
    pointed = point_to(written, given)
    found, missing, notes = dict(pointed), [], []
    for key, path in written.items():
        record = recorded.get(dotted(key))
        if key in pointed:
            if record is not None and record.sha256 not in (None, content_hash(pointed[key])):
                notes.append(f"note: {pointed[key]} differs from the {Path(record.path).name} that was trained on")
        elif run is not None and not _is_fixed(dotted(key), fixed):
            place = _current_place(path, record, run)
            if place is None:
                missing.append((dotted(key), tuple(_places(path, record, run))))
            found[key] = place or path
    return FoundInputs(with_paths(recipe, found), tuple(missing), tuple(notes))


def _is_fixed(key: str, fixed: Collection[str]) -> bool:
    return any(key == one or key.startswith((f"{one}.", f"{one}[")) for one in fixed)


def _current_place(path: str, record: InputFile | None, run: RunDir) -> str | None:
    """Where a file is now; None if it is nowhere."""
    places = [place for place in _places(path, record, run) if exists(place)]
    expected = None if record is None else record.sha256
    if len(places) > 1 and expected is not None:
        places = sorted(places, key=lambda place: content_hash(place) != expected)  # stable: otherwise the first
    if places or expected is None:
        return places[0] if places else None
    return next((place for place in _by_name(path, run) if exists(place) and content_hash(place) == expected), None)


def _places(path: str, record: InputFile | None, run: RunDir) -> list[str]:
    """The places of a file, first the one at training.

    A path that the user has since changed in the recipe of the run is the only one.
    """
    if record is None:
        return [path]
    beside = path_from(run.path, record.beside)
    at_training = path_from(run.path, record.path)  # relative in a packed run
    known = (at_training, beside, os.path.normpath(os.path.join(os.path.abspath(run.path), record.beside)))
    return list(dict.fromkeys(known[:2])) if path in known else [path]


def _by_name(path: str, run: RunDir) -> Iterator[str]:
    folder, name = Path(os.path.realpath(run.path)), Path(path).name
    yield from (str(place / name) for place in (folder, folder.parent, folder.parent / "data", folder.parent.parent))


def exists(path: str) -> bool:
    """Whether a path exists, or a glob matches."""
    return os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))


def point_to(written: Mapping[KeyPath, str], given: Sequence[str]) -> dict[KeyPath, str]:
    """The keys that `--data` gives other files.

    A file takes the place of the one of its name, otherwise of the training rows; a folder that of the recipe's folder,
    or of all files that it has under their names.

    Args:
        written: the paths in the recipe by key, the training rows first.
        given: paths from the command line.

    Raises:
        DataError: one does not exist, or matches nothing.
    """
    found: dict[KeyPath, str] = {}
    for text in given:
        place = os.path.abspath(text)
        if not exists(place):
            raise DataError(f"--data {text}: no such file or folder; pass the file with the rows, or a folder with it")
        found |= _matches(written, place, text)
    return found


def _matches(written: Mapping[KeyPath, str], place: str, text: str) -> dict[KeyPath, str]:
    names = {key: os.path.basename(path) for key, path in written.items()}
    same = [key for key, name in names.items() if name == os.path.basename(place)]
    inside = {key: os.path.join(place, name) for key, name in names.items() if exists(os.path.join(place, name))}
    if same or not os.path.isdir(place):
        key = next(iter(same or names), None)
        if key is None:
            raise DataError(f"--data {text}: the recipe reads no files; set its source with --set")
        return {key: place}
    if inside:
        return inside
    folders = [key for key, path in written.items() if not os.path.isfile(path) and not os.path.splitext(path)[1]]
    if not folders:
        raise DataError(
            f"--data {text}: has no {' and no '.join(dict.fromkeys(names.values()))}; pass the file itself, or "
            "a folder with files of these names"
        )
    return {folders[0]: place}
