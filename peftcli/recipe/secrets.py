"""Access tokens and keys do not belong in a recipe: it is copied into every run folder."""

import re
from collections.abc import Iterator
from typing import Any

from peftcli.recipe.problems import KeyPath, Problems, dotted, is_secret
from peftcli.recipe.yaml_text import Tree

_HEX_KEY = re.compile(r"[0-9a-fA-F]{40}")
_SECRET_KEY = re.compile(r"(^|_)(key|token|secret|password)$", re.IGNORECASE)
_VARIABLES = (
    ("hf_", "HF_TOKEN"),
    ("sk-", "OPENAI_API_KEY"),
    ("AKIA", "AWS_ACCESS_KEY_ID"),
    ("gh", "GITHUB_TOKEN"),
)


def find_secrets(tree: Tree, problems: Problems) -> None:
    """Add a problem for each value that looks like a secret; the value itself is shown nowhere."""
    for path, value in _texts(tree.values, ()):
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        hex_key = _SECRET_KEY.search(key) is not None and _HEX_KEY.fullmatch(value) is not None
        if not (is_secret(value) or hex_key):
            continue
        names = [name for start, name in _VARIABLES if start in value and not hex_key]
        variable = names[0] if names else "WANDB_API_KEY"
        problems.add(
            tree.place(path),
            f"{dotted(path)} looks like a secret, and a recipe is copied into every run folder; remove it, "
            f"revoke it if the file was shared, and set the environment variable {variable}",
        )
        tree.spoiled.add(path)


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index))
    elif isinstance(value, str):
        yield path, value
