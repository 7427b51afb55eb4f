"""`peftcli.json`: what an adapter or a merged model was made of, and whether its files still agree with it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import is_offline_mode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.cache import tokenizer_fingerprint
from peftcli.data.prepare import PreparedData
from peftcli.errors import DataError, MachineError
from peftcli.model.adapter_weights import WEIGHTS, hash_files, read_tensors
from peftcli.model.files import BaseFacts, base_facts, local_folder
from peftcli.model.hub import why_offline
from peftcli.model.load import load_tokenizer
from peftcli.plan.plan import Base, Plan, TokenizerChoice
from peftcli.run_dir import read_json
from peftcli.tiny.build import NAMES as TINY_NAMES
from peftcli.tiny.build import tiny_model
from peftcli.tiny.own_files import tokenizer_files

MANIFEST = "peftcli.json"
EARLIER = "earlier"
"""Folder in that of an adapter, with the adapters of earlier stages, which its base is folded with."""
SCHEMA = 2
"""1 held the hash of the bytes of config.json, and nothing of weights, tokenizer and tensors."""
OPTIONAL = {field.name for field in fields(Base) if field.default is not MISSING}
"""Of a base; they came later than the first identities."""

KEYS = {"problem_type": "problem"}
"""Keys of the file that are not named as the field of a base; adapters of earlier versions have them too."""


@dataclass(frozen=True)
class BaseLocation:
    """Where a base may lie now."""

    path: str
    revision: str | None


def build_manifest(plan: Plan, data: PreparedData, folder: Path) -> dict[str, Any]:
    """What somebody who has only the folder must know.

    Args:
        folder: holds the written adapter and its tokenizer.
    """
    base = _stated(plan.base) | asdict(base_facts(plan.base.path, plan.base.revision))
    base["absorbed"] = [os.path.relpath(one, folder) for one in earlier_in(folder)]
    base["beside"] = os.path.relpath(plan.base.path, folder) if Path(plan.base.path).is_dir() else None
    return {
        "schema": SCHEMA,
        "kind": "adapter",
        "smoke": plan.smoke,
        "task": plan.task,
        "base": base,
        "format": data.format,
        "prompt": data.prompt,
        "stop_ids": sorted(data.stop_ids),
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
    """The adapters of earlier stages that an adapter's folder holds, in the order in which they were trained."""
    return sorted((folder / EARLIER).glob("*"), key=lambda path: int(path.name))


