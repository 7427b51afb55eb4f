"""The `trainer` section: arguments of the installed SFTConfig, checked by name, type and bounds.

Arguments that were renamed or removed, or that belong to another section, are rejected with the key to use instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peftcli.nearest import nearest
from peftcli.recipe.aliases import NAME_ALIASES
from peftcli.recipe.argument_values import limit_fault, nested_type_error, type_error
from peftcli.recipe.idle_args import without_effect
from peftcli.recipe.library_args import Argument, installed_arguments
from peftcli.recipe.messages import type_hint
from peftcli.recipe.problems import KeyPath, Problems, Where, choice_text, dotted, show
from peftcli.recipe.trainer_together import deprecations, implied, together_faults
from peftcli.recipe.trainer_values import read_json_text, value_fault
from peftcli.recipe.yaml import Tree

DROP = object()
"""Marks "nothing to set": the old value is the current default."""

RENAMED_VALUES: Mapping[tuple[str, str], str] = {
    ("packing_strategy", "bfd-requeue"): "bfd_split",
    ("packing_strategy", "ffd"): "bfd",
    ("loss_type", "chunked_nll"): "nll",
}

_WRITE_SPLIT = "trainer.accelerator_config has split_batches and dispatch_batches now"
_FSDP = "performance.sharding: full shards the base model block by block"

_HUB = "peftcli pushes nothing to the Hub during training; remove it"
_EVALUATION = "the evaluation section controls the metrics; remove it"
_DTYPE = "set model.dtype"
_ALWAYS = "peftcli sets it; remove it"

OWNED: Mapping[str, str] = {
    "output_dir": "set output_dir at the top level of the recipe, or pass --output-dir",
    "seed": "set seed at the top level of the recipe",
    "data_seed": "set seed at the top level of the recipe, or dataset.split.seed for the split",
    "report_to": "set report.trackers",
    "run_name": "set name at the top level of the recipe",
    "logging_dir": "logs go to the run folder; to move them, set the environment variable TENSORBOARD_LOGGING_DIR",
    "resume_from_checkpoint": "pass --resume",
    "overwrite_output_dir": "pass --overwrite",
    "enable_jit_checkpoint": "a stop by signal always writes a complete checkpoint; remove it",
    "save_only_model": "checkpoints must be resumable; remove it",
    "save_on_each_node": "only process 0 writes the run folder; remove it",
    "ignore_data_skip": "a resumed run always continues with the remaining rows; remove it",
    "restore_callback_states_from_checkpoint": _ALWAYS,
    "logging_nan_inf_filter": "a non-finite loss must not be hidden; remove it",
    "max_length": "set dataset.max_length",
    "max_seq_length": "set dataset.max_length",
    "dataset_text_field": "set dataset.text (a template) or dataset.columns.text (a column)",
    "dataset_kwargs": "peftcli prepares the rows; remove it",
    "dataset_num_proc": "peftcli prepares the rows; remove it",
    "dataset_batch_size": "peftcli prepares the rows; remove it",
    "length_column_name": "peftcli prepares the rows; remove it",
    "remove_unused_columns": "peftcli prepares the rows; remove it",
    "label_names": "peftcli prepares the rows; remove it",
    "eos_token": "set model.eos_token; generation and the merged model use it too",
    "truncation_mode": "dataset.too_long controls truncation; remove it",
    "pad_token": "peftcli chooses the padding token; remove it",
    "chat_template_path": "set model.chat_template",
    "model_init_kwargs": "use the model section (dtype, attention, revision)",
    "trust_remote_code": "set model.trust_remote_code",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "per_device_eval_batch_size": "set evaluation.batch_size",
    "per_gpu_eval_batch_size": "set evaluation.batch_size",
    "compute_metrics": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_on_start": "evaluation.baseline evaluates the base model before the first step",
    "disable_tqdm": "peftcli shows the progress itself; remove it",
    "log_level": "peftcli writes the libraries' messages to log.txt; remove it",
    "log_level_replica": "peftcli writes the libraries' messages to log.txt; remove it",
    "do_train": "the command determines what is done; remove it",
    "do_eval": "the command determines what is done; remove it",
    "do_predict": "the command determines what is done; remove it",
    "local_rank": "the launcher sets it; remove it",
    "tokenizer": "the model's own tokenizer is used; remove it",
    "processing_class": "the model's own tokenizer is used; remove it",
    "model_init": "use the model section",
    "quantization_config": "use the quantization section",
    "peft_config": "use the adapter section",
    "fsdp": "set performance.sharding: full, and remove it here",
    "fsdp_config": "set performance.sharding: full, and remove it here",
    "parallelism_config": "configure it with `accelerate config`, and remove it here",
    **dict.fromkeys(
        (
            "push_to_hub",
            "push_to_hub_token",
            "push_to_hub_model_id",
            "push_to_hub_organization",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
}

MOVED: Mapping[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "output_dir": ("output_dir",),
    "run_name": ("name",),
    "report_to": ("report", "trackers"),
    "max_length": ("dataset", "max_length"),
    "max_seq_length": ("dataset", "max_length"),
    "eos_token": ("model", "eos_token"),
    "per_device_eval_batch_size": ("evaluation", "batch_size"),
    "per_gpu_eval_batch_size": ("evaluation", "batch_size"),
}
"""Arguments with the same meaning as a recipe key; their value is moved there.

