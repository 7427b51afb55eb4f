"""`peftcli.json`: the origin of an adapter or a merged model, and checks that its files still match it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import is_offline_mode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.cache import file_hash
from peftcli.data.cache import tokenizer_fingerprint
from peftcli.data.prepare import PreparedData
from peftcli.errors import DataError, MachineError
from peftcli.model.adapter_weights import (
    WEIGHTS,
    check_adapter_files,
    hash_files,
    read_tensors,
    refuse_changed,
)
from peftcli.model.files import BaseFacts, base_facts, local_folder
from peftcli.model.hub import why_offline
from peftcli.model.load import load_tokenizer
from peftcli.plan.plan import Base, Plan, TokenizerChoice
from peftcli.recipe.paths import relative_path
from peftcli.run_dir import read_json
from peftcli.tiny.build import NAMES as TINY_NAMES
from peftcli.tiny.build import tiny_model
from peftcli.tiny.tokenizer_files import tokenizer_files

MANIFEST = "peftcli.json"
EARLIER = "earlier"
"""Subfolder of an adapter folder with the adapters of earlier stages, which are merged into its base."""
MODEL_FILES = "model_files"
"""Key with the hashes of a merged model's files."""
SCHEMA = 2
"""Schema 1 has the hash of the bytes of config.json, and nothing about weights, tokenizer and tensors."""
OPTIONAL = {field.name for field in fields(Base) if field.default is not MISSING}
"""Keys of a base that the first manifests lack."""

KEYS = {"problem_type": "problem"}
"""Keys of the file whose names differ from the fields of a base; adapters of earlier versions have them too."""


class MissingBase(MachineError):
    """The base of an adapter is at none of the places where it may be.

    Attributes:
        places: the local ones.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self.places = tuple(places)
        super().__init__(
            f"{self.places[0]}: the base that the adapter was trained on is no longer there; put it back, or pass its "
            "new location with --model"
        )


@dataclass(frozen=True)
class BaseLocation:
    """A possible location of a base."""

    path: str
    revision: str | None


def build_manifest(plan: Plan, data: PreparedData, folder: Path) -> dict[str, Any]:
    """Everything that is needed to use the folder by itself.

    Args:
        folder: with the saved adapter and its tokenizer.
    """
    base = _stated(plan.base) | asdict(base_facts(plan.base.path, plan.base.revision))
    base["absorbed"] = [os.path.relpath(one, folder) for one in earlier_in(folder)]
    base["beside"] = relative_path(plan.base.path, folder) if Path(plan.base.path).is_dir() else None
    return {
        "schema": SCHEMA,
        "kind": "adapter",
        "smoke": plan.smoke,
        "task": plan.task,
        "base": base,
        "format": data.format,
        "prompt": data.prompt,
        "stop_ids": sorted(data.stop_ids),
        "template": data.facts.get("template"),
        "max_length": plan.labels.max_length,
        "evaluation_batch": plan.evaluation_batch,
        "tokenizer": tokenizer_record(folder, plan.base.tokenizer),
        "tensors": read_tensors(folder / WEIGHTS),
        "files": hash_files(folder),
    }


def _stated(base: Base) -> dict[str, Any]:
    """The fields of a base under the keys of the file."""
    return {KEYS.get(name, name): value for name, value in asdict(base).items()}


def earlier_in(folder: Path) -> list[Path]:
    """The adapters of earlier stages in an adapter's folder, in training order."""
    return sorted((folder / EARLIER).glob("*"), key=lambda path: int(path.name))


def build_merged_manifest(found: dict[str, Any], dtype: str, folder: Path, choice: TokenizerChoice) -> dict[str, Any]:
    """The manifest of a model that was merged from an adapter.

    Args:
        found: manifest of the adapter.
        dtype: of the stored weights.
        folder: of the merged model, with its tokenizer.
    """
    kept = {key: value for key, value in found.items() if key not in ("tensors", "files")}
    merged = {"kind": "merged", "base": found["base"] | {"dtype": dtype, "absorbed": []}}
    merged[MODEL_FILES] = hash_model_files(folder)
    return kept | merged | {"tokenizer": tokenizer_record(folder, choice)}


def hash_model_files(folder: Path) -> dict[str, str]:
    """Hashes of the files of a merged model that determine its results, besides those of its tokenizer."""
    apart = {MANIFEST, "README.md", *(file.name for file in tokenizer_files(folder))}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in apart]
    return {file.name: file_hash(file) for file in files}


