"""The Hub out of reach: noticed once, and then the local cache serves without waiting."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from peftcli.model import hub

Calls = list[tuple[str, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], Calls]]:
    """A function that sets whether the Hub can be reached, and gives the list of connections to come."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub._is_reachable.cache_clear()

    def set_up(reachable: bool) -> Calls:
        calls: Calls = []

        def connect(address: tuple[str, int], timeout: float) -> Any:
            calls.append(address)
            if not reachable:
                raise socket.gaierror(-3, "Temporary failure in name resolution")
            return socket.socket()

        monkeypatch.setattr(hub.socket, "create_connection", connect)
        return calls

    yield set_up
    hub._is_reachable.cache_clear()


def test_without_a_network_the_cache_alone_is_used_and_nobody_is_asked_twice(
    asked: Callable[[bool], Calls],
) -> None:
    calls = asked(False)
    for _ in range(3):
        hub.look_for_network("somebody/model")
    assert calls == [("huggingface.co", 443)]
    assert constants.is_offline_mode()
    said = hub.explain_missing("somebody/model", OSError("x"))
    assert "not in the local cache, and huggingface.co is unreachable; download it once" in said


def test_with_a_network_the_hub_is_asked_as_before(asked: Callable[[bool], Calls]) -> None:
    calls = asked(True)
    for _ in range(3):
        hub.look_for_network("somebody/model")
    assert len(calls) == 1 and not constants.is_offline_mode()


def test_who_is_offline_on_purpose_is_told_so(asked: Callable[[bool], Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked(False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.look_for_network("somebody/model")
    assert calls == [] and hub.why_offline() == "HF_HUB_OFFLINE is set"


def test_a_local_folder_or_a_proxy_asks_nobody(
    asked: Callable[[bool], Calls], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = asked(False)
    hub.look_for_network(str(tmp_path))
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy.example:3128"})
    hub.look_for_network("somebody/model")
    assert calls == [] and not constants.is_offline_mode()


def test_another_server_is_the_one_that_is_asked(
    asked: Callable[[bool], Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = asked(False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://mirror.example:8080")
    hub.look_for_network("somebody/model")
    assert calls == [("mirror.example", 8080)] and hub.why_offline() == "mirror.example is unreachable"
