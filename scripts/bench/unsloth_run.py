"""One training with Unsloth, in a Python that has it: `python unsloth_run.py SPEC.json`. Unproven: never run.

Imports nothing of peftcli, which that Python need not have. The trainer prints the losses and how long it took.
"""

import json
import sys
from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # isort: skip  # before transformers, which it patches
from datasets import load_dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer


def main(given: dict[str, Any]) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=given["model"], max_seq_length=given["max_length"], load_in_4bit=given["bits"] == 4
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=given["r"],
        lora_alpha=given["alpha"],
        lora_dropout=0,
        target_modules=given["linears"],
        use_gradient_checkpointing="unsloth",
        random_state=given["arguments"]["seed"],
    )
    set_peft_model_state_dict(model, load_file(Path(given["adapter"]) / "adapter_model.safetensors"))
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=load_dataset("json", data_files=given["rows"], split="train"),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=SFTConfig(
            output_dir=given["run"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            **given["arguments"],
        ),
    )
    trainer.train()
    model.save_pretrained(str(Path(given["run"]) / "adapter"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
