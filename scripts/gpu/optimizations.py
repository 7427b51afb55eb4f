"""Each optimization on and off, one after the other on the same weights and rows: A B A B' A, at equal loss.

    python scripts/gpu/optimizations.py [--seconds 150]

A is peftcli as it comes without checkpointing; each B changes one thing and stands between two As, so that a clock that
drifts slows both. A variant whose losses differ gets no speed. Times are those of CUDA events, medians over the steps
after the warm ones; on a CPU those of its clock, which say nothing.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from as_t4 import as_t4
from datasets import Dataset
from peft import LoraConfig
from settings import device_name, record, rehearsing, scale
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer
from workbench import StepClock, Trained, Workbench, widest_dtype

from peftcli.bench.workload import ALPHA, RANK, SEED
from peftcli.errors import PeftcliError
from peftcli.model import fused_loss, padding_free
from peftcli.model.hardware import peak_memory_bytes
from peftcli.model.oom import free_memory

LOSS_TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Mean difference of the losses, as a share: see tests/gpu/test_train.py."""
PLAIN = {"activation_checkpointing": False}
LINES = (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Variant:
    """One thing that is changed.

    Attributes:
        performance, trainer: keys of the recipe.
        changed: a context in which the base or the product is changed.
        train: another way to train, in place of peftcli's.
        impossible: why it cannot be run here, empty where it can.
    """

    performance: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    changed: Callable[[Workbench], Any] = lambda bench: nullcontext()
    train: Callable[[Workbench, str], Trained] | None = None
    impossible: str = ""


def side_by_side(bench: Workbench) -> Any:
    """No attention kernel reads rows by their edges."""
    return patch.object(padding_free, "kernel_for", lambda *given, **more: None)


@contextmanager
def fused_norms(bench: Workbench) -> Iterator[None]:
    """torch's own root mean square norm, one kernel where transformers writes out several operations."""
    norms = [module for module in bench.model.modules() if hasattr(module, "variance_epsilon")]
    for norm in norms:
        norm.forward = _rms_norm(norm)
    try:
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)


def _rms_norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)

    return forward


@contextmanager
def own_head(bench: Workbench) -> Iterator[None]:
    """peftcli's loss head on a GPU, where it otherwise takes the place of TRL's only if that fails its check."""
    failed = patch.object(fused_loss, "trl_loss_problem", lambda *given: "left out, to be compared with")
    with failed, patch.object(fused_loss, "disable_triton", lambda: None):
        yield


@contextmanager
def liger_layers(bench: Workbench) -> Iterator[None]:
    """Liger's kernels for rotary embeddings, norms and the feed-forward; the loss stays as it is."""
    import sys

    from liger_kernel import transformers as liger

    module = sys.modules[type(bench.model).__module__]
    before = dict(vars(module))
    apply = getattr(liger, f"apply_liger_kernel_to_{bench.model.config.model_type}")
    apply(model=bench.model, cross_entropy=False, fused_linear_cross_entropy=False)
    try:
        yield
    finally:
        vars(module).update(before)
        for one in bench.model.modules():
            for name in ("forward", "extra_repr", "_get_name"):
                one.__dict__.pop(name, None)


