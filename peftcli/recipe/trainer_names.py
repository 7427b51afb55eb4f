"""What becomes of trainer arguments that changed their name, went away, or belong to another section."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DROP = object()
"""Stands for "nothing to set": the old value asked for what happens anyway."""


@dataclass(frozen=True)
class Renamed:
    """The new name of an argument, and its values where these changed too."""

    new: str
    values: Mapping[Any, Any] | None = None
    """Old value -> new value; None where values stay as they are."""
    remark: str = ""


@dataclass(frozen=True)
class Removed:
    """An argument with nothing in its place."""

    harmless: tuple[Any, ...]
    """Values that ask for what happens anyway; any other value is an error."""
    mend: str


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

RENAMED_VALUES: Mapping[tuple[str, str], str] = {
    ("packing_strategy", "bfd-requeue"): "bfd_split",
    ("packing_strategy", "ffd"): "bfd",
    ("loss_type", "chunked_nll"): "nll",
}

_WRITE_SPLIT = "trainer.accelerator_config takes split_batches and dispatch_batches now"
_FSDP = "performance.sharding: full divides the base, block by block"

REMOVED: Mapping[str, Removed] = {
    "save_safetensors": Removed((True,), "weights are always stored as safetensors"),
    "half_precision_backend": Removed(("auto", "cuda_amp"), "torch's own autocast is the only one left"),
    "fp16_backend": Removed(("auto", "amp", "cuda_amp"), "torch's own autocast is the only one left"),
    "fp16_opt_level": Removed(("O1",), "apex is no longer used; model.dtype chooses the number format"),
    "use_mps_device": Removed((True, False), "an Apple GPU is found by itself; trainer.use_cpu: true keeps off it"),
    "tpu_num_cores": Removed((None,), "TPUs are started by accelerate"),
    "tpu_metrics_debug": Removed((False,), "trainer.debug: tpu_metrics_debug does it now"),
    "past_index": Removed((-1,), "no model uses it"),
    "jit_mode_eval": Removed((False,), "torch.jit is no longer used; see trainer.torch_compile"),
    "use_ipex": Removed((False,), "the extension is no longer used"),
    "ray_scope": Removed(("last",), "there is no hyperparameter search here"),
    "mp_parameters": Removed(("",), "SageMaker model parallelism is gone"),
    "sharded_ddp": Removed(("", False), "performance.sharding: full divides the base now"),
    "include_tokens_per_second": Removed((True, False), "tokens per second are always measured"),
    "include_inputs_for_metrics": Removed((False,), "metrics come from the evaluation section"),
    "dispatch_batches": Removed((None,), _WRITE_SPLIT),
    "split_batches": Removed((None, False), _WRITE_SPLIT),
    "fsdp_min_num_params": Removed((0,), _FSDP),
    "fsdp_transformer_layer_cls_to_wrap": Removed((None,), _FSDP),
    "use_legacy_prediction_loop": Removed((False,), "the loop is gone"),
    "num_of_sequences": Removed((1024,), "rows are tokenized whole; trainer.packing packs them"),
    "chars_per_token": Removed((3.6,), "tokens are counted, not estimated"),
    "eval_use_gather_object": Removed((False,), "metrics come from the evaluation section"),
}

_HUB = "peftcli pushes nothing to the Hub during training; remove it"
_EVALUATION = "the evaluation section measures the model; remove it"
_DTYPE = "write model.dtype"
_ALWAYS = "peftcli decides it; remove it"

OWNED: Mapping[str, str] = {
    "output_dir": "write output_dir at the top of the recipe, or pass --output-dir",
    "seed": "write seed at the top of the recipe",
    "data_seed": "write seed at the top of the recipe, or dataset.split.seed for the split",
    "report_to": "write report.trackers",
    "run_name": "write name at the top of the recipe",
    "logging_dir": "the run folder holds the logs; the variable TENSORBOARD_LOGGING_DIR moves them",
    "resume_from_checkpoint": "pass --resume",
    "overwrite_output_dir": "pass --overwrite",
    "enable_jit_checkpoint": "a stop by signal always leaves a whole checkpoint; remove it",
    "save_only_model": "a checkpoint must be able to resume; remove it",
    "save_on_each_node": "process 0 writes the run folder; remove it",
    "ignore_data_skip": "a resumed run takes the rows it has not seen; remove it",
    "restore_callback_states_from_checkpoint": _ALWAYS,
    "logging_nan_inf_filter": "a loss that is not finite must be seen; remove it",
    "max_length": "write dataset.max_length",
    "max_seq_length": "write dataset.max_length",
    "dataset_text_field": "write dataset.text (a template) or dataset.columns.text (a column)",
    "dataset_kwargs": "peftcli prepares the rows; remove it",
    "dataset_num_proc": "peftcli prepares the rows; remove it",
    "dataset_batch_size": "peftcli prepares the rows; remove it",
    "length_column_name": "peftcli prepares the rows; remove it",
    "remove_unused_columns": "peftcli prepares the rows; remove it",
    "label_names": "peftcli prepares the rows; remove it",
    "eos_token": "set model.eos_token; generation and the merged model use it too",
    "truncation_mode": "peftcli cuts the rows, as dataset.too_long says; remove it",
    "pad_token": "peftcli chooses the padding token; remove it",
    "chat_template_path": "write model.chat_template",
    "model_init_kwargs": "write the model section (dtype, attention, revision)",
    "trust_remote_code": "write model.trust_remote_code",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "per_device_eval_batch_size": "write evaluation.batch_size",
    "per_gpu_eval_batch_size": "write evaluation.batch_size",
    "compute_metrics": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_on_start": "evaluation.baseline measures the base model before the first step",
    "disable_tqdm": "peftcli shows the progress; remove it",
    "log_level": "peftcli keeps the library's log; remove it",
    "log_level_replica": "peftcli keeps the library's log; remove it",
    "do_train": "the command says what is done; remove it",
    "do_eval": "the command says what is done; remove it",
    "do_predict": "the command says what is done; remove it",
    "local_rank": "the launcher sets it; remove it",
    "tokenizer": "the model's own tokenizer is used; remove it",
    "processing_class": "the model's own tokenizer is used; remove it",
    "model_init": "the model section says what is trained",
    "quantization_config": "write the quantization section",
    "peft_config": "write the adapter section",
    "fsdp": "performance.sharding: full divides the base; remove it here",
    "fsdp_config": "performance.sharding: full divides the base; remove it here",
    "parallelism_config": "give it to accelerate (accelerate config); remove it here",
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
"""Arguments with the same meaning as one key of the recipe, which takes their value over.

Not among them are those that mean something else there: a relative `chat_template_path` starts at another folder and
may be a tokenizer, `dataset_text_field` is ignored for chats, `data_seed` shuffles epochs and not the split, and
`eval_on_start` is off by default. `trust_remote_code` must be read beside the model that it trusts.
"""
PRECISION: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""Switches that choose `model.dtype` when they are on."""

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
"""Values of arguments that belong to other sections which ask for what happens anyway."""

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
"""A share of all steps below 1, a number of steps from 1 on."""
