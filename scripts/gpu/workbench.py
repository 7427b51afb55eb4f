"""Models made in memory, and trained by peftcli's own `train` again and again in one process.

A model of a few billion weights is made once, on the GPU. Each training wraps it, steps, and takes the adapter off, so
that variants are compared within seconds of each other on the same weights.
"""

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from safetensors.torch import save_file
from settings import device_name, scale
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from peftcli.bench.child import flops, make_tokenizer
from peftcli.bench.workload import ALPHA, END, RANK, SEED, SKEWED, Row, draw_rows, mean_attended, write_rows
from peftcli.cli.pipeline import plan_recipe, prepare_data
from peftcli.model import varlen_attention
from peftcli.model.hardware import peak_memory_bytes, probe_machine
from peftcli.model.inspect import read_shape
from peftcli.model.load import keep_gradients_of_4bit, local_device
from peftcli.model.oom import free_memory
from peftcli.plan.gpus import gpu_of
from peftcli.plan.plan import Plan
from peftcli.progress import Silent
from peftcli.recipe.load import load_recipe
from peftcli.run_dir import RunDir, read_json, read_log
from peftcli.train import run as training
from peftcli.train.stop import StopRequests
from peftcli.train.trainers import Trainer


@dataclass(frozen=True)
class Shape:
    """A model with random weights.

    Attributes:
        family: model type of transformers.
        sizes: arguments of its configuration.
        stretch: rows are so many times as long as those of a tiny model.
        learning_rate: at which random weights learn something within a few steps and do not diverge.
    """

    family: str
    sizes: Mapping[str, Any]
    stretch: int = 4
    learning_rate: float = 2e-4


def _sizes(hidden: int, layers: int, heads: int, key_heads: int, feed_forward: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": hidden // heads,
        "intermediate_size": feed_forward,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
    }


SHAPES = {
    "3b": Shape("llama", _sizes(3072, 28, 24, 8, 8192, 128256)),
    "1b": Shape("llama", _sizes(2048, 16, 32, 8, 8192, 128256)),
    "0.6b": Shape("qwen3", _sizes(1024, 28, 16, 8, 3072, 151936) | {"head_dim": 128}),
    "small": Shape("llama", _sizes(1024, 8, 16, 8, 2816, 32000)),
    "rehearsal": Shape("llama", _sizes(64, 2, 4, 2, 128, 512), stretch=1, learning_rate=2e-3),
}
"""The sizes of Llama-3.2-3B, Llama-3.2-1B and Qwen3-0.6B, one that a small GPU trains at once, and one for a CPU."""


