"""Models, numbers and machines that are not what they should be: numbers 18 to 20, 35, 37, 47 and 48 of the matrix."""

import json
import pickle
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fork_server import ZYGOTE, Moment, send
from stops import train
from table import Case, Judge, Row, Scenario
from workspace import Ended, Workspace

EVIL_CODE = """\
from pathlib import Path
Path({marker!r}).write_text("run")
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig): pass
class EvilModel(LlamaForCausalLM): pass
"""


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._marker, "run")


def copied_base(ground: Workspace) -> Path:
    """A base of the case's own, to be spoilt."""
    shutil.copytree(ground.model, ground.folder / "base")
    return ground.folder / "base"


def remote_code(ground: Workspace) -> Iterator[Row]:
    """Code in a model's folder is not run and nobody is asked."""
    judge = Judge("19", "a model that ships code: not run, nobody asked", "4")
    base, marker = copied_base(ground), ground.folder / "marker"
    (base / "evil.py").write_text(EVIL_CODE.format(marker=str(marker)))
    config = json.loads((base / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (base / "config.json").write_text(json.dumps(config))
    recipe = ground.recipe({"model.name": "./base"})
    judge.ended(ground.run("train", str(recipe), "--output-dir", "run"), 4, "base", lines=2)
    forked = judge.ended(ZYGOTE.run(ground, *train(ground)), 4, lines=2)
    judge.holds(forked.seconds < 2, f"{forked.seconds:.1f} s after the imports")
    judge.holds(not marker.exists(), "the code was run")
    yield judge.row(f"{forked.seconds:.2f} s after the imports")


def pickles(ground: Workspace) -> Iterator[Row]:
    """A pickle among the weights of a base, of an adapter or of a checkpoint is not opened."""
    marker = ground.folder / "marker"
    evil = pickle.dumps(Evil(marker))
    judge = Judge("20", "pickled weights of a base", "4")
    base = copied_base(ground)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(evil)
    recipe = ground.recipe({"model.name": "./base"})
    judge.ended(ground.run("train", str(recipe), "--output-dir", "run"), 4, lines=None)
    judge.holds(not marker.exists(), "the pickle was opened")
    yield judge.row()
    judge = Judge("20", "a pickle in place of the optimizer's state", "0")
    shutil.rmtree(ground.folder / "run", ignore_errors=True)
    ground.recipe({"trainer.save_steps": 1})
    killed = Moment("peftcli.train.checkpoint:promote", 2, after=True)
    ZYGOTE.run(ground, *train(ground), hook=partial(killed.arm, send(signal.SIGKILL)))
    (ground.folder / "run" / "checkpoints" / "checkpoint-2" / "optimizer.pt").write_bytes(evil)
    judge.ended(ZYGOTE.run(ground, *train(ground)), 0, "checkpoint-2 is damaged")
    judge.holds(not marker.exists(), "the pickle was opened")
    yield judge.row()


def spoil_numbers(what: str) -> None:
    """Let the third step have a loss or a gradient that is no number; called in a session."""
    from peftcli.train.trainers import Trainer

    name = "compute_loss" if what == "loss" else "training_step"
    whole = getattr(Trainer, name)

    def spoilt(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = whole(self, model, *args, **kwargs)
        if self.state.global_step != 2:
            return loss
        if what == "loss":
            return loss * float("nan")
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")
        return loss

    setattr(Trainer, name, spoilt)


def not_finite(ground: Workspace) -> Iterator[Row]:
    """A loss or a gradient that is no number stops before the weights take it."""
    from safetensors.numpy import load_file  # after the first session's imports, which are slow

    for what in ("loss", "gradient"):
        judge = Judge("35", f"a {what} that is no number", "6")
        run = ground.folder / what
        ground.recipe({"trainer.max_steps": 6})
        end = ZYGOTE.run(ground, *train(ground, what), hook=partial(spoil_numbers, what))
        judge.ended(end, 6, f"step 3: the {what} is", "trainer.learning_rate", lines=None)
        weights = load_file(run / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
        judge.holds(all((abs(value) < 1e30).all() for value in weights.values()), "the checkpoint is not finite")
        judge.holds(not (run / "adapter").exists(), "an adapter was published")
        judge.holds("NaN" not in (run / "log.jsonl").read_text(), "the log holds NaN")
        yield judge.row()


def small_memory(rows: int) -> None:
    """Let a forward of more rows run out of memory; called in a session."""
    import torch

    from peftcli.train.trainers import Trainer

    whole = Trainer.compute_loss

    def limited(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and len(inputs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, model, inputs, *args, **kwargs)

    Trainer.compute_loss = limited


def out_of_memory(ground: Workspace) -> Iterator[Row]:
    """Smaller pieces of a batch leave its size and its losses as they were."""
    judge = Judge("37", "out of memory above 2 rows of 4", "0")
    ground.recipe({"adapter.dropout": 0.0})
    found = []
    for name, hook in (("whole", None), ("small", partial(small_memory, 2))):
        judge.ended(ZYGOTE.run(ground, *train(ground, name), hook=hook), 0)
        log = (ground.folder / name / "log.jsonl").read_text().splitlines()
        facts = json.loads((ground.folder / name / "train.json").read_text())
        found.append(([json.loads(line)["loss"] for line in log], facts["rows"], facts["tokens"]))
    apart = max(abs(one - other) for one, other in zip(found[0][0], found[1][0], strict=True))
    judge.holds(apart < 1e-4 and found[0][1:] == found[1][1:], f"losses differ by {apart:.2g}: {found}")
    yield judge.row(f"losses differ by {apart:.1g}")
    judge = Judge("37", "out of memory with a single row", "5")
    judge.ended(ZYGOTE.run(ground, *train(ground, "none"), hook=partial(small_memory, 0)), 5, "do not fit", lines=None)
    yield judge.row()


def made_up_card(name: str, capability: tuple[int, int], architectures: tuple[str, ...]) -> None:
    """Let the session see another machine."""
    from peftcli.cli import pipeline
    from peftcli.plan.machine import Machine

    machine = Machine(
        "cuda", name, capability, native_bf16=capability >= (8, 0), arch_list=architectures, memory_bytes=16 * 10**9
    )
    pipeline.probe_machine = lambda: machine


def cards(ground: Workspace) -> Iterator[Row]:
    """Old cards: a T4 computes in float16 and says so, a P100 without kernels is refused."""
    modern = ("sm_75", "sm_80", "sm_90")
    judge = Judge("47", "a T4 gets float16, with the reason", "0")
    ground.recipe()
    hook = partial(made_up_card, "Tesla T4", (7, 5), modern)
    end = judge.ended(ZYGOTE.run(ground, "plan", "recipe.yaml", hook=hook), 0, "float16")
    judge.holds(decided(end, "model.dtype").startswith("float16"), end.out[:300])
    judge.holds("bfloat16" not in decided(end, "quantization.compute_dtype").split(":")[0], end.out[:300])
    yield judge.row(decided(end, "model.dtype")[:80])
    judge = Judge("47", "bfloat16 asked for on a T4", "4")
    ground.recipe({"model.dtype": "bfloat16"})
    judge.ended(ZYGOTE.run(ground, "plan", "recipe.yaml", hook=hook), 4, "Tesla T4", "float16", lines=2)
    yield judge.row()
    judge = Judge("48", "a P100 that the wheel has no kernels for", "4")
    ground.recipe()
    hook = partial(made_up_card, "Tesla P100", (6, 0), modern)
    judge.ended(ZYGOTE.run(ground, "plan", "recipe.yaml", hook=hook), 4, "no kernels for Tesla P100", lines=2)
    yield judge.row()


def decided(end: Ended, key: str) -> str:
    """What a plan says of a key."""
    line = next((line for line in end.out.splitlines() if line.startswith(key)), "")
    return line.removeprefix(key).strip()


CASES = [
    Case(
        "18",
        "a model folder that is not there names the place",
        4,
        {"model.name": "./tiny-lama"},
        words=("plan", "RECIPE"),
        says=("tiny-lama",),
    ),
    Case("18", "a Hub id that was never downloaded, offline", 4, {"model.name": "nobody/no"}, says=("nobody/no",)),
]
DRILLS = [
    Scenario("19", "remote code", remote_code),
    Scenario("20", "pickles", pickles),
    Scenario("35", "not finite", not_finite),
    Scenario("37", "out of memory", out_of_memory),
    Scenario("47+48", "cards", cards),
]
