"""Whether the Hub is reachable, and messages for models that cannot be loaded."""

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from peftcli.nearest import nearest

CONNECT_SECONDS = 5.0
"""Timeout after which a server counts as unreachable."""


def look_for_network(path: str) -> None:
    """Use only the local cache if the Hub is unreachable.

    Otherwise the libraries would wait half a minute for each of a dozen files, even if all are cached. Checked once per
    process, and only for a Hub id. With a proxy, this is left to the libraries.

    Args:
        path: local folder or Hub id.
    """
    if Path(path).is_dir() or constants.is_offline_mode() or {"https", "all"} & getproxies().keys():
        return
    if not _is_reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True


@cache
def _is_reachable(endpoint: str) -> bool:
    server = urlsplit(endpoint)
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        socket.create_connection((server.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def why_offline() -> str:
    """Why the Hub is not used, as part of a sentence; for an offline process."""
    if _is_reachable.cache_info().currsize and not _is_reachable(constants.ENDPOINT):
        return f"{urlsplit(constants.ENDPOINT).hostname} is unreachable"
    return "HF_HUB_OFFLINE is set"


def explain_missing(name: str, problem: Exception) -> str:
    """One line on why a model folder or Hub id could not be loaded, and the fix.

    Args:
        name: as requested.
        problem: the exception of the library.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return f"{name}: this folder has no usable model: {_first_line(problem)}"
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") != 1
    if looks_local:
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = nearest(path.name, beside)
        return f"model.name {name}: no such folder" + (f"; did you mean {near}?" if near else "")
    if constants.is_offline_mode():
        return (
            f"model.name {name}: not in the local cache, and {why_offline()}; download it once with a network, "
            "set a local folder, or rehearse with --smoke"
        )
    return (
        f"model.name {name}: cannot be loaded from the Hub or the local cache ({_first_line(problem)}); check the id, "
        "the network and, for a gated model, HF_TOKEN; --smoke rehearses without it"
    )


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return (lines[0] if lines else type(problem).__name__)[:200]
