"""What a checkpoint was made from besides its recipe: data, base model and library versions."""

from collections.abc import Collection, Mapping
from typing import Any

from peftcli.errors import RecipeError

VERSIONED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
"""Libraries that a training step goes through."""


def make_stamp(data: Mapping[str, Any], base: str | None, versions: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on to the same bits.

    Args:
        data: the content of `data.json`.
        base: identity of the base model's files, None where it is not known.
        versions: of the installed packages, by name.
    """
    return {
        "data.train": data["fingerprint"]["train"],
        "data.test": data["fingerprint"]["test"],
        "base": base,
        **{f"versions.{name}": versions.get(name) for name in VERSIONED},
    }


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Compare the stamp of a checkpoint with that of this session.

    Args:
        allowed: keys, or their first parts such as `data`, that `--force` names.

    Returns:
        What differs and is allowed to, as sentences.

    Raises:
        RecipeError: something else differs; every key of it is listed.
    """
    changed = {
        key: f"{key}: {shown_value(before[key])} -> {shown_value(now.get(key))}"
        for key in before
        if before[key] is not None and now.get(key) is not None and before[key] != now[key]
    }
    refused = [line for key, line in changed.items() if not is_allowed(key, allowed)]
    if refused:
        keys = sorted({key.split(".")[0] for key in changed if not is_allowed(key, allowed)})
        raise RecipeError(
            "the run cannot go on to the same result, since this changed after its checkpoint:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nput it back, pass --overwrite to begin anew, or accept it with --force {' --force '.join(keys)}"
        )
    return [f"changed and accepted: {line}" for line in changed.values()]


def is_allowed(key: str, allowed: Collection[str]) -> bool:
    """Whether a key, or a section that it stands in, was named.

    >>> is_allowed("versions.torch", ["versions"]), is_allowed("data.train", ["data.test"])
    (True, False)
    """
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def shown_value(value: Any) -> str:
    """A value for a message: a hash by its beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
