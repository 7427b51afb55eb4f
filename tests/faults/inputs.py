"""The 32 faults that were given to `trl sft`, among them numbers 1, 9 to 12 and 21 of the matrix."""

from table import Case
from workspace import Workspace, as_lines, pairs

VALIDATE = ("validate", "RECIPE")
FEW = pairs(8)
"""Rows of the cases with one bad row: an eighth is more than `dataset.limits` lets go."""


def with_one(**changes: object) -> bytes:
    """Eight rows, the fourth of them spoilt."""
    return as_lines([*FEW[:3], FEW[3] | changes, *FEW[4:]])


class Edit:
    """Replaces a part of a text."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def __call__(self, text: str) -> str:
        if self._old not in text:
            raise LookupError(self._old)
        return text.replace(self._old, self._new, 1)


def recipe_fault(fault: str, key: str, value: object, says: str, peer: dict[str, object] | None) -> Case:
    """A fault that `validate` alone finds, in under half a second."""
    return Case(
        "A",
        fault,
        2,
        {key: value},
        words=VALIDATE,
        says=(says,),
        most_cpu_seconds=0.5,
        repeats=3,
        most_lines=2,
        peer=peer,
    )


def text_fault(fault: str, edit: Edit, says: str, peer: Edit | None = None) -> Case:
    """A fault of the YAML itself."""
    return Case(
        "A",
        fault,
        2,
        edit=edit,
        words=VALIDATE,
        says=(says,),
        most_cpu_seconds=0.5,
        repeats=3,
        peer=None if peer is None else {},
        peer_edit=peer,
    )


def other_adapter(ground: Workspace) -> None:
    """A folder that another tool wrote an adapter into."""
    ground.write("run/adapter_model.safetensors", "somebody's work")
    ground.write("run/adapter_config.json", "{}")


def a_file(ground: Workspace) -> None:
    """A file where the run folder would be."""
    ground.write("run", "a file")


READ_ONLY = (
    "unshare",
    "--mount",
    "--map-root-user",
    "sh",
    "-c",
    'mkdir -p FOLDER/closed && mount -t tmpfs -o ro tmpfs FOLDER/closed && exec "$@"',
    "-",
)
"""Runs a command with a folder that may only be read, where name spaces are allowed."""
BATCH = "per_device_train_batch_size: 4"

RECIPE_FAULTS = [
    recipe_fault(
        "misspelt key", "trainer.learnin_rate", 2e-4, "did you mean trainer.learning_rate?", {"learnin_rate": 2e-4}
    ),
    recipe_fault("r: eight", "adapter.r", "eight", 'adapter.r = "eight"', {"lora_r": "eight"}),
    recipe_fault("max_steps: 4.7", "trainer.max_steps", 4.7, "trainer.max_steps = 4.7", {"max_steps": 4.7}),
    text_fault(
        "key given twice",
        Edit(f"  {BATCH}", f"  learning_rate: 1.0\n  {BATCH}"),
        "is set twice; the first is on line",
        Edit("learning_rate:", "learning_rate: 1.0\nlearning_rate:"),
    ),
    text_fault("YAML syntax", Edit("seed: 1", "seed: [1"), "recipe.yaml:", Edit("max_steps: 4", "max_steps: [4")),
    text_fault("a tab", Edit(f"  {BATCH}", f"\t{BATCH}"), "tab", Edit("max_steps: 4", "\tmax_steps: 4")),
    recipe_fault(
        "learning_rate: -0.1", "trainer.learning_rate", -0.1, "trainer.learning_rate = -0.1", {"learning_rate": -0.1}
    ),
    recipe_fault(
        "learning_rate: .nan",
        "trainer.learning_rate",
        float("nan"),
        "trainer.learning_rate",
        {"learning_rate": float("nan")},
    ),
    recipe_fault("dropout: 1.5", "adapter.dropout", 1.5, "adapter.dropout = 1.5", {"lora_dropout": 1.5}),
    recipe_fault("batch size 0", "trainer.per_device_train_batch_size", 0, "batch", {"per_device_train_batch_size": 0}),
    recipe_fault("optimizer typo", "trainer.optim", "adamw_tourch", "adamw_torch", {"optim": "adamw_tourch"}),
    recipe_fault("bits: 5", "quantization.bits", 5, "quantization.bits = 5", None),
    recipe_fault("unknown section", "trainig", {"max_steps": 4}, "trainer", {"trainig": 4}),
    recipe_fault(
        "a token in the recipe",
        "trainer.hub_token",
        "hf_" + "Zq9" * 12,
        "looks like a secret",
        {"hub_token": "hf_" + "Zq9" * 12},
    ),
]
MODEL_FAULTS = [
    Case(
        "A",
        "target_modules typo",
        2,
        {"adapter.target_modules": ["q_prj", "v_proj"]},
        says=("q_prj", "q_proj"),
        peer={"lora_target_modules": ["q_prj", "v_proj"]},
    ),
    Case(
        "A", "model path typo", 4, {"model.name": "./mdel"}, says=("mdel",), peer={"model_name_or_path": "./mdel/tiny"}
    ),
    Case(
        "A",
        "learning rate 1e30",
        6,
        {"trainer.learning_rate": 1e30, "trainer.max_steps": 12},
        says=("trainer.learning_rate",),
        most_lines=14,
        peer={"learning_rate": 1e30, "max_steps": 12},
    ),
]
DATA_FAULTS = [
    Case("A", "data path typo", 3, {"dataset.path": "rws.jsonl"}, says=("rows.jsonl",), peer={"dataset_name": "./rws"}),
    Case(
        "A",
        "split typo",
        2,
        {"dataset.hub_split": "trian"},
        says=("hub_split",),
        peer={"dataset_train_split": "trian"},
    ),
    Case(
        "A",
        "column missing",
        3,
        {"dataset.prompt": "{questoin}", "dataset.completion": "{completion}"},
        says=("questoin", "prompt"),
        peer={"dataset_text_field": "questoin", "RENAME": "text"},
    ),
    Case("A", "empty file", 3, rows=b"", says=("rows.jsonl",), peer={}),
    Case("A", "one null prompt of 8", 3, rows=with_one(prompt=None), says=("rows.jsonl:4",), peer={}),
    Case("A", "one prompt is a number", 3, rows=with_one(prompt=7), says=("rows.jsonl:4",), peer={}),
    Case(
        "A",
        "mixed schemas",
        3,
        rows=as_lines([*FEW[:4], *[{"text": f"row {n}"} for n in range(4)]]),
        says=("fit 2 formats",),
        peer={},
    ),
    Case(
        "A",
        "one bad JSON line",
        3,
        rows=as_lines(FEW[:3]) + b'{"prompt": "a", "compl\n' + as_lines(FEW[4:]),
        says=("rows.jsonl:4",),
        peer={},
    ),
    Case(
        "A",
        "bad UTF-8",
        3,
        rows=as_lines(FEW[:3]) + b'{"prompt": "\xff\xfe", "completion": "b"}\n' + as_lines(FEW[4:]),
        says=("rows.jsonl:4",),
        peer={},
    ),
    Case(
        "A",
        "lone surrogate",
        3,
        rows=as_lines(FEW[:3]) + b'{"prompt": "\\ud800", "completion": "b"}\n' + as_lines(FEW[4:]),
        says=("rows.jsonl:4",),
        peer={},
    ),
    Case(
        "A",
        "every completion empty",
        3,
        rows=as_lines([row | {"completion": ""} for row in pairs(24)]),
        says=("rows.jsonl:1",),
        peer={},
    ),
    Case(
        "A",
        "every row masked: the prompt alone is too long",
        3,
        rows=as_lines([row | {"prompt": "long " * 200} for row in pairs(24)]),
        says=("rows.jsonl:1", "max_length"),
        peer={},
    ),
]
FOLDER_FAULTS = [
    Case(
        "A",
        "output_dir has another adapter",
        2,
        prepare=other_adapter,
        says=("files that are not a peftcli run",),
        most_seconds=5,
        peer={"output_dir": "run"},
    ),
    Case(
        "A",
        "output_dir not writable",
        4,
        words=("train", "RECIPE", "--output-dir", "closed/run"),
        within=READ_ONLY,
        says=("cannot be written", "read-only"),
        most_seconds=5,
        peer={"output_dir": "closed/run"},
    ),
    Case(
        "A",
        "output_dir is a file",
        2,
        prepare=a_file,
        says=("is a file",),
        most_seconds=5,
        peer={"output_dir": "run"},
    ),
]
THE_32 = [*RECIPE_FAULTS, *MODEL_FAULTS, *DATA_FAULTS, *FOLDER_FAULTS]