def build_merged_manifest(found: dict[str, Any], dtype: str, folder: Path, choice: TokenizerChoice) -> dict[str, Any]:
    """The identity of a model that was merged from an adapter.

    Args:
        found: identity of the adapter.
        dtype: of the stored weights.
        folder: of the merged model, with its tokenizer.
    """
    kept = {key: value for key, value in found.items() if key != "tensors"}
    merged = {"kind": "merged", "base": found["base"] | {"dtype": dtype, "absorbed": []}}
    return kept | merged | {"tokenizer": tokenizer_record(folder, choice)}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """`peftcli.json` of a folder, or None where it has none.

    Raises:
        MachineError: it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        found = read_json(file)
        missing = {"kind", "base"} - found.keys() or {field.name for field in fields(Base)} - found["base"].keys()
    except (ValueError, AttributeError, TypeError) as problem:
        raise MachineError(f"{file}: damaged, not what training wrote ({problem}); restore the file") from problem
    if missing - OPTIONAL:
        raise MachineError(f"{file}: damaged, lacks {', '.join(sorted(missing - OPTIONAL))}; restore the file")
    return found


def stated_base(found: dict[str, Any]) -> Base:
    """The base as an identity states it."""
    keys = {field.name: KEYS.get(field.name, field.name) for field in fields(Base)}
    given: dict[str, Any] = {name: found["base"][key] for name, key in keys.items() if key in found["base"]}
    lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Base(**(given | lists))


def base_of(found: dict[str, Any], device: str, places: Sequence[BaseLocation]) -> Base:
    """The base that an identity names, on the device of now.

    Args:
        found: the identity.
        places: where the base may lie; the first that holds it is taken.

    Raises:
        MachineError: it lies at none of them, or another one does.
    """
    stated = stated_base(found)
    if stated.name in TINY_NAMES and not any(Path(place.path).is_dir() for place in places):
        places = [BaseLocation(str(tiny_model(stated.name)), None)]  # made anew where the cache was emptied
    present = [place for place in places if not _is_gone(place)]
    if not present:
        raise MachineError(
            f"{stated.path}: the base that the adapter was trained on is no longer there; put it back, or write its "
            "new place into model.name of the run's recipe.yaml (of an adapter alone: of a recipe for --recipe)"
        )
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
    """The base at the commit that was trained on, however the branch has moved since."""
    if commit is None or Path(base.path).is_dir():
        return base
    if is_offline_mode() and local_folder(base.path, commit) is None:
        raise MachineError(
            f"the adapter was trained on commit {commit} of {base.path}, which is not in the local cache, and "
            f"{why_offline()}; download that commit once"
        )
    return replace(base, revision=commit)


def refuse_other_base(found: dict[str, Any], base: Base) -> None:
    """Refuse a base that is not the one of an identity; what was not recorded, or is not here, is not compared.

    Raises:
        MachineError: it is another one.
    """
    stated, now = found["base"], base_facts(base.path, base.revision)
    rows, expected = now.embedding_rows, stated.get("embedding_rows")
    if rows is not None and expected is not None and rows != expected:
        raise MachineError(
            f"{base.path}: its embedding has {rows} rows, the base that the adapter was trained on had {expected}; "
            "give it the base that it was trained on"
        )
    if _differ(stated.get("config_sha256"), _config_now(found, base, now)):
        raise MachineError(
            f"{base.path}: its config.json differs from the one at training, so this is not the base that the adapter "
            "was trained on; give it that one"
        )
    # A tiny model that was made on another machine is rounded otherwise; its folder's name says of what it was made.
    made_alike = base.name in TINY_NAMES and Path(base.path).name == Path(stated["path"]).name
    if not made_alike and _differ(stated.get("weights_sha256"), now.weights_sha256):
        raise MachineError(
            f"{base.path}: of the same shape, but its weights differ from those at training, so this is not the base "
            "that the adapter was trained on; give it that one"
        )


def config_hash(base: Base) -> str | None:
    """SHA-256 of the model that the base's config.json describes, None where it is not here."""
    return base_facts(base.path, base.revision).config_sha256


def _config_now(found: dict[str, Any], base: Base, now: BaseFacts) -> str | None:
    if found.get("schema", 1) >= SCHEMA:
        return now.config_sha256
    file = Path(base.path) / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _differ(stated: str | None, now: str | None) -> bool:
    return stated is not None and now is not None and stated != now


def token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id of a tokenizer and 1: the rows that an embedding needs."""
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
        found: the identity, empty for an adapter that is not ours.
        rows: of the base's embedding, None where that is not known.
        ids: `token_ids` of the tokenizer.

    Raises:
        MachineError: an id has no row.
    """
    trained_so = (found.get("tokenizer") or {}).get("token_ids") == ids
    if rows is not None and rows < ids and not trained_so:
        raise MachineError(
            f"{path}: its embedding has {rows} rows, the adapter's tokenizer needs {ids}; "
            "give the adapter the base and the tokenizer that it was trained with"
        )


def tokenizer_record(folder: Path, choice: TokenizerChoice) -> dict[str, Any]:
    """What tells a folder's tokenizer from any other: the hashes of its files, and those of what they make.

    The files alone decide where they are as they were; what they make decides where they were written anew.
    """
    record = {"files": _files(folder), "sha256": None, "template_sha256": None, "token_ids": None}
    try:
        return record | _made(load_tokenizer(choice, str(folder)))
    except Exception:  # an adapter must not be lost over the proof of its tokenizer; the files' hashes are one
        return record


def check_tokenizer(folder: Path, found: dict[str, Any], base: Base) -> None:
    """Refuse a folder whose tokenizer or chat template is not the one of the training.

    Args:
        found: the identity of the folder.
        base: under the adapter, or the merged model itself.

    Raises:
        MachineError: it was changed; the message names the files.
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
    except Exception as problem:  # the tokenizers library raises bare ones
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
    """Hash of each file that a tokenizer may be read from, by its name in the folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in tokenizer_files(folder)
    }


def _made(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Hashes of a tokenizer and of its template; the template is taken off."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    tokenizer.chat_template = None
    return {
        "sha256": tokenizer_fingerprint(tokenizer),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "token_ids": token_ids(tokenizer),
    }
