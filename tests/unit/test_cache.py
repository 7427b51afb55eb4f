"""The cache: entries that verify themselves, and runs without a cache that can be written."""

import os
import stat
import threading
from pathlib import Path

import pytest

from peftcli import cache
from peftcli.cache import SUMS, built_once, entry_damage
from peftcli.errors import MachineError
from peftcli.filesystem import apply_umask


def build(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("b")


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda entry: flip_bit(entry / "a.bin"), "a.bin has changed"),
        (lambda entry: os.truncate(entry / "a.bin", 100), "a.bin has 100 bytes instead of 10,240"),
        (lambda entry: (entry / "sub" / "b.txt").unlink(), "b.txt is missing"),
        (lambda entry: os.truncate(entry / SUMS, 20), "sums.json: "),
        (lambda entry: (entry / SUMS).write_text("[1]"), "sums.json: "),
    ],
)
def test_a_damaged_entry_is_built_again_with_a_line(tmp_path: Path, spoil: object, said: str) -> None:
    notes: list[str] = []
    entry = built_once(tmp_path, "e", build, note=notes.append)
    before = (entry / "a.bin").read_bytes()
    assert built_once(tmp_path, "e", lambda folder: pytest.fail("built twice"), note=notes.append) == entry
    assert not notes
    spoil(entry)  # type: ignore[operator]
    assert built_once(tmp_path, "e", build, note=notes.append) == entry
    assert (entry / "a.bin").read_bytes() == before and entry_damage(entry) is None
    assert len(notes) == 1 and said in notes[0] and str(entry) in notes[0] and "is rebuilt" in notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".e.lock", "e"]


def test_an_entry_of_an_earlier_version_is_built_again_silently(tmp_path: Path) -> None:
    notes: list[str] = []
    entry = built_once(tmp_path, "e", build, note=notes.append)
    (entry / SUMS).unlink()
    assert entry_damage(built_once(tmp_path, "e", build, note=notes.append)) is None and not notes


def test_of_a_large_file_some_blocks_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 64)
    monkeypatch.setattr(cache, "SAMPLED_BLOCKS", 4)
    starts = list(cache._block_starts(10_000))
    assert starts[0] == 0 and starts[-1] == 10_000 - 64 and len(starts) == 4
    entry = built_once(tmp_path, "e", build)
    assert entry_damage(entry) is None
    content = bytearray((entry / "a.bin").read_bytes())
    content[-1] ^= 1
    (entry / "a.bin").write_bytes(content)
    assert entry_damage(entry) == "a.bin has changed"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lock: object, *given: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    notes: list[str] = []
    entry = built_once(tmp_path / "root", "e", build, note=notes.append)
    assert tmp_path not in entry.parents and (entry / "a.bin").is_file()
    assert len(notes) == 1 and "PEFTCLI_CACHE" in notes[0] and "Permission denied" in notes[0]


def test_an_error_of_the_build_is_not_taken_for_one_of_the_cache(tmp_path: Path) -> None:
    def denied(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", "data.csv")

    with pytest.raises(MachineError, match=r"data\.csv"):
        built_once(tmp_path, "e", denied)
    assert not (tmp_path / "e").exists()


def test_files_of_an_entry_can_be_read_as_the_umask_allows(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        (folder / "weights").write_text("w")
        (folder / "weights").chmod(0o600)

    before = os.umask(0o022)
    try:
        entry = built_once(tmp_path, "e", private)
        assert stat.S_IMODE((entry / "weights").stat().st_mode) == 0o644
        assert stat.S_IMODE(entry.stat().st_mode) == 0o755
        os.umask(0o077)
        apply_umask(entry)
        assert stat.S_IMODE((entry / "weights").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_who_waits_for_another_builder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SILENT_SECONDS", 0.05)
    begun, waited = threading.Event(), threading.Event()
    said: list[str] = []

    def build(folder: Path) -> None:
        begun.set()
        assert waited.wait(60)
        (folder / "a.txt").write_text("a")

    def note(line: str) -> None:
        said.append(line)
        waited.set()

    first = threading.Thread(target=built_once, args=(tmp_path, "entry", build))
    first.start()
    assert begun.wait(60)
    found = built_once(tmp_path, "entry", lambda _: pytest.fail("built twice"), note=note)
    first.join()
    assert (found / "a.txt").read_text() == "a"
    assert said == [f"note: another process is building {tmp_path / 'entry'} in the cache; waiting for it to finish"]


def test_a_failed_build_releases_the_entry_while_its_error_is_kept(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise MachineError("not now")

    with pytest.raises(MachineError) as kept:
        built_once(tmp_path, "e", fail)
    assert entry_damage(built_once(tmp_path, "e", build)) is None
    assert str(kept.value) == "not now"
