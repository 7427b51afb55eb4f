"""Checks whether the Hub responds within a time limit."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from peftcli.doctor.check import OK, WARN, Check

HUB_SECONDS = 2.0
MODEL_SECONDS = 5.0
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Hub:
    """The state of the Hub.

    Attributes:
        offline: HF_HUB_OFFLINE is set, so no request was made.
        code: HTTP status of the response, None if there was none in time.
        mirror: HF_ENDPOINT names another server.
    """

    offline: bool
    code: int | None = None
    mirror: bool = False

    @property
    def answers(self) -> bool:
        return self.code is not None and self.code < 400

    @property
    def name(self) -> str:
        return "the server of HF_ENDPOINT" if self.mirror else "huggingface.co"


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub.

    Attributes:
        found: whether the name and revision exist and are visible to this token.
        gated: whether its terms must be accepted first.
        weights_bytes: size of its safetensors files, which would be downloaded.
    """

    found: bool
    gated: bool = False
    weights_bytes: int = 0


def probe_hub(seconds: float = HUB_SECONDS) -> Hub:
    """Send a request to the Hub, unless offline mode is on."""
    mirror = constants.ENDPOINT.rstrip("/") != "https://huggingface.co"
    if constants.is_offline_mode():
        return Hub(offline=True, mirror=mirror)
    return Hub(offline=False, code=answer_code(constants.ENDPOINT, seconds), mirror=mirror)


def answer_code(url: str, seconds: float) -> int | None:
    """HTTP status of a HEAD request, None if there was no response in time."""

    def ask() -> int | None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (OSError, ValueError, http.client.HTTPException):  # no route, no DNS entry, not HTTP: no response
            return None

    return in_time(ask, seconds)


def in_time(ask: Callable[[], Answer | None], seconds: float) -> Answer | None:
    """The result of a function, or None after a time limit; a DNS lookup has no time limit itself."""
    answers: list[Answer | None] = []
    thread = Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def model_on_hub(name: str, revision: str | None, seconds: float = MODEL_SECONDS) -> HubModel | None:
    """A model on the Hub, None if there was no response in time."""

    def ask() -> HubModel | None:
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=seconds)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return HubModel(found=False)
        except Exception:  # whatever the failure is, loading the model reports it in full
            return None
        files = info.siblings or []
        weights = [file for file in files if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename]
        return HubModel(True, bool(info.gated), sum(file.size or 0 for file in weights))

    return in_time(ask, seconds)


def check_hub(hub: Hub) -> Check:
    """Whether models can be downloaded."""
    if hub.offline:
        return Check("Hub", OK, "HF_HUB_OFFLINE is set: models are loaded from folders and the model cache")
    if hub.answers:
        return Check("Hub", OK, f"{hub.name} responds")
    found = f"{hub.name} did not respond within {HUB_SECONDS:g} s"
    if hub.code is not None:
        found = f"{hub.name}, or a proxy, responded with status {hub.code}"
    return Check("Hub", WARN, found, "export HF_HUB_OFFLINE=1, so that nothing waits for it, and use local models")
