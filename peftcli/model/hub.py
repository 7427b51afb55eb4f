"""What to say when a model cannot be had."""

import difflib
from pathlib import Path

from huggingface_hub import constants


def explain_missing(name: str, problem: Exception) -> str:
    """One line on why a model folder or Hub id could not be loaded, and the mend.

    Args:
        name: as asked for.
        problem: what the library raised.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return f"{name}: this folder holds no usable model: {_first_line(problem)}"
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") != 1
    if looks_local:
        near: list[str] = []
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
        return f"model.name {name}: no such folder" + (f"; did you mean {near[0]}?" if near else "")
    if constants.is_offline_mode():
        return (
            f"model.name {name}: not in the local cache, and HF_HUB_OFFLINE is set; download it once with a network, "
            "give a local folder, or rehearse with --smoke"
        )
    return (
        f"model.name {name}: cannot be loaded from the Hub or the local cache ({_first_line(problem)}); check the id, "
        "the network and, for a gated model, HF_TOKEN; --smoke rehearses without it"
    )


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return (lines[0] if lines else type(problem).__name__)[:200]
