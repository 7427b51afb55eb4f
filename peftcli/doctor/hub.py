"""Checks whether the Hub answers, within a time limit."""

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
    """What is known of the Hub.

    Attributes:
        offline: HF_HUB_OFFLINE is set, so nobody asked.
        code: HTTP status of its answer, None for none in time.
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
    """What the Hub says of a model.

    Attributes:
        found: there is one of that name and revision, as far as this token may see.
        gated: its terms must be accepted first.
        weights_bytes: of its safetensors, which are downloaded.
    """

    found: bool
    gated: bool = False
    weights_bytes: int = 0


def probe_hub(seconds: float = HUB_SECONDS) -> Hub:
    """Ask the Hub for a sign of life, unless this process is offline on purpose."""
    mirror = constants.ENDPOINT.rstrip("/") != "https://huggingface.co"
    if constants.is_offline_mode():
        return Hub(offline=True, mirror=mirror)
    return Hub(offline=False, code=answer_code(constants.ENDPOINT, seconds), mirror=mirror)


def answer_code(url: str, seconds: float) -> int | None:
    """HTTP status of the answer to a HEAD request, None where none came in time."""

    def ask() -> int | None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except (OSError, ValueError, http.client.HTTPException):  # no route, no address, no HTTP: no answer
            return None

    return in_time(ask, seconds)


def in_time(ask: Callable[[], Answer | None], seconds: float) -> Answer | None:
    """What a function returns, or None after so many seconds; a look-up of a name has no time limit of its own."""
    answers: list[Answer | None] = []
    thread = Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def model_on_hub(name: str, revision: str | None, seconds: float = MODEL_SECONDS) -> HubModel | None:
    """What the Hub says of a model, None where it does not say anything in time."""

    def ask() -> HubModel | None:
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=seconds)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return HubModel(found=False)
        except Exception:  # whatever keeps it from answering, loading the model will say it in full
            return None
        files = info.siblings or []
        weights = [file for file in files if file.rfilename.endswith(".safetensors") and "/" not in file.rfilename]
        return HubModel(True, bool(info.gated), sum(file.size or 0 for file in weights))

    return in_time(ask, seconds)


def check_hub(hub: Hub) -> Check:
    """Say whether models can be downloaded."""
    if hub.offline:
        return Check("Hub", OK, "offline by HF_HUB_OFFLINE: models come from folders and the model cache")
    if hub.answers:
        return Check("Hub", OK, f"{hub.name} answers")
    there = f"{hub.name} did not answer in {HUB_SECONDS:g} s"
    if hub.code is not None:
        there = f"{hub.name}, or what stands before it, answered {hub.code}"
    return Check("Hub", WARN, there, "export HF_HUB_OFFLINE=1, so that nothing waits for it, and use local models")