Arguments with a slightly different meaning are not moved: a relative `chat_template_path` is relative to another folder
and may be a tokenizer, `dataset_text_field` is ignored for chats, `data_seed` shuffles epochs and not the split, and
`eval_on_start` is off by default. `trust_remote_code` should be visible next to the model that is trusted.
"""
PRECISION: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""Switches that set `model.dtype` when they are true."""

_NOT_GIVEN = (None, False)
IDLE: Mapping[str, tuple[Any, ...]] = {
    **{name: _NOT_GIVEN for name, text in OWNED.items() if text == _HUB},
    **dict.fromkeys(("output_dir", "run_name", "eos_token", "data_seed", "logging_dir", "label_names"), (None,)),
    **dict.fromkeys(("resume_from_checkpoint", "trust_remote_code", "overwrite_output_dir"), _NOT_GIVEN),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval", "save_only_model", "ignore_data_skip"), (False,)),
    "disable_tqdm": _NOT_GIVEN,
    "log_level": ("passive",),
    "local_rank": (-1,),
    "do_train": (True,),
    "do_eval": (True,),
    "do_predict": (False,),
    "fsdp": (None, False, "", []),
    "fsdp_config": (None,),
}
"""Values of arguments from other sections that have no effect, because they are the default."""

BOUNDS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "learning_rate": ((">", 0),),
    "num_train_epochs": ((">", 0),),
    "per_device_train_batch_size": ((">=", 1),),
    "gradient_accumulation_steps": ((">=", 1),),
    "warmup_steps": ((">=", 0),),
    "max_grad_norm": ((">=", 0),),
    "weight_decay": ((">=", 0),),
    "adam_beta1": ((">=", 0), ("<", 1)),
    "adam_beta2": ((">=", 0), ("<", 1)),
    "adam_epsilon": ((">", 0),),
    "label_smoothing_factor": ((">=", 0), ("<", 1)),
    "neftune_noise_alpha": ((">=", 0),),
    "save_steps": ((">", 0),),
    "logging_steps": ((">", 0),),
    "eval_steps": ((">", 0),),
    "eval_delay": ((">=", 0),),
    "save_total_limit": ((">=", 1),),
    "eval_accumulation_steps": ((">=", 1),),
    "torch_empty_cache_steps": ((">=", 1),),
    "pad_to_multiple_of": ((">=", 1),),
    "dataloader_num_workers": ((">=", 0), ("<=", 1024)),  # each is a process
    "dataloader_prefetch_factor": ((">=", 1),),
    "ddp_timeout": ((">", 0),),
    "ddp_bucket_cap_mb": ((">", 0),),
}

WHOLE_FROM_ONE = ("save_steps", "logging_steps", "eval_steps", "warmup_steps")
"""Arguments that are a share of all steps below 1, and a number of steps from 1."""