def check_merged(folder: Path, found: dict[str, Any]) -> None:
    """Refuse a merged model if a file of its weights or its configuration changed since it was written.

    Files of at most a GiB, as `merge` writes them, are hashed completely.

    Raises:
        MachineError: a file is missing or differs.
    """
    stated = found.get(MODEL_FILES) or {}
    changed = [name for name, digest in stated.items() if not _is_same(folder / name, digest)]
    if changed:
        raise MachineError(f"{folder}: {' and '.join(changed)} changed after merging; restore it, or merge again")


def _is_same(file: Path, digest: str) -> bool:
    return file.is_file() and file_hash(file) == digest


def check_adapter(folder: Path) -> None:
    """Refuse an adapter of this program if a file differs from what training wrote.

    Raises:
        MachineError: a file is missing, damaged or changed.
    """
    found = read_manifest(folder) or {}
    check_adapter_files(folder, found.get("tensors"))
    refuse_changed(folder, found.get("files") or {})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """`peftcli.json` of a folder; None if it has none.

    Raises:
        MachineError: it is damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    if not file.is_file():
        raise MachineError(f"{file}: not a file; restore the file")
    try:
        found = read_json(file)
        missing = {"kind", "base"} - found.keys() or {field.name for field in fields(Base)} - found["base"].keys()
    except (ValueError, AttributeError, TypeError) as problem:
        raise MachineError(f"{file}: damaged ({problem}); restore the file") from problem
    if missing - OPTIONAL:
        raise MachineError(f"{file}: damaged, lacks {', '.join(sorted(missing - OPTIONAL))}; restore the file")
    return found


def stated_base(found: dict[str, Any]) -> Base:
    """The base according to a manifest."""
    keys = {field.name: KEYS.get(field.name, field.name) for field in fields(Base)}
    given: dict[str, Any] = {name: found["base"][key] for name, key in keys.items() if key in found["base"]}
    lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Base(**(given | lists))


def base_of(found: dict[str, Any], device: str, places: Sequence[BaseLocation]) -> Base:
    """The base of a manifest, on the current device.

    Args:
        found: the manifest.
        places: possible locations of the base; the first that contains it is used.

    Raises:
        MissingBase: it is at none of them.
        MachineError: another one is.
    """
    stated = stated_base(found)
    if stated.name in TINY_NAMES and not any(Path(place.path).is_dir() for place in places):
        places = [BaseLocation(str(tiny_model(stated.name)), None)]  # made again if the cache was cleared
    present = [place for place in places if not _is_gone(place)]
    if not present:
        raise MissingBase(list(dict.fromkeys(place.path for place in places)))
    refusals = []
    for place in present:
        base = replace(stated, path=place.path, revision=place.revision, device=device)
        try:
            base = _pinned(base, found["base"].get("commit") if place.path == stated.path else None)
            refuse_other_base(found, base)
        except MachineError as refusal:
            refusals.append(refusal)
            continue
        return replace(base, dtype="float32") if device == "cpu" and base.dtype == "float16" else base
    raise refusals[0]


def _is_gone(place: BaseLocation) -> bool:
    return os.path.isabs(place.path) and not Path(place.path).is_dir()


def _pinned(base: Base, commit: str | None) -> Base:
    """The base at the commit of the training, even if the branch has moved since."""
    if commit is None or Path(base.path).is_dir():
        return base
    if is_offline_mode() and local_folder(base.path, commit) is None:
        raise MachineError(
            f"the adapter was trained on commit {commit} of {base.path}, which is not in the local cache, and "
            f"{why_offline()}; download that commit once"
        )
    return replace(base, revision=commit)


def refuse_other_base(found: dict[str, Any], base: Base) -> None:
    """Refuse a base that is not that of a manifest; data that is missing or not local is not compared.

    Raises:
        MachineError: it is another one.
    """
    stated, now = found["base"], base_facts(base.path, base.revision)
    rows, expected = now.embedding_rows, stated.get("embedding_rows")
    if rows is not None and expected is not None and rows != expected:
        raise MachineError(
            f"{base.path}: its embedding has {rows} rows, but the base that the adapter was trained on had {expected}; "
            "use the base that it was trained on"
        )
    if _differ(stated.get("config_sha256"), _config_now(found, base, now)):
        raise MachineError(
            f"{base.path}: its config.json differs from the one at training, so this is not the base that the adapter "
            "was trained on; use that base"
        )
    # A tiny model made on another machine has other rounding; its folder name contains its origin.
    made_alike = base.name in TINY_NAMES and Path(base.path).name == Path(stated["path"]).name
    if not made_alike and _differ(stated.get("weights_sha256"), now.weights_sha256):
        raise MachineError(
            f"{base.path}: has the same shape, but its weights differ from those at training, so this is not the base "
            "that the adapter was trained on; use that base"
        )


def config_hash(base: Base) -> str | None:
    """SHA-256 of the model that the base's config.json describes; None if it is not local."""
    return base_facts(base.path, base.revision).config_sha256


