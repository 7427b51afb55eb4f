"""How long a new token takes in evaluation: the large model in 4 bit with an adapter, at several batch sizes.

python scripts/gpu/decoding.py
"""

import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from settings import device_name, record, scale
from transformers import AutoTokenizer
from workbench import Workbench, widest_dtype

from peftcli.bench.workload import ALPHA, RANK
from peftcli.model.generation import Decoding, generate_answers
from peftcli.progress import Silent

PROMPT_TOKENS = 48


def main() -> None:
    """Answer as many prompts as each batch holds, none of which ends early."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(scale().large, Path(folder), bits=4, dtype=widest_dtype(), steps=1)
        tokenizer = AutoTokenizer.from_pretrained(bench.place / "model")
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(bench.model, adapter)
        prompt = [token % 100 + 4 for token in range(PROMPT_TOKENS)]
        for rows in (scale().decode_rows[0], *scale().decode_rows):  # the first one again: it pays for the start
            seconds = decode(model, tokenizer, [prompt] * rows)
            found = {
                "milliseconds_per_step": round(1000 * seconds / scale().decode_tokens, 3),
                "milliseconds_per_token": round(1000 * seconds / scale().decode_tokens / rows, 4),
            }
            record({f"{rows} rows": found})
            print(rows, found, flush=True)


def decode(model: object, tokenizer: object, prompts: list[list[int]]) -> float:
    """Seconds of one batch, its prompts included."""
    cuda = device_name() == "cuda"
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    answers = generate_answers(
        model,  # type: ignore[arg-type]  # a PeftModel generates as its base does
        tokenizer,  # type: ignore[arg-type]
        prompts,
        stop_ids=frozenset(),
        decoding=Decoding(scale().decode_tokens),
        batch_rows=len(prompts),
        progress=Silent(),
        what="answers",
    )
    if cuda:
        torch.cuda.synchronize()
    assert len(answers) == len(prompts) and not any(answer.finished for answer in answers)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
