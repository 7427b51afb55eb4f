"""Exit codes and messages: where, what is there against what may be, the mend; never a traceback."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peftcli.cli.console import Shown, console, duration, status_line
from peftcli.cli.text import printable
from peftcli.run_dir import RunDir, read_log, write_json

Cli = Callable[..., int]
Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("sections", "code", "said"),
    [
        ({"adapter": {"r": 0}}, 2, "adapter.r = 0"),
        ({"adapter": {"target_modules": ["q_proj", "v_prj"]}}, 2, "[v_prj]; nearest names: "),
        ({"dataset": {"path": "/nowhere/things.csv"}}, 3, "/nowhere/things.csv: no such file"),
        ({"dataset": {"prompt": "{thin} ->:"}}, 3, "no column thin; it has id, thing, kind"),
        ({"dataset": {"prompt": "{thing} " + "long " * 60}}, 3, "raise dataset.max_length"),
        ({"dataset": {"split": {"test_size": 48}}}, 3, "leaves no row for training"),
        ({"trainer": {"assistant_only_loss": True}}, 3, "the data format is prompt_completion, not messages"),
        ({"model": {"name": "./no-such-model"}}, 4, "no such folder"),
        ({"model": {"name": "nobody/no-such-model"}}, 4, "HF_HUB_OFFLINE is set"),
        ({"model": {"name": "tiny:lama"}}, 2, "tiny:llama"),
        ({"model": {"attention": "flash_attention_2"}}, 4, "needs a CUDA GPU, and this machine has none"),
        ({"model": {"dtype": "float16"}}, 4, "only trains on a GPU"),
        ({"dataset": {"max_length": 100_000}}, 2, "supports at most"),
    ],
)
def test_each_kind_of_fault_has_its_exit_code_and_one_short_message(
    write_recipe: Write, run_cli: Cli, capfd: Any, sections: dict[str, Any], code: int, said: str
) -> None:
    assert run_cli("train", write_recipe(**sections), "--output-dir", "run") == code
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


def test_a_run_folder_that_cannot_be_made_is_a_fault_of_the_machine(
    write_recipe: Write, run_cli: Cli, capfd: Any
) -> None:
    assert run_cli("train", write_recipe(), "--output-dir", "/dev/null/run") == 4
    assert capfd.readouterr().err.strip() == "error: /dev/null is a file, not a folder; set another output_dir"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("AcceleratorError", "CUDA error: out of memory"),
    ],
)
def test_out_of_memory_exits_5_with_what_to_change(
    write_recipe: Write, run_cli: Cli, capfd: Any, monkeypatch: pytest.MonkeyPatch, kind: str, text: str
) -> None:
    import torch

    from peftcli.train.trainers import Trainer

    def full(*args: object, **kwargs: object) -> None:
        raise getattr(torch, kind)(text)

    monkeypatch.setattr(Trainer, "training_step", full)
    assert run_cli("train", write_recipe(evaluation={"baseline": False}), "--output-dir", "run") == 5
    assert "halve trainer.per_device_train_batch_size" in capfd.readouterr().err


def test_wrong_command_lines_exit_2_with_a_hint(run_cli: Cli, capfd: Any) -> None:
    assert run_cli("trian", "x.yaml") == 2
    assert "train" in capfd.readouterr().err
    assert run_cli("train") == 2
    assert run_cli("train", "nothing.yaml") == 2
    assert "no such file" in capfd.readouterr().err
    assert run_cli("merge", "run", "--nonsense") == 2
    assert run_cli("train", "quickstart", "--max-time", "soon") == 2
    assert "--set budget.wall_clock" in capfd.readouterr().err


def test_pickled_weights_are_refused_by_name(
    write_recipe: Write, run_cli: Cli, capfd: Any, tmp_path: Path, tiny_llama: Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert run_cli("train", write_recipe(model={"name": str(folder)})) == 4
    assert "pytorch_model.bin and no safetensors" in capfd.readouterr().err


def test_validate_prints_json_and_notices(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    recipe = write_recipe(trainer={"warmup_ratio": 0.1})
    assert run_cli("validate", recipe, "--json") == 0
    value = json.loads(capfd.readouterr().out)
    assert value["valid"] is True and "warmup_steps" in value["notices"][0]


def test_plan_says_each_choice_with_its_reason(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    assert run_cli("plan", write_recipe()) == 0
    out = capfd.readouterr().out
    for part in ("model.dtype", "a CPU: exact", "adapter", "trainable", "quantization.compute_dtype"):
        assert part in out
    assert run_cli("plan", write_recipe(), "--json") == 0
    assert json.loads(capfd.readouterr().out)["parameters"]["trainable"] > 0


def test_a_bug_of_ours_keeps_its_traceback_and_exits_1(
    write_recipe: Write, run_cli: Cli, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peftcli.cli.pipeline as pipeline

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(pipeline, "plan_recipe", broken)
    assert run_cli("plan", write_recipe()) == 1
    err = capfd.readouterr().err
    assert "ZeroDivisionError: planted" in err and "a bug in peftcli" in err


def test_the_traceback_of_a_known_error_is_there_for_the_asking(write_recipe: Write, run_cli: Cli, capfd: Any) -> None:
    recipe = write_recipe(dataset={"path": "/nowhere.csv"})
    assert run_cli("train", recipe, "--traceback", "--output-dir", "run") == 3
    assert "Traceback" in capfd.readouterr().err


def test_report_writes_again_without_torch(tmp_path: Path, write_recipe: Write, run_cli: Cli) -> None:
    assert run_cli("train", write_recipe(trainer={"max_steps": 1}), "--output-dir", "run") == 0
    page = tmp_path / "run" / "report.html"
    before = page.read_bytes()
    page.unlink()
    script = (
        "import sys\nfrom peftcli.cli.main import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", script, "report", "run"], cwd=tmp_path, check=True, capture_output=True)
    assert page.read_bytes() == before
    assert run_cli("report", tmp_path / "nowhere") == 2


def test_hostile_text_cannot_reach_the_terminal() -> None:
    out = io.StringIO()
    plain = Console(file=out, width=200, markup=False)
    Shown(plain).note("[/foo] \x1b[31mred [bold]")
    Shown(plain).note("\x1b]0;owned\x07 \u202eabc [bold]x")
    text = out.getvalue()
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "[/foo]" in text and "[bold]x" in text


def test_plain_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    import peftcli.cli.console as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    shown = Shown(Console(file=out, width=120))
    shown.start("training", 100)
    for step in range(100):
        clock[0] += 1.0
        shown.advance(step + 1, {"loss": f"{1 / (step + 1):.3f}"})
    shown.end()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert lines[1].startswith("training 31/100 loss 0.032 left")
    assert lines[-1].startswith("training 100/100 loss 0.010 (first 1.000)")


def test_a_short_training_leaves_its_first_and_last_loss(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown(console(sys.stdout))
    shown.start("training", 2)
    shown.advance(1, {"loss": "2.50"})
    shown.advance(2, {"loss": "1.25"})
    shown.end()
    shown.end()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == "training 1/2 loss 2.50"
    assert lines[1].startswith("training 2/2 loss 1.25 (first 2.50) in ")


FIGURES = {"loss": "3.4204", "lr": "3.33e-03", "tokens/s": "3,593", "memory": "0.5 GiB"}


@pytest.mark.parametrize("width", [200, 80, 60, 40, 30])
def test_the_live_line_keeps_step_and_time_left_at_any_width(width: int) -> None:
    line = status_line("training", "\u2501" * 12, "60/120", FIGURES, "left 2m 10s", width)
    assert len(line) <= width and "60/120" in line and line.endswith("left 2m 10s")
    assert ("loss 3.4204" in line) == (width >= 40)
    assert ("memory" in line) == (width == 200)


def test_the_loss_stays_on_a_terminal_after_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    shown = Shown(Console(file=out, width=80, force_terminal=True, highlight=False))
    shown.start("training", 3)
    shown.advance(3, FIGURES)
    shown.end()
    assert "training 3/3 loss 3.4204 in " in out.getvalue().splitlines()[-1]


def test_small_helpers() -> None:
    assert printable("a\tb\x00") == "a\u2409b\u2400"
    assert duration(0.5) == "0.5s"


def test_a_torn_log_line_is_skipped_and_a_nan_is_no_json(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.log.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(run.log) == [{"step": 1}]
    with pytest.raises(ValueError):
        write_json(run.metrics, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == [run.log], "nothing half-written is left"