def _config_now(found: dict[str, Any], base: Base, now: BaseFacts) -> str | None:
    if found.get("schema", 1) >= SCHEMA:
        return now.config_sha256
    file = Path(base.path) / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _differ(stated: str | None, now: str | None) -> bool:
    return stated is not None and now is not None and stated != now


def token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id of a tokenizer plus 1: the number of embedding rows needed."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def refuse_unknown_tokens(model: PreTrainedModel, largest: int) -> None:
    """Stop before a token id that has no row in a model's embedding.

    Args:
        largest: token id.

    Raises:
        DataError: the embedding has no such row.
    """
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if count is not None and largest >= count:
        raise DataError(
            f"the text holds token id {largest:,}, and the embedding of this model has {count:,} rows: the tokenizer "
            "has tokens that the model was not trained with; use the model's own tokenizer, or remove the added tokens"
        )


def refuse_small_embedding(found: dict[str, Any], rows: int | None, ids: int, path: str) -> None:
    """Refuse a base without a row for every token id, unless it was trained like that.

    Args:
        found: the manifest, empty for an adapter of another tool.
        rows: rows of the base's embedding; None if unknown.
        ids: `token_ids` of the tokenizer.

    Raises:
        MachineError: an id has no row.
    """
    trained_so = (found.get("tokenizer") or {}).get("token_ids") == ids
    if rows is not None and rows < ids and not trained_so:
        raise MachineError(
            f"{path}: its embedding has {rows} rows, but the adapter's tokenizer needs {ids}; "
            "use the base and the tokenizer that the adapter was trained with"
        )


def tokenizer_record(folder: Path, choice: TokenizerChoice) -> dict[str, Any]:
    """A record that identifies a folder's tokenizer: the hashes of its files, and of the loaded tokenizer.

    Unchanged files are sufficient; if they were rewritten, the loaded tokenizer is compared.
    """
    record = {"files": _files(folder), "sha256": None, "template_sha256": None, "token_ids": None}
    try:
        return record | _made(load_tokenizer(choice, str(folder)))
    except Exception:  # saving must not fail here; the hashes of the files remain
        return record


def check_tokenizer(folder: Path, found: dict[str, Any], base: Base) -> None:
    """Refuse a folder whose tokenizer or chat template differs from that of the training.

    Args:
        found: the manifest of the folder.
        base: of the adapter, or the merged model itself.

    Raises:
        MachineError: it was changed; the message lists the files.
    """
    stated = found.get("tokenizer")
    if stated is None:
        return
    files = _files(folder)
    changed = sorted(name for name in files.keys() | stated["files"] if files.get(name) != stated["files"].get(name))
    if not changed:
        return
    try:
        tokenizer = load_tokenizer(base.tokenizer, str(folder))
    except Exception as problem:  # the tokenizers library raises plain exceptions
        raise _changed(folder, ["tokenizer"], changed) from problem
    rows = base_facts(base.path, base.revision).embedding_rows
    refuse_small_embedding(found, rows, token_ids(tokenizer), base.path)
    now = _made(tokenizer)
    said = {"sha256": "tokenizer", "template_sha256": "chat template"}
    other = [name for key, name in said.items() if now[key] != stated[key]]
    if other:
        raise _changed(folder, other, changed)


def _changed(folder: Path, what: list[str], files: list[str]) -> MachineError:
    was = "was" if len(what) == 1 else "were"
    return MachineError(
        f"{folder}: the {' and the '.join(what)} {was} changed after training ({', '.join(files)}); restore what "
        "training wrote"
    )


def _files(folder: Path) -> dict[str, str]:
    """Hash of each tokenizer file by its name in the folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in tokenizer_files(folder)
    }


def _made(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Hashes of a tokenizer and of its template, separately."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    tokenizer.chat_template = None
    return {
        "sha256": tokenizer_fingerprint(tokenizer),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "token_ids": token_ids(tokenizer),
    }
