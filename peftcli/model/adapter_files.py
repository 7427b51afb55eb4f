"""Writes an adapter folder: PEFT's files, the tokenizer, `peftcli.json` and the model card."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from peftcli.data.prepare import PreparedData
from peftcli.errors import Diverged
from peftcli.filesystem import apply_umask
from peftcli.model.adapter_weights import CONFIG, WEIGHTS
from peftcli.model.manifest import EARLIER, MANIFEST, build_manifest
from peftcli.plan.choices import EIGHT_BIT
from peftcli.plan.plan import Plan
from peftcli.report.load import Stages
from peftcli.report.markdown import markdown_table
from peftcli.report.metrics import metric_table
from peftcli.results import DataJson, EvalJson, MetricsJson, PlanJson, load_or_default
from peftcli.run_dir import RunDir, write_json, write_text
from peftcli.tasks.registry import TASKS


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    data: PreparedData,
    folder: Path,
) -> None:
    """Write the adapter beside its name, then move it there.

    Raises:
        Diverged: a trainable weight is not finite; nothing is written.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise Diverged(f"{name} of the adapter holds values that are not finite, so it was not saved")
    staging = folder.with_name(folder.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    sort_targets(model)
    # Whether embeddings changed is known here: asking the Hub for the base's vocabulary would need a network.
    model.save_pretrained(str(staging), save_embedding_layers=False)
    write_companions(model, tokenizer, data.stop_ids, staging)
    for number, earlier in enumerate(plan.base.absorbed, start=1):
        copy_adapter(Path(earlier), staging / EARLIER / str(number))
    write_json(staging / MANIFEST, build_manifest(plan, data, staging))
    replace_folder(staging, folder)


def copy_adapter(folder: Path, target: Path) -> None:
    """Copy the files of an adapter that decide what it computes."""
    target.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(folder / name, target / name)


def sort_targets(model: PeftModel) -> None:
    """Give the targets in the saved configuration one order, so that equal runs write equal files."""
    for config in model.peft_config.values():
        for name in ("target_modules", "feedforward_modules"):
            if isinstance(getattr(config, name, None), (set, list, tuple)):
                setattr(config, name, sorted(getattr(config, name)))


def write_companions(model: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], folder: Path) -> None:
    """Write the tokenizer with its chat template, and a generation config that stops where training did.

    A model that gives labels has none; its configuration is written instead, which holds their names.
    """
    tokenizer.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is None:
        if not (folder / "config.json").is_file():
            config = type(model.config).from_dict(model.config.to_dict())
            config.quantization_config = None
            del config.quantization_config
            config.save_pretrained(str(folder))
        return
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.eos_token_id = sorted(stop_ids) or None
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(str(folder))


def replace_folder(staged: Path, final: Path) -> None:
    """Put a finished folder in the place of another, without a moment in which both are gone for good."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    apply_umask(staged)
    os.rename(staged, final)
    shutil.rmtree(old, ignore_errors=True)


def folder_bytes(folder: Path, pattern: str) -> int:
    """Bytes of the files of a folder that match."""
    return sum(file.stat().st_size for file in folder.glob(pattern))


def write_card(run: RunDir) -> None:
    """Write `adapter/README.md` from the run's JSON files."""
    plan, data = load_or_default(PlanJson, run.plan), load_or_default(DataJson, run.data)
    evaluation = load_or_default(EvalJson, run.eval)
    name, task = plan.model.name or "", plan.task or ""
    base = Path(name).name if Path(name).is_absolute() else name
    head: dict[str, Any] = {"library_name": "peft", "tags": ["peft", "lora"]}
    if task in TASKS and TASKS[task].pipeline_tag is not None:
        head["pipeline_tag"] = TASKS[task].pipeline_tag
    if not base.startswith("tiny:") and base.count("/") == 1:
        head["base_model"] = base
    chosen = {decision.key: decision.value for decision in plan.decisions}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=True).strip(),
        "---",
        "",
        f"# {plan.name}",
        "",
        f"A PEFT adapter ({chosen['adapter']}) for {base}, made with peftcli.",
        *(["", "**A smoke run on a random stand-in: of no use but as a rehearsal.**"] if plan.smoke else []),
        "",
        f"- trained on {data.train_rows} rows ({data.format}), {_tested(data)}",
        f"- data fingerprint {(data.fingerprint.train or '')[:16]}",
        f"- {plan.parameters.trainable} trainable parameters, base in {chosen['model.dtype']}"
        + (" quantized to 4 bit" if "quantization.compute_dtype" in chosen else "")
        + (" quantized to 8 bit" if EIGHT_BIT in chosen else ""),
        "- licence: to be stated by whoever publishes it; that of the base and of the data apply",
        "",
        *_results(task, evaluation),
    ]
    if outputs := evaluation.adapter and evaluation.adapter.labels:
        lines += ["", f"Labels, in the order of its outputs: {', '.join(outputs)}."]
    write_text(run.adapter / "README.md", "\n".join(lines) + "\n")


def _tested(data: DataJson) -> str:
    return f"tested on {data.test_rows} others" if data.test_rows else "all there are, so it was not tested"


def _results(task: str, evaluation: EvalJson) -> list[str]:
    """The table of metrics of the report, as far as something was measured."""
    figures = MetricsJson(task=task, base=evaluation.base, adapter=evaluation.adapter)
    made = metric_table(Stages(metrics=figures, eval=evaluation))
    return [] if made is None else [markdown_table(made.without_empty_columns())]