@dataclass(frozen=True)
class Trained:
    """What one training took.

    Attributes:
        losses: of each step.
        step_seconds: of each timed step.
        tokens: fed in the timed steps, padding aside.
        peak_bytes: of torch's allocator over the timed steps; of the process on a CPU.
        facts: `train.json`; empty for plain TRL.
        plan: None for plain TRL.
    """

    losses: tuple[float, ...]
    step_seconds: tuple[float, ...]
    tokens: int
    peak_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

    @property
    def seconds(self) -> float:
        """Of a timed step, median."""
        ordered = sorted(self.step_seconds)
        return ordered[len(ordered) // 2]


class StepClock(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """The time from the end of a step to the end of the next, by CUDA events, or by the clock of a CPU."""

    def __init__(self, warm: int) -> None:
        self._warm = warm
        self._cuda = device_name() == "cuda"
        self._ends: list[Any] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step < self._warm:
            return
        if not self._cuda:
            self._ends.append(time.perf_counter())
            return
        if state.global_step == self._warm:
            torch.cuda.reset_peak_memory_stats()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._ends.append(event)

    def seconds(self) -> tuple[float, ...]:
        """Of each step after the warm ones."""
        pairs = list(zip(self._ends, self._ends[1:], strict=False))
        if not self._cuda:
            return tuple(after - before for before, after in pairs)
        torch.cuda.synchronize()
        return tuple(before.elapsed_time(after) / 1000 for before, after in pairs)


@contextmanager
def added(*callbacks: TrainerCallback) -> Iterator[list[Trainer]]:
    """Add callbacks to each of peftcli's trainers when it begins to train.

    Yields:
        Those trainers.
    """
    made: list[Trainer] = []
    train = Trainer.train

    def watched(self: Trainer, *given: Any, **more: Any) -> Any:
        for callback in callbacks:
            self.add_callback(callback)
        made.append(self)
        return train(self, *given, **more)

    with patch.object(Trainer, "train", watched):
        yield made


class Workbench:
    """One base in memory, and the rows that it is trained on.

    Attributes:
        model: the base; between trainings without an adapter and as it was made.
        place: folder of the rows and runs, and of the configuration and tokenizer in `model`.
    """

    def __init__(self, shape: str, place: Path, *, bits: int = 16, dtype: torch.dtype, steps: int) -> None:
        """
        Args:
            shape: a key of `SHAPES`.
            bits: 16, or 4 for NF4 with double quantization.
            dtype: of weights that are not quantized, and of the products.
            steps: of the longest training.
        """
        self.shape = SHAPES[shape]
        self.place = place
        self.bits = bits
        self.dtype = dtype
        self.steps = steps
        self._config = _write_folder(self.shape, place / "model")
        self.regime = SKEWED.stretched(self.shape.stretch)
        if scale().name == "rehearsal":
            self.regime = replace(self.regime, rows=4, median=24, shortest=8, longest=60)
        # Twice as many rows as steps need, for trainings that accumulate.
        vocabulary = int(self.shape.sizes["vocab_size"])
        self.rows: Sequence[Row] = draw_rows(self.regime, 2 * steps * self.regime.rows, vocabulary, seed=0)
        write_rows(self.rows, place, "rows")
        self.model = self._make()
        # What the imports made lives on; without this each collection looks through half a million objects.
        gc.collect()
        gc.freeze()

    def _make(self) -> PreTrainedModel:
        set_seed(0)
        with torch.device(device_name()):
            model = AutoModelForCausalLM.from_config(self._config, dtype=self.dtype, attn_implementation="sdpa")
        if self.bits != 4:
            return model  # type: ignore[no-any-return]
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )
        packed: PreTrainedModel = type(model).from_pretrained(
            None,
            config=self._config,
            state_dict=model.state_dict(),
            dtype=self.dtype,
            attn_implementation="sdpa",
            device_map={"": local_device(device_name())},
            quantization_config=quantization,
        )
        del model
        free_memory()
        keep_gradients_of_4bit(packed)
        return packed

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer that all trainings share."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.regime.rows,
            "learning_rate": self.shape.learning_rate,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
        }

    def recipe(self, *, performance: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe on this base with nothing held out, since only the steps are of interest; as JSON it is YAML too."""
        found: dict[str, Any] = {
            "name": "proof",
            "seed": SEED,
            "model": {"name": str(self.place / "model"), "dtype": str(self.dtype).removeprefix("torch.")},
            "adapter": {"r": RANK, "alpha": ALPHA, "target_modules": "all-linear"},
            "dataset": {
                "path": str(self.place / "rows.jsonl"),
                "columns": {"prompt": "prompt", "completion": "completion"},
                "split": {"test_size": 0},
                "max_length": self.regime.max_length,
                "limits": {"max_leaked": 1},
            },
            "trainer": {**self.arguments, **trainer},
            "performance": dict(performance),
            "evaluation": {"baseline": False},
        }
        return found | ({"quantization": {"bits": 4}} if self.bits == 4 else {})

    def train(
        self,
        name: str,
        *,
        performance: Mapping[str, Any] | None = None,
        trainer: Mapping[str, Any] | None = None,
        blocks: int | None = None,
        warm: int = 0,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Trained:
        """One training by `peftcli.train.run.train`, from the same first weights and on the same rows each time.

        Args:
            name: of the run's folder.
            performance, trainer: sections of the recipe.
            blocks: that are checkpointed; None leaves it to `trainer`.
            warm: steps that are not timed.
            callbacks: of transformers, beside peftcli's own.
        """
        plan, tokenizer, data = self._planned(name, performance or {}, trainer or {}, blocks)
        run = RunDir(self.place / f"run-{name}")
        run.path.mkdir(parents=True)
        clock = StepClock(warm)
        session = training.Session(StopRequests(run.path, None), None, {}, 0, trainer=plan.trainer)
        with self._lent(), added(clock, *callbacks) as trainers:
            set_seed(SEED)
            varlen_attention.rejected.clear()
            try:
                training.train(plan, run, data, tokenizer, Silent(), session)
                peak = peak_memory_bytes(device_name())
            finally:
                wrapped = trainers[0].accelerator.unwrap_model(trainers[0].model) if trainers else None
                trainers.clear()
                self.restore(wrapped)
        log = [row for row in read_log(run.log) if "loss" in row]
        tokens = int(log[-1]["tokens"] - (log[warm - 1]["tokens"] if warm else 0))
        losses = tuple(row["loss"] for row in log)
        return Trained(losses, clock.seconds(), tokens, peak, read_json(run.train), plan)

    def _planned(
        self, name: str, performance: Mapping[str, Any], trainer: Mapping[str, Any], blocks: int | None
    ) -> tuple[Plan, Any, Any]:
        file = self.place / f"{name}.yaml"
        file.write_text(json.dumps(self.recipe(performance=performance, trainer=trainer)))
        plan = plan_recipe(load_recipe(file)).plan
        if blocks is not None:
            arguments = {**plan.trainer, "activation_checkpointing": blocks > 0}
            plan = replace(plan, trainer=arguments, checkpointed_blocks=blocks or None)
        return plan, *prepare_data(plan, Silent())

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Let `train` take this base in place of one from the disk; the adapter's card describes no run of a user."""
        with (
            patch.object(training, "load_base", lambda base, **given: self.model),
            patch.object(training, "write_card", lambda run: None),
        ):
            yield

    def restore(self, wrapped: Any) -> None:
        """Take an adapter, a loss head, an attention and checkpointing off the base again.

        Args:
            wrapped: the base in PEFT's wrapper, or anything else where there is none.
        """
        if isinstance(wrapped, PeftModel):
            self.model = wrapped.unload()
        self.model.__dict__.pop("forward", None)
        self.model.set_attn_implementation("sdpa")
        if self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_disable()
        self.model.requires_grad_(False)
        del wrapped
        free_memory()

    def work(self) -> tuple[float, float] | None:
        """Products and sums of a token of these rows, and the peak of this GPU; None where it is not in the table."""
        card = gpu_of(probe_machine())
        with torch.device("meta"):
            dimensions = read_shape(AutoModelForCausalLM.from_config(self._config), self._config)
        if card is None or dimensions is None:
            return None
        found = flops(dimensions, self.bits)
        return found["token"] + found["attended"] * mean_attended(self.rows), card.tflops * 1e12


def _write_folder(shape: Shape, folder: Path) -> Any:
    """Write what a plan reads of a model: its configuration, its tokenizer, and a file of weights that none reads."""
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(shape.family, **shape.sizes, pad_token_id=0, bos_token_id=1, eos_token_id=END)
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)
    make_tokenizer(int(shape.sizes["vocab_size"]), int(shape.sizes["max_position_embeddings"])).save_pretrained(folder)
    save_file({"unused": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def widest_dtype() -> torch.dtype:
    """bfloat16 where this GPU computes it, float16 on an older one, float32 on a CPU, as a plan decides."""
    machine = probe_machine()
    if device_name() == "cpu":
        return torch.float32
    return torch.bfloat16 if machine.native_bf16 else torch.float16