def train_with_trl(bench: Workbench, name: str) -> Trained:
    """SFTTrainer with padding-free batches on the same base, rows and first weights."""
    rows = [{"input_ids": row.ids, "labels": row.labels} for row in bench.rows]
    arguments = SFTConfig(
        output_dir=str(bench.place / f"run-{name}"),
        **bench.arguments,
        bf16=bench.dtype == torch.bfloat16,
        fp16=bench.dtype == torch.float16,
        use_cpu=device_name() == "cpu",
        padding_free=True,
        max_length=None,
        activation_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    clock = StepClock(scale().warm)
    set_seed(SEED)
    trainer = SFTTrainer(
        model=bench.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(bench.place / "model"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    try:
        trainer.train()
        peak = peak_memory_bytes(device_name())
        log = [row for row in trainer.state.log_history if "loss" in row]
    finally:
        wrapped = trainer.model
        del trainer
        bench.restore(wrapped)
    tokens = int(log[-1]["num_tokens"] - log[scale().warm - 1]["num_tokens"])
    return Trained(tuple(row["loss"] for row in log), clock.seconds(), tokens, peak)


def variants(bench: Workbench) -> dict[str, Variant]:
    """What is changed, by name."""
    on_cpu = device_name() == "cpu"
    triton = "Triton has no kernels for a CPU" if on_cpu else ""
    packed = "they are not quantized either way" if bench.bits == 4 else ""
    return {
        "rows side by side": Variant(changed=side_by_side),
        "padded": Variant(performance={"batching": "padded"}),
        "TRL, padding-free": Variant(train=train_with_trl),
        "without fused LoRA": Variant(performance={"disable": ["fused_lora"]}),
        "TRL's loss head": Variant(
            performance={"disable": ["fused_loss"]}, impossible="" if on_cpu else "a GPU has it either way"
        ),
        "peftcli's loss head": Variant(changed=own_head, impossible="a CPU has it either way" if on_cpu else ""),
        "torch's rms_norm": Variant(changed=fused_norms, impossible=packed),
        "Liger's layers": Variant(changed=liger_layers, impossible=packed or triton),
    }


class Comparison:
    """Variants beside A, until the time is over."""

    def __init__(self, label: str, bench: Workbench, deadline: float) -> None:
        self._label, self._bench, self._deadline = label, bench, deadline
        self._work = bench.work()
        self._number = 0
        self.failed = 0

    def run(self, found: Mapping[str, Variant]) -> None:
        """Run each variant between two As and keep its figures at once."""
        before = self._train(Variant())
        self._keep("A", {**self._speed(before), **_choices(before)})
        for name, variant in found.items():
            if variant.impossible or time.monotonic() > self._deadline:
                self._keep(name, {"skipped": variant.impossible or "the time of this step is over"})
                continue
            with variant.changed(self._bench):
                other = self._attempt(variant)
            if isinstance(other, str):
                self._keep(name, {"error": other})
                self.failed += 1
                continue
            after = self._train(Variant())
            self._keep(name, self._beside(other, before, after))
            before = after

    def alone(self, name: str, variant: Variant, blocks: int | None) -> None:
        """Run one variant with checkpointed blocks, by itself."""
        if time.monotonic() > self._deadline:
            self._keep(name, {"skipped": "the time of this step is over"})
            return
        found = self._attempt(variant, blocks)
        self.failed += isinstance(found, str)
        self._keep(name, {"error": found} if isinstance(found, str) else self._speed(found) | _choices(found))

    def _attempt(self, variant: Variant, blocks: int | None = None) -> Trained | str:
        try:
            return self._train(variant, blocks)
        # One variant that does not run here says so, and the others are still compared.
        except (PeftcliError, RuntimeError, ValueError, TypeError, ImportError, AttributeError) as problem:
            said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        free_memory()
        return said

    def _train(self, variant: Variant, blocks: int | None = None) -> Trained:
        self._number += 1
        name = f"{self._label}-{self._number}"
        if variant.train is not None:
            return variant.train(self._bench, name)
        trainer = {**PLAIN, **variant.trainer}
        return self._bench.train(
            name, performance=variant.performance, trainer=trainer, blocks=blocks, warm=scale().warm
        )

    def _speed(self, found: Trained) -> dict[str, Any]:
        rate = found.tokens / sum(found.step_seconds)
        work = self._work
        return {
            "step_milliseconds": round(1000 * found.seconds, 3),
            "tokens_per_second": round(rate, 1),
            "mfu": None if work is None else round(rate * work[0] / work[1], 4),
            "peak_bytes": found.peak_bytes,
        }

    def _beside(self, found: Trained, before: Trained, after: Trained) -> dict[str, Any]:
        reference = (before.seconds + after.seconds) / 2
        off = _loss_difference(found, before)
        equal = off is not None and off <= LOSS_TOLERANCES[self._bench.dtype]
        speed = self._speed(found) | {"time_over_a": round(found.seconds / reference, 4)} if equal else {}
        spread = round(abs(after.seconds - before.seconds) / reference, 4)
        return {"equal_loss": equal, "loss_difference": off, "spread_of_a": spread, **speed, **_choices(found)}

    def _keep(self, name: str, figures: Mapping[str, Any]) -> None:
        record({f"{self._label}: {name}": dict(figures)})
        print(f"{self._label}: {name}: {dict(figures)}", flush=True)


def _choices(found: Trained) -> dict[str, Any]:
    """What the product chose, as it says itself."""
    if not found.facts:
        return {}
    return {
        "attention": found.facts["batching"]["attention"],
        "rejected": found.facts["batching"]["rejected_kernels"],
        "optimizations": found.facts["levers"],
        "out_of_memory": len(found.facts["out_of_memory"]),
    }


def _loss_difference(found: Trained, reference: Trained) -> float | None:
    if len(found.losses) != len(reference.losses):
        return None
    off = sum(abs(one - other) for one, other in zip(found.losses, reference.losses, strict=True))
    return round(off / sum(reference.losses), 8)


def bench_of(place: Path, label: str, dtype: torch.dtype, bits: int = 16) -> Workbench:
    """The large model in a folder of its own."""
    folder = place / label.replace(" ", "-")
    folder.mkdir()
    return Workbench(scale().large, folder, bits=bits, dtype=dtype, steps=scale().warm + scale().timed)


def compare_bits(place: Path, label: str, bits: int, deadline: float) -> int:
    """All variants on one base; returns how many failed."""
    bench = bench_of(place, label, widest_dtype(), bits)
    comparison = Comparison(label, bench, deadline)
    comparison.run(variants(bench))
    return comparison.failed


def compare_lines(place: Path, deadline: float) -> int:
    """Tokens of a micro-batch times checkpointed blocks, on steps of twice as many rows; returns how many failed."""
    bench = bench_of(place, "lines", widest_dtype())
    comparison = Comparison("lines", bench, deadline)
    layers = int(bench.shape.sizes["num_hidden_layers"])
    for tokens in LINES[:2] if rehearsing() else LINES:
        for blocks in (0, layers // 2, layers):
            variant = Variant({"tokens_per_micro_batch": tokens}, {"gradient_accumulation_steps": 2})
            comparison.alone(f"{tokens} tokens, {blocks} of {layers} blocks checkpointed", variant, blocks)
    return comparison.failed


def compare_as_t4(place: Path, deadline: float) -> int:
    """The attention of a T4 in float16, beside rows side by side; returns how many failed."""
    dtype = widest_dtype() if rehearsing() else torch.float16
    bench = bench_of(place, "as on a T4", dtype)
    comparison = Comparison("as on a T4", bench, deadline)
    with as_t4():
        comparison.run({"rows side by side": Variant(changed=side_by_side)})
    return comparison.failed


def main() -> None:
    """Run everything that there is time for; the exit code is 1 where a variant failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0, help="after which no further variant begins")
    deadline = time.monotonic() + parser.parse_args().seconds
    parts: Sequence[Callable[[Path], int]] = (
        lambda place: compare_bits(place, "16 bit", 16, deadline),
        lambda place: compare_bits(place, "4 bit", 4, deadline),
        lambda place: compare_lines(place, deadline),
        lambda place: compare_as_t4(place, deadline),
    )
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            failed += part(Path(folder))
            free_memory()
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
