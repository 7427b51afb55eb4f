"""What `bench` trains: a model with random weights, rows drawn by seed, and the settings that every tool shares."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peftcli.plan.machine import Machine

GIB = 2**30
RANK, ALPHA = 16, 32
SEED = 42

# The model: real sizes with random weights, so that nothing is downloaded.


@dataclass(frozen=True)
class BenchShape:
    """One model.

    Attributes:
        key: for `--shape`.
        family: model type of transformers.
        sizes: arguments of its configuration.
        dtype: of the weights on disk.
        stretch: rows are this many times as long as those of the tiny model.
        learning_rate: at which random weights learn something within a few steps and do not diverge.
    """

    key: str
    family: str
    sizes: Mapping[str, Any]
    dtype: str
    stretch: int
    learning_rate: float


def _sizes(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": min(8, heads // 2),
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
    }


_TIED = {"tie_word_embeddings": True}
_QWEN3_06B = _sizes(1024, 28, 16, 3072, 151936) | {"head_dim": 128} | _TIED
_LLAMA_3B = _sizes(3072, 28, 24, 8192, 128256) | _TIED
SHAPES = {
    shape.key: shape
    for shape in (
        BenchShape("tiny", "llama", _sizes(256, 4, 8, 640, 2048), "float32", 1, 2e-3),
        BenchShape("0.6b", "qwen3", _QWEN3_06B, "bfloat16", 4, 2e-4),
        BenchShape("3b", "llama", _LLAMA_3B, "bfloat16", 4, 2e-4),
        BenchShape("8b", "llama", _sizes(4096, 32, 32, 14336, 128256), "bfloat16", 4, 2e-4),
    )
}
"""tiny has 3.8 million parameters; the others have the sizes of Qwen3-0.6B, Llama-3.2-3B and Llama-3.1-8B."""
LEAST_GIB = {16: {"3b": 36, "0.6b": 6}, 4: {"3b": 14, "0.6b": 6}}
"""GPU memory from which a shape is chosen: SFTTrainer loads the weights in float32 by default."""


def choose_shape(requested: str, bits: int, machine: Machine) -> BenchShape:
    """The shape of `--shape`, or for `auto` the largest that this machine trains in a few minutes."""
    if requested != "auto":
        return SHAPES[requested]
    if machine.device != "cuda":
        return SHAPES["tiny"]
    memory = machine.memory_bytes / GIB
    return SHAPES[next((key for key, least in LEAST_GIB[bits].items() if memory >= least), "tiny")]


# The rows: token ids whose lengths follow a regime, and the same rows as text.

IGNORED = -100
"""Label of a token that is not trained on."""
END = 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""The first ids of the vocabulary; every other id is a word `w` and its number."""
HELD_OUT_ROWS = 64
HELD_OUT_SEED = 1
FREQUENT = 64
"""Words that most tokens are drawn from, so that there is something to learn."""


@dataclass(frozen=True)
class Regime:
    """How long rows are.

    Attributes:
        name: in the results.
        median: tokens of a row.
        sigma: of the log-normal distribution, 0 for rows of one length.
        shortest, longest: limits of a drawn length, tokens.
        rows: per micro-batch; a step has one micro-batch.
    """

    name: str
    median: int
    sigma: float
    shortest: int
    longest: int
    rows: int = 8

    def stretched(self, times: int) -> "Regime":
        """The same regime with longer rows."""
        median, shortest, longest = (times * tokens for tokens in (self.median, self.shortest, self.longest))
        return replace(self, median=median, shortest=shortest, longest=longest)

    def draw_length(self, drawn: random.Random, number: int) -> int:
        """Tokens of the row with this number, counted from 0."""
        tokens = round(self.median * math.exp(self.sigma * drawn.gauss(0, 1)))
        return max(self.shortest, min(tokens, self.longest))

    @property
    def max_length(self) -> int:
        """Tokens of the longest row that can be drawn."""
        return self.longest


SKEWED = Regime("skewed", 98, 0.72, 33, 418)
"""Lengths of chats: median 98, nine of ten up to 248 tokens."""