def read_trainer(tree: Tree, problems: Problems, under: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check the section and return its arguments with the names of the installed version.

    An argument that is a key of another section is moved there, in the tree.

    Args:
        under: for a stage, the checked arguments of the recipe's `trainer` section, over which those of the stage are
            merged. Arguments of a stage are not moved to sections that all stages share.
    """
    section = tree.values.get("trainer")
    if "trainer" not in tree.values or ("trainer",) in tree.spoiled:
        return {}
    if not isinstance(section, dict):
        empty = ("trainer",) in tree.empty
        text = "trainer is empty; add arguments, or remove the line"
        problems.add(
            tree.place(("trainer",)),
            text if empty else f"trainer must be a section of keys, not {show(section)}",
        )
        return {}
    return _Section(tree, problems, under).read(section)


class _Section:
    """Processes the section: collects the arguments, and the name that the recipe uses for each."""

    def __init__(self, tree: Tree, problems: Problems, under: Mapping[str, Any] | None) -> None:
        self.tree, self.problems, self.under = tree, problems, under
        self.of_stage = under is not None
        self.installed = installed_arguments()
        self.arguments: dict[str, Any] = {}
        self.source: dict[str, str] = {}
        self.refused: set[str] = set()

    def read(self, section: dict[str, Any]) -> dict[str, Any]:
        if self.installed is None and section:
            text = "trainer is not checked, because trl or transformers is not installed"
            self.problems.note(self._where(), text)
        for name, value in section.items():
            if ("trainer", name) not in self.tree.spoiled:
                self._take(name, value)
        if not self.of_stage:
            whole = [name for name in PRECISION if name in section and ("trainer", name) not in self.tree.spoiled]
            self._move_precision({name: section[name] for name in whole})
        self._check_together()
        return self.arguments

    def _where(self, *name: str) -> Where:
        return self.tree.place(("trainer", *name))

    def _place(self, path: KeyPath) -> Where:
        """The location of a key, or of its closest ancestor, under the name that the recipe uses."""
        name = str(path[0])
        return self.tree.place(("trainer", self.source.get(name, name), *path[1:]))

    def _take(self, name: str, value: Any) -> None:
        if name in OWNED:
            self._take_owned(name, value)
        elif self.installed is None:
            self._set(name, value, name)
        elif name in RENAMED and RENAMED[name].new in self.installed:
            self._rename(name, value)
        elif name in self.installed:
            self._set(name, value, name)
        elif name in REMOVED:
            self._drop(name, value)
        else:
            explain = partial(self._unknown, name, self.installed)
            self.problems.add(self._where(name), f"trainer.{dotted((name,))}", explain)

    def _take_owned(self, name: str, value: Any) -> None:
        """Process an argument that belongs to another section: move, drop or reject it."""
        if _is_one_of(value, IDLE.get(name, ())):
            text = f"trainer.{name}: {show(value)} is ignored, because it is the default"
            self.problems.note(self._where(name), text)
        elif self.of_stage and (name in MOVED or name in PRECISION):
            text = f"trainer.{name} cannot be set in a stage, because all stages share it: {OWNED[name]}"
            self.problems.add(self._where(name), text)
        elif name == "report_to" and value == "all":
            self._refuse(name, " to the names of the trackers")
        elif name in MOVED:
            self._move(name, MOVED[name], _trackers(value) if name == "report_to" else value)
        elif name not in PRECISION:
            self._refuse(name)

    def _refuse(self, name: str, more: str = "") -> None:
        self.problems.add(self._where(name), f"trainer.{name} cannot be set here: {OWNED[name]}{more}")

    def _move(self, name: str, target: tuple[str, ...], value: Any) -> None:
        """Move a value to the recipe key with the same meaning, unless that key has another value."""
        where = self._where(name)
        section = self.tree.get(*target[:-1])
        missing = section is None and target[0] in ("model", "dataset")
        if target in self.tree.spoiled or missing or (section is not None and not isinstance(section, dict)):
            return  # the problem is reported for that section
        key, present = dotted(target), self.tree.get(*target)
        if target not in self.tree.places:
            self.tree.put(target, value, where)
            self.problems.note(where, f"trainer.{name} is used as {key}: {show(value)}")
        elif present == value:
            self.problems.note(where, f"trainer.{name} repeats {key} ({self._at(target)}) and is ignored")
        else:
            text = (
                f"trainer.{name} = {show(value)} contradicts {key} = {show(present)} ({self._at(target)}); keep {key}"
            )
            self.problems.add(where, text)

    def _move_precision(self, given: dict[str, Any]) -> None:
        """Move `bf16` or `fp16`; if one is false, another dtype must be set, because `auto` might choose it."""
        for name, value in given.items():
            if not isinstance(value, bool):
                text = f"must be true or false{type_hint('bool', value)}; or {OWNED[name]}"
                self.problems.add(self._where(name), f"trainer.{name} = {show(value)}: {text}")
                return
        if all(given.values()) and len(given) > 1:
            self.problems.add(self._where("fp16"), "trainer.bf16 and trainer.fp16 exclude each other; keep one")
            return
        for name in (name for name, on in given.items() if on):
            self._move(name, ("model", "dtype"), PRECISION[name])
        chosen = self.tree.get("model", "dtype")
        for name in (name for name, on in given.items() if not on):
            if chosen in (None, "auto", PRECISION[name]):
                others = [dtype for dtype in (*PRECISION.values(), "float32") if dtype != PRECISION[name]]
                self._refuse(name, f": {choice_text(others)}")
            else:
                self.problems.note(self._where(name), f"trainer.{name}: false is ignored: model.dtype is {chosen}")

    def _rename(self, name: str, value: Any) -> None:
        rule = RENAMED[name]
        new, where = rule.new, self._where(name)
        if rule.values is not None:
            if not isinstance(value, bool):
                self.problems.add(
                    where, f"trainer.{name} = {show(value)}: must be true or false{type_hint('bool', value)}"
                )
                return
            value = rule.values[value]
        if value is DROP or (name == "torchdynamo" and value is None):
            self.problems.note(where, f"trainer.{name} was removed and is ignored: its value is the default")
            return
        if name == "warmup_ratio" and isinstance(value, int | float) and not isinstance(value, bool) and value >= 1:
            text = f"trainer.warmup_ratio = {show(value)}: must be less than 1; for a number of steps use warmup_steps"
            self.problems.add(where, text)
            return
        if self._set(new, value, name):
            self.problems.note(where, f"trainer.{name} is now {new}{rule.remark}; {show(value)} is used")

    def _drop(self, name: str, value: Any) -> None:
        rule = REMOVED[name]
        if _is_one_of(value, rule.harmless):
            self.problems.note(self._where(name), f"trainer.{name} was removed and is ignored: {rule.fix}")
        else:
            self.problems.add(self._where(name), f"trainer.{name} = {show(value)} was removed: {rule.fix}")

    def _set(self, name: str, value: Any, given: str) -> bool:
        """Check a value and store it under its current name; `given` is the name in the recipe."""
        where = self._where(given)
        if name in self.source:
            self._report_both(name, given)
            return False
        self.source[name] = given
        renamed = RENAMED_VALUES.get((name, value)) if isinstance(value, str) else None
        if renamed is not None:
            self.problems.note(where, f"trainer.{name} = {show(value)} is now {renamed}; {renamed} is used")
            value = renamed
        value = read_json_text(name, value)
        fault = _fault(self.installed[name], value) if self.installed is not None else nested_type_error(value)
        if fault is not None:
            self.problems.add(where, f"trainer.{given} = {show(value)}: {fault}")
            self.refused.add(name)
            return False
        self.arguments[name] = value
        return True

    def _report_both(self, name: str, given: str) -> None:
        first, second = ("trainer", self.source[name]), ("trainer", given)
        a, b = self._where(self.source[name]), self._where(given)
        if isinstance(a, str) or (isinstance(b, int) and a > b):
            first, second = second, first
        names = f"{dotted(second)} and {dotted(first)} ({self._at(first)})"
        self.problems.add(self.tree.place(second), f"{names} are the same argument; keep trainer.{name}")

    def _at(self, path: KeyPath) -> str:
        place = self.tree.place(path)
        return f"line {place}" if isinstance(place, int) else place

    def _unknown(self, name: str, installed: dict[str, Argument]) -> str:
        plain = name.lower().replace("-", "_")
        names = [known for known in (*installed, *RENAMED) if known not in OWNED]
        meant = f"trainer.{plain}" if plain in names else NAME_ALIASES.get(plain)
        if meant is None:
            near = nearest(name, names)
            meant = f"trainer.{RENAMED[near].new if near in RENAMED else near}" if near else None
        if meant is None:
            near = nearest(name, OWNED)
            meant = None if near is None else near
            if meant is not None:
                return f"trainer.{dotted((name,))} is not a training argument; for {meant}: {OWNED[meant]}"
        fix = f"did you mean {meant}?" if meant else "use an argument of trl.SFTConfig"
        return f"trainer.{dotted((name,))} is not a training argument of the installed trl; {fix}"

    def _check_together(self) -> None:
        if self.installed is None:
            return
        inherited = self.under or {}
        self.arguments |= implied({**inherited, **self.arguments})
        effective = {**inherited, **self.arguments}
        if self.under is not None or not _all_stages_have_their_own(self.tree):
            for path, text in together_faults(effective):
                if not any(name in text for name in self.refused):  # their values are invalid and not known here
                    self.problems.add(self._place(path), text)
        for path, text in without_effect(effective):
            if path[0] in self.arguments:
                self.problems.note(self._place(path), text)
        for path, text in deprecations(self.arguments, self.tree.get("model", "task")):
            self.problems.note(self._place(path), text)
        warmup = self.arguments.get("warmup_steps", 0)
        if effective.get("lr_scheduler_type") == "constant" and warmup:
            self.problems.note(
                self._where(self.source["warmup_steps"]),
                "trainer.lr_scheduler_type: constant has no warmup, so warmup_steps has no effect; "
                "use constant_with_warmup",
            )


def _trackers(value: Any) -> Any:
    """The value of `report_to` as a list for `report.trackers`."""
    names = [value] if isinstance(value, str) else [] if value is None else value
    return [name for name in names if name != "none"] if isinstance(names, list) else names


def _is_one_of(value: Any, others: Sequence[Any]) -> bool:
    return any(type(value) is type(other) and value == other for other in others)


def _fault(argument: Argument, value: Any) -> str | None:
    """What is wrong with the value of an argument, or None."""
    return (
        type_error(argument, value)
        or _bound_fault(argument.name, value)
        or nested_type_error(value)
        or value_fault(argument.name, value)
    )


def _bound_fault(name: str, value: Any) -> str | None:
    if name == "max_steps" and value is not None and value < 1 and value != -1:
        return "must be at least 1, or -1 for no limit"
    fault = limit_fault(value, BOUNDS.get(name, ()))
    if fault is None and name in WHOLE_FROM_ONE and value is not None and value >= 1 and value != int(value):
        return "must be a share of the steps below 1, or a whole number of steps"
    return fault


def _all_stages_have_their_own(tree: Tree) -> bool:
    """Whether every stage has a `trainer` section, so that the recipe's own section need not be complete."""
    stages = tree.get("stages")
    return isinstance(stages, list) and all(isinstance(one, dict) and "trainer" in one for one in stages)


@dataclass(frozen=True)
class Renamed:
    """The new name of an argument, and its new values if these changed too."""

    new: str
    values: Mapping[Any, Any] | None = None
    """Old value -> new value; None if the values did not change."""
    remark: str = ""


@dataclass(frozen=True)
class Removed:
    """An argument without a replacement."""

    harmless: tuple[Any, ...]
    """Values without an effect; any other value is an error."""
    fix: str


RENAMED: Mapping[str, Renamed] = {
    "evaluation_strategy": Renamed("eval_strategy"),
    "warmup_ratio": Renamed("warmup_steps", remark=" (below 1 it is a share of the steps)"),
    "group_by_length": Renamed("train_sampling_strategy", {True: "group_by_length", False: "random"}),
    "gradient_checkpointing": Renamed("activation_checkpointing"),
    "gradient_checkpointing_kwargs": Renamed("activation_checkpointing_kwargs"),
    "no_cuda": Renamed("use_cpu"),
    "adafactor": Renamed("optim", {True: "adafactor", False: DROP}),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "xpu_backend": Renamed("ddp_backend"),
    "use_liger": Renamed("use_liger_kernel"),
    "torchdynamo": Renamed("torch_compile_backend"),
}

REMOVED: Mapping[str, Removed] = {
    "save_safetensors": Removed((True,), "weights are always stored as safetensors"),
    "half_precision_backend": Removed(("auto", "cuda_amp"), "only torch's autocast is left"),
    "fp16_backend": Removed(("auto", "amp", "cuda_amp"), "only torch's autocast is left"),
    "fp16_opt_level": Removed(("O1",), "apex is no longer used; set model.dtype"),
    "use_mps_device": Removed(
        (True, False), "an Apple GPU is detected automatically; trainer.use_cpu: true disables it"
    ),
    "tpu_num_cores": Removed((None,), "accelerate starts TPU processes"),
    "tpu_metrics_debug": Removed((False,), "use trainer.debug: tpu_metrics_debug"),
    "past_index": Removed((-1,), "no model uses it"),
    "jit_mode_eval": Removed((False,), "torch.jit is no longer used; use trainer.torch_compile"),
    "use_ipex": Removed((False,), "the extension is no longer used"),
    "ray_scope": Removed(("last",), "peftcli has no hyperparameter search"),
    "mp_parameters": Removed(("",), "SageMaker model parallelism was removed"),
    "sharded_ddp": Removed(("", False), "use performance.sharding: full"),
    "include_tokens_per_second": Removed((True, False), "tokens per second are always measured"),
    "include_inputs_for_metrics": Removed((False,), "metrics come from the evaluation section"),
    "dispatch_batches": Removed((None,), _WRITE_SPLIT),
    "split_batches": Removed((None, False), _WRITE_SPLIT),
    "fsdp_min_num_params": Removed((0,), _FSDP),
    "fsdp_transformer_layer_cls_to_wrap": Removed((None,), _FSDP),
    "use_legacy_prediction_loop": Removed((False,), "there is only one prediction loop"),
    "num_of_sequences": Removed((1024,), "all rows are tokenized first; trainer.packing packs them"),
    "chars_per_token": Removed((3.6,), "tokens are counted, not estimated"),
    "eval_use_gather_object": Removed((False,), "metrics come from the evaluation section"),
}
