"""The comparison with other tools: the same rows for all, the gate of equal loss, medians, and nothing private."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench.workloads import REGIMES, TAIL, limit_of, tuned_for
from bench.workloads import TOOLS as ALL_TOOLS
from rich.console import Console

from peftcli.bench import child, compare
from peftcli.bench.child import flops, make_tokenizer
from peftcli.bench.compare import (
    FEWEST_STEPS,
    MOST_STEPS,
    BenchRequest,
    make_model,
    quick_tools,
    steps_for,
    take_turns,
)
from peftcli.bench.measure import Exited, Measurement, measure, run_process
from peftcli.bench.result import LARGEST_SHARE, Measurements, judge_losses, regime_result, verdict
from peftcli.bench.workload import (
    END,
    IGNORED,
    SHAPES,
    TOOLS,
    Job,
    Tool,
    choose_shape,
    draw_rows,
    mean_attended,
    write_rows,
)
from peftcli.cli.bench import bench_table, nameless, tool_line
from peftcli.errors import MachineError
from peftcli.plan.machine import Machine
from peftcli.plan.memory.model_shape import Linear, ModelDimensions, Norm
from peftcli.progress import Silent
from peftcli.run_dir import read_json

Cli = Callable[..., int]
GIB = 2**30
MADE = {
    "folder": "/somewhere/model",
    "shape": "tiny",
    "device": "cpu",
    "flash": False,
    "environment": {"schema": 1, "device": {"kind": "cpu", "name": "a processor"}},
    "parameters": 3_803_392,
    "peak_flops": None,
    "flops": {"token": 1e7, "attended": 1e4, "again": 4e6, "again_attended": 3e3},
}


def job_in(place: Path, *, steps: int = 3, regime: str = "skewed", bits: int = 16) -> Job:
    return Job(SHAPES["tiny"], bits, REGIMES[regime], steps, place, place / "model", "cpu")


def ran(seconds: float, loss: float = 6.0, memory: int = 900, **more: Any) -> Measurement:
    found = {
        "seconds": seconds,
        "first_step_seconds": 5.0,
        "process_seconds": 10.0 + seconds,
        "step_seconds": (seconds / 3,) * 2,
        "losses": (loss, loss, loss),
        "peak_bytes": memory,
        "above_bytes": memory // 2,
        "gpu_bytes": None,
        "recomputed": 0.0,
        "adapter": Path("adapter"),
        "details": {},
    }
    return Measurement(**{**found, **more})


# Rows


def test_chat_lengths_have_the_median_and_the_ninth_decile_of_the_fixture() -> None:
    lengths = sorted(len(row.ids) for row in draw_rows(REGIMES["skewed"], 4000, 2048, seed=0))
    assert statistics.median(lengths) == pytest.approx(98, abs=4)
    assert lengths[3600] == pytest.approx(248, abs=15)
    assert (lengths[0], lengths[-1]) == (33, 418)
    assert 8 * statistics.mean(lengths) == pytest.approx(1000, abs=60)  # tokens of a step


def test_the_long_tail_is_one_row_of_a_hundred_at_eight_times_the_length() -> None:
    lengths = [len(row.ids) for row in draw_rows(REGIMES["long_tail"], 2000, 2048, seed=0)]
    tail = lengths[50::100]
    assert max(lengths[:50] + lengths[51:150]) <= 418 < max(tail) <= REGIMES["long_tail"].max_length == 418 * TAIL
    assert all(length % TAIL == 0 and length >= 33 * TAIL for length in tail)
    assert sum(length > 418 for length in lengths) == sum(length > 418 for length in tail)


def test_uniform_rows_have_one_length_and_short_ones_a_few_tokens() -> None:
    assert {len(row.ids) for row in draw_rows(REGIMES["uniform"], 50, 2048, seed=0)} == {128}
    assert max(len(row.ids) for row in draw_rows(REGIMES["short"], 500, 2048, seed=0)) <= 12


def test_rows_of_a_seed_are_the_same_and_end_on_the_end_token() -> None:
    rows = draw_rows(REGIMES["short"], 200, 2048, seed=3)
    assert rows == draw_rows(REGIMES["short"], 200, 2048, seed=3)
    assert rows != draw_rows(REGIMES["short"], 200, 2048, seed=4)
    for row in rows:
        assert row.ids[-1] == END and row.prompt and len(row.answer) >= 2
        assert [label for label in row.labels if label != IGNORED] == list(row.answer)


def test_words_become_the_ids_that_they_were_drawn_as(tmp_path: Path) -> None:
    rows = draw_rows(REGIMES["short"], 40, 300, seed=0)
    write_rows(rows, tmp_path, "rows")
    tokenizer = make_tokenizer(300, 1024)
    for line, row in zip((tmp_path / "rows.jsonl").read_text().splitlines(), rows, strict=True):
        text = json.loads(line)
        assert tokenizer(text["prompt"])["input_ids"] == list(row.prompt)
        assert tokenizer(text["prompt"] + text["completion"] + "</s>")["input_ids"] == row.ids
    kept = [json.loads(line) for line in (tmp_path / "rows-ids.jsonl").read_text().splitlines()]
    assert kept == [{"input_ids": row.ids, "labels": row.labels} for row in rows]


def test_a_token_sees_half_of_its_own_row() -> None:
    assert mean_attended(draw_rows(REGIMES["uniform"], 5, 2048, seed=0)) == 64


def test_longer_rows_for_larger_models_keep_very_short_ones_short() -> None:
    assert REGIMES["skewed"].stretched(4).median == 392
    assert REGIMES["short"].stretched(4) == REGIMES["short"]


# What each tool is told


def test_every_tool_is_told_the_same_rate_steps_and_rows(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    recipe, plain = job.recipe(TOOLS["flat"].settings), job.sft(TOOLS["trl"], tmp_path / "run")
    assert recipe["trainer"].items() <= plain["arguments"].items()
    assert recipe["seed"] == plain["arguments"]["seed"]
    assert recipe["adapter"]["init_from"] == plain["adapter"]
    assert plain["arguments"]["max_length"] == recipe["dataset"]["max_length"] == 418
    assert {"bf16", "activation_checkpointing", "padding_free"}.isdisjoint(plain["arguments"])


def test_tuned_is_without_padding_and_checkpointing_and_has_no_length(tmp_path: Path) -> None:
    told = job_in(tmp_path, bits=4).sft(ALL_TOOLS["trl_tuned"], tmp_path / "run")
    assert told["arguments"]["padding_free"] and told["arguments"]["activation_checkpointing"] is False
    assert told["arguments"]["max_length"] is None
    assert told["bits"] == 4


def test_tuned_on_a_card_loads_its_weights_in_16_bit(tmp_path: Path) -> None:
    tuned = tuned_for(ALL_TOOLS["trl_tuned"], on_gpu=True, flash=True)
    told = job_in(tmp_path).sft(tuned, tmp_path / "run")
    assert told["model_settings"] == {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
    assert "dtype" not in told["arguments"]
    assert tuned_for(TOOLS["trl"], on_gpu=True, flash=True) == TOOLS["trl"]


def test_the_shape_goes_by_the_machine() -> None:
    processor = Machine("cpu", "a processor", None, native_bf16=False, arch_list=(), memory_bytes=64 * GIB)
    assert choose_shape("auto", 16, processor).key == "tiny"
    for memory, bits, key in ((15, 16, "0.6b"), (15, 4, "3b"), (80, 16, "3b"), (4, 16, "tiny")):
        card = Machine("cuda", "a card", (8, 0), native_bf16=True, arch_list=(), memory_bytes=memory * GIB)
        assert choose_shape("auto", bits, card).key == key
    assert choose_shape("8b", 16, processor).key == "8b"


def test_the_short_comparison_on_a_cpu_holds_float32_against_float32() -> None:
    assert [tool.name for tool in quick_tools("cpu")] == ["flat", "padded", "trl_fp32"]
    assert [tool.name for tool in quick_tools("cuda")] == ["flat", "padded", "trl"]


def test_steps_go_by_the_minutes_and_by_what_a_short_run_took() -> None:
    trial = ran(0.4, step_seconds=(0.1, 0.1, 0.1), process_seconds=5.4)
    # 5.4 s are gone and nine starts of 5 s go; the rest is for three rounds of 0.1 s times 5.5.
    assert steps_for(BenchRequest(minutes=2.0, rounds=3), trial) == int((120 - 5.4 - 45) / (3 * 0.55))
    assert steps_for(BenchRequest(minutes=0.1), trial) == FEWEST_STEPS
    assert steps_for(BenchRequest(minutes=60), trial) == MOST_STEPS


# Processes


def test_a_process_is_timed_and_the_peak_of_its_memory_is_kept(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import time; block = b'x' * 80_000_000; time.sleep(0.2); print('done')"]
    looks: list[int] = []
    ended = run_process(words, tmp_path / "log", lambda: looks.append(1))
    assert ended.error is None and ended.output == "done\n"
    assert ended.seconds > 0.2 and looks
    assert ended.peak_bytes > 80_000_000


def test_the_error_of_a_process_is_its_last_words(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise ValueError('no such thing')"]
    assert run_process(words, tmp_path / "log").error == "ValueError: no such thing"
    said = "import sys; print('loading'); print('error: a.yaml: wrong; mend it'); print('  more'); sys.exit(3)"
    assert run_process([sys.executable, "-c", said], tmp_path / "log").error == "a.yaml: wrong; mend it / more"
    silent = run_process([sys.executable, "-c", "import os; os._exit(9)"], tmp_path / "log")
    assert silent.error == "ended with exit code 9"


# The gate


def test_equal_losses_are_within_the_gate_and_others_are_not() -> None:
    steps = (7.0, 6.9, 6.8)
    assert judge_losses(steps, 6.5, steps, 6.5, LARGEST_SHARE).met
    assert judge_losses(steps, 6.5, steps, 6.5, LARGEST_SHARE).largest == 0
    assert not judge_losses(steps, 6.6, steps, 6.5, LARGEST_SHARE).met  # 1.5 % more on held-out rows
    assert not judge_losses(steps, 6.4, steps, 6.5, LARGEST_SHARE).met  # a better one is another training too
    assert not judge_losses((7.1, 7.0, 6.9), 6.5, steps, 6.5, LARGEST_SHARE).met
    assert not judge_losses(steps, math.nan, steps, 6.5, LARGEST_SHARE).met
    assert not judge_losses(steps, None, steps, 6.5, LARGEST_SHARE).met


def test_with_other_steps_only_the_held_out_rows_are_compared() -> None:
    gate = judge_losses((6.8,), 6.5, (7.0, 6.8), 6.5, LARGEST_SHARE)
    assert gate.met and gate.largest is None


def test_the_limit_is_three_spreads_of_the_reference_and_at_most_half_a_percent() -> None:
    assert limit_of([6.0, 6.1]) == LARGEST_SHARE
    assert limit_of([6.0, 6.0006]) == pytest.approx(0.0003)


# Figures


def figures(place: Path, runs: dict[str, list[Measurement]], **more: Any) -> dict[str, Any]:
    job = job_in(place)
    rows = job.write()
    held_out = {name: made[0].losses[-1] for name, made in runs.items() if made}
    measured = Measurements(runs, more.get("errors", {}), more.get("held_out", held_out), LARGEST_SHARE)
    names = [*runs, *more.get("errors", {})]
    return regime_result(job, rows, [TOOLS[name] for name in names], measured, {**MADE, **more.get("made", {})})


def test_medians_and_ratios_come_with_their_least_and_most(tmp_path: Path) -> None:
    runs = {
        "flat": [ran(2.0, memory=600), ran(1.0, memory=600), ran(3.0, memory=600)],
        "padded": [ran(4.0), ran(6.0), ran(5.0)],
    }
    found = figures(tmp_path, runs)
    assert found["tools"]["padded"]["seconds"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    ratio = found["ratios"]["padded"]
    assert (ratio["times_as_fast"], ratio["least"], ratio["most"]) == (2.5, 1.333, 6.0)
    assert ratio["memory_share"] == 0.667 and ratio["memory_above_start_share"] == 0.667
    assert ratio["process_share"] == 0.8
    assert found["rounds"] == 3 and "flat" not in found["ratios"]


def test_tokens_a_second_count_no_padding_and_mfu_leaves_out_what_runs_twice(tmp_path: Path) -> None:
    runs = {"flat": [ran(2.0)], "padded": [ran(4.0, recomputed=1.0)]}
    found = figures(tmp_path, runs, made={"peak_flops": 1e12})
    flat, padded = found["tools"]["flat"], found["tools"]["padded"]
    assert flat["tokens_per_second"] == pytest.approx(found["tokens"] / 2, abs=0.1)
    assert flat["label_tokens_per_second"] == pytest.approx(found["label_tokens"] / 2, abs=0.1)
    assert flat["hardware_tflops"] == flat["model_tflops"]
    assert padded["hardware_tflops"] > 1.3 * padded["model_tflops"]
    seen = mean_attended(job_in(tmp_path).write())
    work = found["tokens"] * (1e7 + 1e4 * seen) / 2
    assert flat["mfu"] == pytest.approx(work / 1e12, abs=1e-4)
    assert padded["mfu"] == pytest.approx(flat["mfu"] / 2, abs=1e-4)


def test_another_loss_gets_no_speed_and_no_ratio(tmp_path: Path) -> None:
    runs = {"flat": [ran(1.0)], "padded": [ran(2.0)], "trl": [ran(4.0, loss=6.2)]}
    found = figures(tmp_path, runs)
    assert not found["tools"]["trl"]["equal_loss"]
    assert "label_tokens_per_second" not in found["tools"]["trl"]
    assert set(found["ratios"]) == {"padded"}
    assert verdict(found).startswith("no ratio: the losses are not equal")
    shown = Console(width=200)
    with shown.capture() as text:
        shown.print(bench_table(found))
    assert "other loss" in text.get()


def test_a_tool_that_does_not_run_has_a_line_with_its_error(tmp_path: Path) -> None:
    found = figures(tmp_path, {"flat": [ran(1.0)], "padded": [ran(2.0)]}, errors={"trl": "CUDA out of memory"})
    assert found["tools"]["trl"] == {"title": "SFTTrainer (defaults)", "error": "CUDA out of memory"}
    assert tool_line(found["tools"]["trl"]) == "SFTTrainer (defaults) did not run: CUDA out of memory"
    assert verdict(found) == "no ratio: SFTTrainer (defaults) did not run (CUDA out of memory)"


def test_the_verdict_takes_the_faster_of_two_dtypes(tmp_path: Path) -> None:
    runs = {"flat": [ran(1.0)], "padded": [ran(2.0)], "trl": [ran(9.0)], "trl_fp32": [ran(2.5, memory=1800)]}
    said = verdict(figures(tmp_path, runs))
    assert said == (
        "peftcli trains 2.50 times as fast as SFTTrainer (defaults, float32) here (2.50 to 2.50 over 1 round), "
        "with 0.50 of its memory, at the same held-out loss (6.0000 and 6.0000)"
    )


def test_no_folder_and_no_name_is_in_what_is_sent_in() -> None:
    found = {"a": [{"error": "/home/anna/x/model.py: no room on pc7"}], "b": 1.5, "c": None}
    clean = nameless(found, {"anna": "***", "pc7": "***"})
    assert clean == {"a": [{"error": ".../model.py: no room on ***"}], "b": 1.5, "c": None}


def test_the_work_of_a_token_is_four_products_a_weight_and_six_with_checkpointing() -> None:
    linear = Linear("mlp.up_proj", 100, 100, 10)
    norm = Norm(100, 1, True)
    shape = ModelDimensions(100, 10, 100, 100, 1, 100, 2, 10, 50, 105_000, (linear,), (norm,), norm)
    weights, adapter = 100 * 100 * 10, 16 * 200 * 10
    found = flops(shape, 16)
    assert found["token"] == 4 * weights + 6 * adapter + 4 * 50 * 100
    assert found["again"] == 2 * (weights + adapter)
    assert found["attended"] == 3 * 4 * 10 * 100 and found["again_attended"] == 4 * 10 * 100


# Turns


def test_tools_take_turns_and_one_that_fails_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "judge", lambda job, adapters: dict.fromkeys(adapters, 6.0))
    called: list[str] = []

    def run(tool: Tool, job: Job) -> Measurement | str:
        called.append(tool.name)
        (tmp_path / "made").mkdir(exist_ok=True)
        return "it is missing" if tool.name == "trl" else ran(1.0, adapter=tmp_path / "made")

    tools = [TOOLS[name] for name in ("flat", "trl", "padded")]
    found = take_turns(tools, job_in(tmp_path), 3, Silent(), run=run)
    assert called == ["flat", "trl", "padded", "flat", "padded", "flat", "padded"]
    assert [len(made) for made in found.runs.values()] == [3, 0, 3]
    assert found.errors == {"trl": "it is missing"} and found.held_out == {"flat": 6.0, "padded": 6.0}


def test_a_model_that_cannot_be_made_is_a_fault_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "a-file"
    full.write_text("")
    monkeypatch.setenv("PEFTCLI_CACHE", str(full))
    with pytest.raises(MachineError, match="could not be written"):
        make_model("tiny", 16, tmp_path)
    assert run_cli("bench", "--shape", "7b") == 2
    assert "must be one of auto, tiny, 0.6b, 3b, 8b" in capfd.readouterr().err
    assert run_cli("bench", "--bits", "8") == 2
    assert "--bits 8" in capfd.readouterr().err


def test_bench_prints_a_table_and_writes_what_to_send_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "make_model", lambda shape, bits, place: MADE)
    monkeypatch.setattr(compare, "judge", lambda job, adapters: dict.fromkeys(adapters, 6.0))
    (tmp_path / "made").mkdir()
    taken = {"flat": 1.0, "padded": 2.0, "trl_fp32": 3.0}

    def run(tool: Tool, job: Job) -> Measurement:
        return ran(taken[tool.name], adapter=tmp_path / "made")

    monkeypatch.setattr(compare, "measure", run)
    assert run_cli("bench", "--rounds", "2", "--output", "bench.json") == 0
    said = capfd.readouterr().out
    assert "SFTTrainer (defaults, float32)" in said and "peftcli trains 3.00 times as fast" in said
    text = (tmp_path / "bench.json").read_text()
    found = json.loads(text)
    assert found["regimes"][0]["ratios"]["trl_fp32"]["times_as_fast"] == 3.0
    assert found["environment"]["device"]["name"] == "a processor" and str(tmp_path) not in text
    assert run_cli("bench", "--json") == 0
    out = capfd.readouterr().out
    assert json.loads(out)["verdict"] == found["verdict"].replace("2 rounds", "3 rounds")


def run_here(verb: str, spec: Path, result: Path) -> Exited:
    """One verb of `peftcli.bench.child` in this process, which has loaded the libraries already."""
    child.main([verb, str(spec), str(result)])
    return Exited(0, 0.0, 0, "")


def test_flat_padded_and_plain_training_of_the_same_rows_have_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "run_child", run_here)  # makes the model and judges; each tool has its own process
    made = make_model("tiny", 16, tmp_path)
    job = Job(SHAPES["tiny"], 16, REGIMES["short"], 3, tmp_path, Path(made["folder"]), "cpu")
    rows = job.write()
    tools = [TOOLS[name] for name in ("flat", "padded", "trl_fp32")]
    measured = take_turns(tools, job, 1, Silent(), run=measure)
    assert not measured.errors
    found = regime_result(job, rows, tools, measured, made)
    for tool in found["tools"].values():
        assert tool["largest_loss_difference"] < 1e-5 and tool["equal_loss"]
        assert tool["seconds"]["median"] < tool["process_seconds"]["median"]
        assert 0 < tool["first_step_seconds"]["median"] < tool["process_seconds"]["median"]
        assert 0 <= tool["above_start_bytes"] < tool["peak_memory_bytes"]
    flat = found["tools"]["flat"]
    assert (flat["tokens"], flat["trained_tokens"]) == (found["tokens"], found["label_tokens"])
    assert flat["first_loss"] > flat["last_loss"]  # there is something to learn
    # What computed attention and loss is read from the run, not from what was asked for.
    lines = {name: tool_line(tool) for name, tool in found["tools"].items()}
    assert flat["micro_batch_tokens"] == read_json(tmp_path / "run-flat" / "plan.json")["batching"]["tokens"]
    assert lines["flat"] == (
        f"peftcli: attention {', '.join(flat['batching']['attention'])}, loss head fused_loss, "
        f"up to {flat['micro_batch_tokens']:,} tokens per micro-batch"
    )
    padded = 32 * found["longest_tokens"]
    assert lines["padded"].endswith(f": attention sdpa, loss head fused_loss, up to {padded} tokens per micro-batch")
    assert lines["trl_fp32"].endswith(f": attention sdpa, loss head TRL nll, up to {padded} tokens per micro-batch")


def test_the_process_that_starts_the_others_loads_no_torch() -> None:
    # Linux counts the memory of the starting process into the peak of a child.
    heavy = "import sys, peftcli.cli.bench; print([name for name in ('torch', 'peft', 'trl') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
