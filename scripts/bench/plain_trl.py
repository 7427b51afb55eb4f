"""The products job as a plain SFTTrainer script: the reference for `peftcli train`.

python scripts/bench/plain_trl.py MODEL PRODUCTS.CSV DEPARTMENTS.CSV [--no-4bit] prints one JSON object: seconds of
the tokenization and of the training, and the exact match on the first rows of the test split.
"""

import argparse
import csv
import json
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peftcli.data.split import split_indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("products")
    parser.add_argument("departments")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--no-4bit", action="store_true")
    words = parser.parse_args()
    with open(words.departments, encoding="utf-8", newline="") as file:
        departments = {row["department_id"]: row["department"] for row in csv.DictReader(file)}
    with open(words.products, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["department_id"] in departments]
    train, test = split_indices(len(rows), 0.2, seed=42)
    pairs = [
        {"prompt": f"{row['product_name']} ->:", "completion": f" {departments[row['department_id']]}"} for row in rows
    ]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        words.model, dtype=torch.float32, quantization_config=None if words.no_4bit else quantization
    )
    tokenizer = AutoTokenizer.from_pretrained(words.model)
    begun = time.perf_counter()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=32,
            max_steps=words.steps,
            learning_rate=5e-3,
            lr_scheduler_type="linear",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([pairs[row] for row in train]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    prepared = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    held = [pairs[row] for row in test[: words.test_rows]]
    right = 0
    tokenizer.padding_side = "left"
    trainer.model.eval()
    for start in range(0, len(held), 100):
        batch = held[start : start + 100]
        inputs = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            made = trainer.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == row["completion"].strip() for text, row in zip(texts, batch, strict=True))
    result = {
        "what": "plain SFTTrainer" + ("" if not words.no_4bit else ", no quantization"),
        "prepare_seconds": round(prepared - begun, 1),
        "train_seconds": round(trained - prepared, 1),
        "exact_match": right / len(held),
        "rows": len(held),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