@dataclass(frozen=True)
class Row:
    """One row as token ids; the answer ends with the end token, and only the answer is trained on."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return [*self.prompt, *self.answer]

    @property
    def labels(self) -> list[int]:
        """The ids of the answer; the prompt is ignored."""
        return [IGNORED] * len(self.prompt) + list(self.answer)


def draw_rows(regime: Regime, count: int, vocabulary: int, seed: int) -> list[Row]:
    """Rows whose lengths follow a regime, the same for the same seed.

    Half of the tokens follow from the one before, so that a model can learn them.
    """
    drawn = random.Random(f"{regime.name}-{seed}")
    rows = []
    for number in range(count):
        tokens = regime.draw_length(drawn, number)
        words = _words(drawn, tokens - 1, vocabulary)
        split = max(1, min(round(tokens * drawn.uniform(0.2, 0.6)), tokens - 2))
        rows.append(Row(tuple(words[:split]), (*words[split:], END)))
    return rows


def _words(drawn: random.Random, count: int, vocabulary: int) -> list[int]:
    first, word, made = len(SPECIAL), 0, []
    for _ in range(count):
        if drawn.random() < 0.5:
            word = (word * 5 + 7) % min(FREQUENT, vocabulary - first)
        else:
            word = drawn.randrange(vocabulary - first if drawn.random() < 0.2 else min(FREQUENT, vocabulary - first))
        made.append(first + word)
    return made


def write_rows(rows: Sequence[Row], folder: Path, name: str) -> None:
    """Write the rows twice: `NAME.jsonl` as prompt and answer in words, `NAME-ids.jsonl` as ids and labels."""
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as texts:
        for row in rows:
            texts.write(json.dumps({"prompt": _text(row.prompt), "completion": " " + _text(row.answer[:-1])}) + "\n")
    with (folder / f"{name}-ids.jsonl").open("w", encoding="utf-8") as ids:
        for row in rows:
            ids.write(json.dumps({"input_ids": row.ids, "labels": row.labels}) + "\n")


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{number - len(SPECIAL)}" for number in ids)


def mean_attended(rows: Sequence[Row]) -> float:
    """Mean number of tokens that a token attends to: half of its row."""
    lengths = [len(row.ids) for row in rows]
    return sum(length * length for length in lengths) / sum(lengths) / 2


# The tools and their settings.


@dataclass(frozen=True)
class Tool:
    """One way to train.

    Attributes:
        name: short, for options, files and the JSON.
        title: for people.
        ours: `peftcli train`; otherwise SFTTrainer.
        settings: for peftcli the section `performance`; otherwise arguments of SFTConfig, and `dtype` and
            `attn_implementation` of the model.
    """

    name: str
    title: str
    ours: bool
    settings: Mapping[str, Any] = field(default_factory=dict)


REFERENCE = "padded"
"""The tool whose losses those of the others are compared with."""
FLAT = "flat"
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(FLAT, "peftcli", True, {"batching": "padding_free"}),
        Tool(REFERENCE, "peftcli (padded)", True, {"batching": "padded"}),
        Tool("trl", "SFTTrainer (defaults)", False),
        # On a CPU without bfloat16 instructions the default is emulated, and slower than float32.
        Tool("trl_fp32", "SFTTrainer (defaults, float32)", False, {"bf16": False}),
    )
}


@dataclass(frozen=True)
class Job:
    """The inputs of every tool.

    Attributes:
        shape: of the model.
        bits: of its weights, 4 or 16; a CPU trains unquantized ones in float32.
        regime: of the rows.
        steps: of the optimizer.
        folder: for rows and runs.
        model: folder of the base model, with the initial adapter in `adapter/`.
        device: `cpu` or `cuda`.
        seed: of the order of the rows.
    """

    shape: BenchShape
    bits: int
    regime: Regime
    steps: int
    folder: Path
    model: Path
    device: str
    seed: int = SEED

    @property
    def adapter(self) -> Path:
        """The adapter that every tool starts from."""
        return self.model / "adapter"

    def write(self) -> list[Row]:
        """Write the training rows and the held-out rows; returns the training rows."""
        vocabulary = int(self.shape.sizes["vocab_size"])
        rows = draw_rows(self.regime, self.steps * self.regime.rows, vocabulary, seed=0)
        write_rows(rows, self.folder, "rows")
        write_rows(draw_rows(self.regime, HELD_OUT_ROWS, vocabulary, HELD_OUT_SEED), self.folder, "held-out")
        return rows

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer that all tools share."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.regime.rows,
            "learning_rate": self.shape.learning_rate,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
        }

    def recipe(self, performance: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe for peftcli; as JSON it is YAML too."""
        recipe: dict[str, Any] = {
            "name": "bench",
            "seed": self.seed,
            "model": {"name": str(self.model)},
            "adapter": {"r": RANK, "alpha": ALPHA, "target_modules": "all-linear", "init_from": str(self.adapter)},
            "dataset": {
                "path": str(self.folder / "rows.jsonl"),
                "columns": {"prompt": "prompt", "completion": "completion"},
                "test": {"path": str(self.folder / "held-out.jsonl")},
                "max_length": self.regime.max_length,
                "limits": {"max_leaked": 1},
            },
            "trainer": self.arguments,
            "performance": dict(performance),
            "evaluation": {"baseline": False, "samples": 0, "rows": 1, "max_new_tokens": 1},
        }
        if self.bits == 4:
            recipe["quantization"] = {"bits": 4}
        return recipe

    def sft(self, tool: Tool, run: Path) -> dict[str, Any]:
        """The spec of the child process that runs SFTTrainer."""
        settings = dict(tool.settings)
        model = {name: settings.pop(name) for name in ("dtype", "attn_implementation") if name in settings}
        length = None if settings.get("padding_free") else self.regime.max_length
        shared = {**self.arguments, "seed": self.seed, "max_length": length, "use_cpu": self.device == "cpu"}
        return {
            "model": str(self.model),
            "model_settings": model,
            "bits": self.bits,
            "adapter": str(self.adapter),
            "rows": str(self.folder / "rows-ids.jsonl"),
            "run": str(run),
            "arguments": {**shared, **settings},
        }


def write_spec(path: Path, spec: Mapping[str, Any]) -> Path:
    """Write a spec or a recipe as JSON, and return the path."""
    path.write_text(json.dumps(dict(spec)), encoding="utf-8")
    return path
