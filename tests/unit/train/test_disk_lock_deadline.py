"""Where a run writes, and for how long: room on the disk, one process to a folder, sessions that end."""

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftcli.errors import MachineError, RecipeError
from peftcli.plan.optimizer import Trained, optimizer_bytes
from peftcli.run_dir import read_json
from peftcli.train import deadline as session
from peftcli.train import disk, lock
from peftcli.train.deadline import Deadline, NotebookLimit, deadline, notebook_limit, session_note, wall_clock_limit
from peftcli.train.disk import (
    Forecast,
    check_disk_space,
    check_writable,
    forecast,
    free_bytes,
    has_space_for_checkpoint,
)
from peftcli.train.lock import RunLock

NEEDS = Forecast(checkpoint_bytes=1000, checkpoints=3, adapter_bytes=500, merge_bytes=0, reserve_bytes=100)
HOLDS = """
import sys, time
from pathlib import Path
from peftcli.train.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
FORKS = """
import os, sys, time
from pathlib import Path
from peftcli.train.lock import RunLock
with RunLock(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No notebook service, no quota, no deadline, one process."""
    services = [mark for _, marks, _ in session.SESSIONS for mark in marks]
    for name in (*services, disk.QUOTA, session.DEADLINE, "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a small file system in memory, where that is allowed."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system is not allowed here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def started(script: str, run: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that runs a script over a run folder; killed at the end if it is still there."""
    process = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def sparse(path: Path, length: int) -> None:
    """Make a file of a length that takes no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(length)


def quota(monkeypatch: pytest.MonkeyPatch, folder: Path, allowed: str) -> None:
    monkeypatch.setenv(disk.QUOTA, f"{folder}={allowed}")


# The forecast


def test_the_forecast_is_what_a_run_writes(write_recipe: Callable[..., Path], run_cli: Callable[..., int]) -> None:
    recipe = write_recipe(trainer={"max_steps": 2, "save_steps": 1}, evaluation={"baseline": False})
    run = recipe.parent / "run"
    assert run_cli("train", recipe, "--output-dir", run) == 0
    plan, found = read_json(run / "plan.json"), run / "checkpoints" / "checkpoint-2"
    tokens = sum(file.stat().st_size for file in found.glob("*token*"))
    needs = forecast(
        Trained(plan["parameters"]["trainable"]),
        optimizer=plan["trainer"].get("optim", "adamw_torch"),
        keep=plan["trainer"]["save_total_limit"],
        tokenizer_bytes=tokens,
    )
    heavy = sum((found / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer.pt"))
    # Each tensor's name and frame take about 1 kB, which counts in an adapter as small as this one.
    assert heavy == pytest.approx(needs.checkpoint_bytes - tokens - disk.SMALL_FILES_BYTES, rel=0.1)
    written = disk._used(found)
    assert written <= needs.checkpoint_bytes <= written + disk.SMALL_FILES_BYTES
    assert disk._used(run / "adapter") <= needs.adapter_bytes + disk.SMALL_FILES_BYTES
    assert len(list((run / "checkpoints").iterdir())) + 1 == needs.checkpoints


@pytest.mark.parametrize(
    "optimizer",
    ["adamw_torch", "adafactor", "adagrad", "ademamix", "rmsprop_bnb_8bit", "paged_adamw_8bit", "lion_32bit", "sgd"],
)
def test_the_state_of_an_optimizer_is_what_torch_saves(optimizer: str, tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optimizer, use_cpu=True, report_to=[])
    made, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weights = [torch.nn.Parameter(torch.randn(16, 4096)) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    stepped = made(weights, **({"momentum": 0.9} if optimizer == "sgd" else settings))
    stepped.step()
    file = io.BytesIO()
    torch.save(stepped.state_dict(), file)
    measured = len(file.getvalue()) / sum(weight.numel() for weight in weights)
    allowed = 1.0 if optimizer == "adafactor" else 0.05  # its state depends on the shape; the table has the widest
    assert optimizer_bytes(optimizer, Trained(10**6)) / 10**6 == pytest.approx(measured, rel=0.05, abs=allowed)


def test_an_unknown_optimizer_counts_as_adamw() -> None:
    trained = Trained(1000)
    assert optimizer_bytes("newest_of_all", trained) == optimizer_bytes("adamw_torch", trained) == 8000


def test_a_merged_model_and_kept_checkpoints_are_counted() -> None:
    needs = forecast(Trained(1000), optimizer="adamw_torch", keep=5, merged_bytes=10**9, tokenizer_bytes=7)
    assert needs.checkpoints == 6
    assert needs.checkpoint_bytes == 12_007 + disk.SMALL_FILES_BYTES
    assert (needs.adapter_bytes, needs.merge_bytes) == (4007, 10**9 + 7)
    assert needs.total == 6 * needs.checkpoint_bytes + 4007 + 10**9 + 7 + disk.RESERVE_BYTES
    assert forecast(Trained(1000), optimizer="adamw_torch", keep=1).checkpoints == 3  # two stay, one is written
    assert forecast(Trained(1000), optimizer="adamw_torch", keep=1).merge_bytes == 0


# What is free


def test_free_bytes_of_a_folder_to_come_are_those_of_its_disk(mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=700k")
    free = free_bytes(folder / "runs" / "new")
    assert 600 * 1024 <= free <= 700 * 1024
    (folder / "file").write_bytes(b"x" * 100 * 1024)
    assert free - free_bytes(folder) == 100 * 1024


def test_a_link_is_followed_to_the_disk_behind_it(mounted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = mounted("size=700k")
    (tmp_path / "runs").symlink_to(folder)
    assert free_bytes(tmp_path / "runs" / "new") == free_bytes(folder) < free_bytes(tmp_path)


def test_a_quota_leaves_what_its_files_do_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "work", tmp_path / "other"
    sparse(inside / "a" / "file", 1_000_000)
    sparse(outside / "big", 500_000)
    (inside / "link").symlink_to(outside)
    (inside / "file-link").symlink_to(outside / "big")
    quota(monkeypatch, inside, "2MB")
    links = os.lstat(inside / "file-link").st_size  # that to a folder counts as a folder
    assert free_bytes(inside / "runs" / "x") == 1_000_000 - links
    assert free_bytes(outside) > 2_000_000


def test_a_quota_that_is_crossed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(tmp_path / "file", 3000)
    quota(monkeypatch, tmp_path, "2KiB")
    assert free_bytes(tmp_path) == 0


def test_kaggle_keeps_20_gb_of_its_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.KAGGLE_QUOTA == ("/kaggle/working", 20_000_000_000)
    monkeypatch.setattr(disk, "KAGGLE_QUOTA", (str(tmp_path), 5000))
    sparse(tmp_path / "file", 2000)
    assert free_bytes(tmp_path / "runs") > 5000
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert free_bytes(tmp_path / "runs") == 3000


@pytest.mark.parametrize("text", ["20GiB", "/data", "/data=20", "data=20GiB", "/data=GiB", "/data=20 gigs"])
def test_a_quota_that_cannot_be_read_is_an_error(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(disk.QUOTA, text)
    with pytest.raises(RecipeError, match=r"PEFTCLI_QUOTA=.*: must be a folder .* such as /data=20GiB"):
        free_bytes(tmp_path)


def test_a_file_system_that_does_not_tell_its_size_is_not_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255)))
    assert has_space_for_checkpoint(tmp_path, 10**12) is None


# Is there room


def test_a_run_that_does_not_fit_is_refused_with_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota(monkeypatch, tmp_path, "3599B")
    with pytest.raises(MachineError) as problem:
        check_disk_space(tmp_path / "run", NEEDS)
    assert str(problem.value) == (
        f"{tmp_path}/run needs 3.5 KiB more, but {tmp_path} with its quota of 3.5 KiB has 3.5 KiB left: "
        "3 checkpoints of 1000 B, the adapter 500 B, 100 B for the rest\n"
        "free some space, lower adapter.r, or set an output_dir on another disk"
    )
    quota(monkeypatch, tmp_path, "3600B")
    check_disk_space(tmp_path / "run", NEEDS)


def test_the_mend_names_the_checkpoints_where_fewer_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota(monkeypatch, tmp_path, "1kB")
    with pytest.raises(MachineError, match=r"9 checkpoints of .*\n.*lower trainer\.save_total_limit"):
        check_disk_space(tmp_path, replace(NEEDS, checkpoints=9))
    with pytest.raises(MachineError, match=r"the merged model 1\.9 MiB"):
        check_disk_space(tmp_path, replace(NEEDS, merge_bytes=2_000_000))


def test_checkpoints_that_are_there_need_no_second_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6.bad"):
        sparse(run / "checkpoints" / name / "optimizer.pt", 1000)
    quota(monkeypatch, tmp_path, "4600B")  # 3000 are taken, 2000 of them by checkpoints of the run's own
    check_disk_space(run, NEEDS)
    quota(monkeypatch, tmp_path, "4599B")
    with pytest.raises(MachineError, match=r"run needs 1\.6 KiB more.*, minus 2\.0 KiB that already exist"):
        check_disk_space(run, NEEDS)


def test_a_checkpoint_that_would_not_fit_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota(monkeypatch, tmp_path, "1000B")
    assert has_space_for_checkpoint(tmp_path, 1000) is None
    reason = f"a checkpoint needs 1001 B, but {tmp_path} with its quota of 1000 B has 1000 B left"
    assert has_space_for_checkpoint(tmp_path, 1001) == reason


# Can it be written


def test_a_folder_that_takes_files_stays_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "new")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    for folder in (tmp_path / "runs", tmp_path / "runs" / "new"):
        with pytest.raises(MachineError, match="runs is a file, not a folder; set another output_dir"):
            check_writable(folder)


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    with pytest.raises(MachineError, match=r"runs is a link to .*gone, which does not exist"):
        check_writable(tmp_path / "runs" / "new")


def test_a_full_disk_is_found_before_anything_is_loaded(mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=100k")
    with pytest.raises(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(MachineError, match="run cannot be written: the disk is full; free some space"):
        check_writable(folder / "run")
    assert [path.name for path in folder.iterdir()] == ["filler"]


def test_a_disk_that_refuses_only_at_the_end_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def refuse(descriptor: int) -> None:
        written.append(os.fstat(descriptor).st_size)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(MachineError, match="this user's disk quota is used up; free some space, or set another"):
        check_writable(tmp_path)
    assert written == [disk.PROBE_BYTES]
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk_is_named_and_needs_no_lock(mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=100k,ro")
    with pytest.raises(MachineError, match="run cannot be written: the file system is read-only; set another"):
        check_writable(folder / "run")
    with pytest.raises(MachineError, match="the file system is read-only"):
        RunLock(folder / "run").acquire()
    with RunLock(folder):
        assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    readable = [tmp_path, *tmp_path.parents][:3]
    modes = [(path, path.stat().st_mode) for path in readable]
    try:
        for path in readable:
            path.chmod(0o755)
        os.seteuid(65534)
        for folder in (tmp_path / "run", tmp_path / "closed" / "runs" / "run"):
            with pytest.raises(MachineError, match="run cannot be written: this user has no permission; set another"):
                check_writable(folder)
            with pytest.raises(MachineError, match="run cannot be written: this user has no permission; set another"):
                RunLock(folder).acquire()
    finally:
        os.seteuid(0)
        for path, mode in modes:
            path.chmod(mode)


# One process to a folder


def test_a_second_process_is_told_who_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(HOLDS, run) as holder:
        assert said(holder) == "held"
        with pytest.raises(MachineError) as problem:
            RunLock(run).acquire()
        since = time.strftime("%H:%M", time.localtime(read_json(run / ".lock")["since"]))
        who = f"{run} is being trained by process {holder.pid} on {os.uname().nodename} since {since}"
        assert str(problem.value) == f"{who}; stop it, or set another output_dir"
        assert holder.poll() is None


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(HOLDS, run) as holder:
        assert said(holder) == "held"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert read_json(run / ".lock")["pid"] == holder.pid
        with RunLock(run):
            assert read_json(run / ".lock")["pid"] == os.getpid()


def test_a_worker_that_outlives_its_killed_parent_holds_no_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(FORKS, run) as holder:
        worker = int(said(holder))
        try:
            with pytest.raises(MachineError, match=f"by process {holder.pid} "):
                RunLock(run).acquire()
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
            assert psutil.Process(worker).is_running()
            with RunLock(run):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_nothing_is_left_behind_by_a_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new" / "run"), pytest.raises(MachineError, match=f"by process {os.getpid()} "):
        RunLock(tmp_path / "new" / "run").acquire()
    assert list((tmp_path / "new").iterdir()) == []
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / "recipe.yaml").write_text("x")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_only_the_first_of_several_processes_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with RunLock(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with RunLock(tmp_path):
            pass
        assert (tmp_path / ".lock").is_file()


def test_many_who_come_and_go_never_hold_it_together(tmp_path: Path) -> None:
    inside, together, held = [0], [False], [0]

    def come_and_go() -> None:
        for _ in range(200):
            try:
                with RunLock(tmp_path):
                    inside[0] += 1
                    held[0] += 1
                    time.sleep(0.0005)
                    together[0] |= inside[0] > 1
                    inside[0] -= 1
            except MachineError:
                time.sleep(0.0005)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held[0] > 4
    assert not together[0]


def test_a_file_removed_between_open_and_lock_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()  # what its holder does when it lets go
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunLock(tmp_path):
        assert len(calls) == 2
        assert read_json(tmp_path / ".lock")["pid"] == os.getpid()


def held_elsewhere(run: Path, silent: float, machine: str = "another") -> None:
    """A lock file as a process on another machine leaves it, last touched some seconds ago."""
    (run / ".lock").write_text(json.dumps({"pid": 12, "host": "node7", "machine": machine, "since": 1.0}))
    then = time.time() - silent
    os.utime(run / ".lock", (then, then))


def test_a_living_holder_on_another_machine_is_believed(tmp_path: Path) -> None:
    held_elsewhere(tmp_path, silent=20)
    with pytest.raises(MachineError) as problem:
        RunLock(tmp_path).acquire()
    first, second = str(problem.value).split("\n")
    assert first.startswith(f"{tmp_path} is being trained by process 12 on node7 since 19")
    assert "last seen 20 s ago" in first
    assert second == f"if that process is certainly gone, remove {tmp_path}/.lock, or wait 130 s"
    assert read_json(tmp_path / ".lock")["pid"] == 12


def test_a_silent_holder_on_another_machine_is_taken_for_dead(tmp_path: Path) -> None:
    held_elsewhere(tmp_path, silent=lock.STALE_SECONDS + 5)
    with RunLock(tmp_path):
        assert read_json(tmp_path / ".lock")["pid"] == os.getpid()


def test_without_locks_of_the_kernel_the_sign_of_life_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with RunLock(tmp_path), pytest.raises(MachineError, match=f"by process {os.getpid()} on"):
        RunLock(tmp_path).acquire()
    held_elsewhere(tmp_path, silent=lock.STALE_SECONDS + 5, machine=lock._machine())
    with RunLock(tmp_path):
        assert read_json(tmp_path / ".lock")["pid"] == os.getpid()


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / ".lock", (1.0, 1.0))
        until = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime == 1.0 and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / ".lock").stat().st_mtime > 1.0
    assert lock.STALE_SECONDS > 4 * 30.0


def test_a_torn_lock_file_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"pid": 1')
    with RunLock(tmp_path):
        assert read_json(tmp_path / ".lock")["pid"] == os.getpid()


# How long the machine is ours

NOON = 1795262400.0  # 2026-11-21T12:00:00Z


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("1795262401", NOON + 1),
        ("1795262400.5", NOON + 0.5),
        ("2026-11-21T18:00:00Z", NOON + 6 * 3600),
        ("2026-11-21T18:00z", NOON + 6 * 3600),
        ("2026-11-21 18:00:00+02:00", NOON + 4 * 3600),
    ],
)
def test_a_deadline_is_a_unix_time_or_iso_8601(text: str, at: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(session.DEADLINE, text)
    assert deadline(NOON) == Deadline(at, text)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_no_deadline_is_none(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv(session.DEADLINE, value)
    assert deadline(NOON) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tomorrow", "must be a Unix time in seconds, or a date, time and zone such as 2026-11-21T18:00:00Z$"),
        ("11h30m", "must be a Unix time"),
        ("nan", "must be a Unix time"),
        ("2026-11-21T18:00:00", "the time zone is missing$"),
        ("2026-11-21", "the time zone is missing$"),
        ("1795262401000", "this looks like milliseconds$"),
        ("3600", "has passed: that is 1970-01-01T01:00:00Z, and it is 2026-11-21T12:00:00Z; set a later time"),
        ("2026-11-21T12:00:00Z", "has passed"),
    ],
)
def test_a_deadline_that_can_be_none_is_an_error(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(session.DEADLINE, text)
    with pytest.raises(RecipeError, match=message) as problem:
        deadline(NOON)
    assert str(problem.value).startswith(f"PEFTCLI_DEADLINE={text}")


def test_the_earlier_of_budget_and_deadline_ends_the_run() -> None:
    until = Deadline(NOON + 600, "x")
    assert wall_clock_limit(None, until, NOON - 60) == (660.0, "PEFTCLI_DEADLINE=x")
    assert wall_clock_limit(700.0, until, NOON - 60) == (660.0, "PEFTCLI_DEADLINE=x")
    assert wall_clock_limit(600.0, until, NOON - 60) == (600.0, "")
    assert wall_clock_limit(None, None, NOON) == (None, "")


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "Kaggle"),
        ({"KAGGLE_URL_BASE": "https://www.kaggle.com"}, "Kaggle"),
        ({"COLAB_RELEASE_TAG": "release-colab_1", "KAGGLE_URL_BASE": "https://www.kaggle.com"}, "Kaggle"),
        ({"COLAB_RELEASE_TAG": "release-colab_1"}, "Colab"),
        ({"COLAB_GPU": "0"}, "Colab"),
    ],
)
def test_notebook_services_are_known_by_their_variables(variables: dict[str, str], name: str) -> None:
    found = notebook_limit(variables)
    assert found is not None
    assert (found.name, found.seconds) == (name, 12 * 3600)


def test_other_machines_have_no_limit() -> None:
    assert notebook_limit({"HOME": "/root"}) is None
    assert session_note(None, NOON) is None


@pytest.mark.parametrize(
    ("booted", "first", "began"),
    [
        (NOON - 900, NOON - 600, NOON - 600),  # a machine made for the session, and its container
        (NOON - 9e6, NOON - 600, NOON - 600),  # a container on a machine that has long been up
        (NOON - 600, NOON - 9e6, NOON - 600),
        (NOON - 9e6, NOON - 8e6, None),
        (NOON + 50, NOON - 600, NOON - 600),  # a clock that was set back
    ],
)
def test_a_session_begins_with_its_machine_or_container(
    booted: float, first: float, began: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "boot_time", lambda: booted)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: first)
    assert session.session_start(NOON, 12 * 3600) == began


def test_a_hidden_first_process_leaves_the_boot_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(process: Any) -> float:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil, "boot_time", lambda: NOON - 60)
    monkeypatch.setattr(psutil.Process, "create_time", hidden)
    assert session.session_start(NOON, 12 * 3600) == NOON - 60


def test_the_proposed_budget_leaves_half_an_hour_of_what_is_left() -> None:
    kaggle = NotebookLimit("Kaggle", 12 * 3600.0, None)
    budget = "so that this run finishes before that"
    head = "Kaggle ends a session after at most 12h"
    assert kaggle.sentence(NOON) == f"{head}; set budget.wall_clock: 11h30m {budget}"
    later = replace(kaggle, started=NOON - 4000)
    assert later.sentence(NOON) == f"{head}, of which 1h6m have passed; set budget.wall_clock: 10h20m {budget}"
    assert later.sentence(NOON + 11 * 3600).endswith("; start a new session for a long run")


def test_who_set_a_limit_hears_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(session, "session_start", lambda now, longest: None)  # however long this machine has been up
    now = time.time()
    assert "budget.wall_clock: " in (session_note(None, now) or "")
    assert session_note(3600.0, now) is None
    monkeypatch.setenv(session.DEADLINE, str(int(now) + 60))
    assert session_note(None, now) is None


def test_the_tokenizer_of_a_local_model_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    saved = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert saved <= disk.tokenizer_bytes(tiny_llama) < disk.TOKENIZER_BYTES
    assert disk.tokenizer_bytes(tmp_path / "on-the-hub") == disk.TOKENIZER_BYTES


def test_a_merge_needs_its_weights_and_the_small_files_of_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"0" * 5000)
    (tmp_path / "tokenizer.json").write_bytes(b"0" * 300)
    needs = disk.merge_forecast(10_000, tmp_path)
    assert needs.merge_bytes == 10_300 and needs.total == 10_300 + disk.SMALL_FILES_BYTES
