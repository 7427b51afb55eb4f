"""Adapters, bases and merged models that do not belong together: numbers 20 and 40 to 44 of the matrix."""

import json
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from fork_server import ZYGOTE, Moment, send
from models import Evil, copied_base
from stops import train
from table import Judge, Row, Scenario
from workspace import Workspace

LOSS_TOLERANCE = 0.001
"""Nats per token that a merge into the dequantized base may cost."""


def trained(ground: Workspace) -> Path:
    """A run with a base of its own, trained and merged."""
    copied_base(ground)
    ground.recipe({"model.name": "./base", "evaluation.baseline": False, "trainer.max_steps": 12})
    for words in (train(ground), ("merge", "run")):
        end = ZYGOTE.run(ground, *words)
        if end.code:
            raise RuntimeError(end.err)
    return ground.folder / "run"


def other_weights(ground: Workspace) -> None:
    """Another random model of the same shape."""
    from safetensors.numpy import load_file, save_file

    file = ground.folder / "base" / "model.safetensors"
    save_file({name: value[..., ::-1].copy() for name, value in load_file(file).items()}, file, {"format": "pt"})


def resized(ground: Workspace) -> None:
    """A vocabulary with fewer rows."""
    from safetensors.numpy import load_file, save_file

    base = ground.folder / "base"
    config = json.loads((base / "config.json").read_text())
    rows = config["vocab_size"]
    tensors = load_file(base / "model.safetensors")
    cut = {name: value[: rows - 24].copy() if len(value) == rows else value for name, value in tensors.items()}
    save_file(cut, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": rows - 24}))


def other_template(ground: Workspace) -> None:
    """One character of the chat template."""
    file = ground.folder / "run" / "adapter" / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|", "<!", 1))


def missing_tensor(ground: Workspace) -> None:
    """An adapter that lacks one of its tensors."""
    from safetensors.numpy import load_file, save_file

    file = ground.folder / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file, {"format": "pt"})


def evil_adapter(ground: Workspace) -> None:
    """An adapter that is a pickle."""
    folder = ground.folder / "run" / "adapter"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(ground.folder / "marker")))


SPOILT: dict[str, tuple[str, Callable[[Workspace], None], str]] = {
    "another base of the same shape": ("40", other_weights, "of the same shape"),
    "a base with fewer rows of vocabulary": ("43", resized, "its embedding has"),
    "one character of the chat template": ("44", other_template, "chat template was changed after training"),
    "an adapter without one of its tensors": ("40", missing_tensor, "lacks"),
    "a pickled adapter": ("20", evil_adapter, "pickle"),
}


def identity(ground: Workspace) -> Iterator[Row]:
    """An adapter is used with what it was trained with, or not at all."""
    trained(ground)
    kept = ground.folder.with_name("kept")
    shutil.copytree(ground.folder, kept)
    for name, (number, spoil, says) in SPOILT.items():
        judge = Judge(number, f"{name}: eval, merge and generate refuse", "4")
        shutil.rmtree(ground.folder)
        shutil.copytree(kept, ground.folder)
        spoil(ground)
        for words in (("eval", "run"), ("merge", "run"), ("generate", "run", "x")):
            judge.ended(ZYGOTE.run(ground, *words), 4, says, lines=1)
        judge.holds(not (ground.folder / "marker").exists(), "the pickle was opened")
        yield judge.row()


def merged_loss(ground: Workspace) -> Iterator[Row]:
    """What a merge costs, measured by the product itself, and what it leaves when it is killed."""
    run = trained(ground)
    judge = Judge("41", f"a merge of 4 bit costs at most {LOSS_TOLERANCE} nats", "0")
    metrics = json.loads((run / "metrics.json").read_text())
    apart = metrics["merged"]["loss"] - metrics["adapter"]["loss"]
    judge.holds(abs(apart) <= LOSS_TOLERANCE, f"{apart:+.5f} nats")
    judge.ended(ZYGOTE.run(ground, "generate", "run/merged", "thing 1 apple ->:"), 0)
    agreement = metrics["merge"]["top1_agreement"]
    yield judge.row(f"{apart:+.6f} nats, top-1 agreement {agreement:.4f}")
    for name, moment in MERGE_MOMENTS.items():
        judge = Judge("42", f"kill -9 in a merge, {name}: whole or absent", "-9 0")
        shutil.rmtree(run / "merged", ignore_errors=True)
        hook = partial(moment.arm, send(signal.SIGKILL))
        judge.ended(ZYGOTE.run(ground, "merge", "run", hook=hook), -9, lines=None)
        judge.holds(not (run / "merged").exists(), "a part of a merged model is left")
        judge.ended(ZYGOTE.run(ground, "merge", "run"), 0)
        judge.ended(ZYGOTE.run(ground, "generate", "run/merged", "thing 1 apple ->:"), 0)
        left = [path.name for path in run.iterdir() if path.name.startswith(".") or "staging" in path.name]
        judge.holds(not left, f"left behind: {left}")
        yield judge.row()


MERGE_MOMENTS = {
    "before the weights": Moment("peftcli.merge.merge:write_weights"),
    "after the weights": Moment("peftcli.merge.merge:write_weights", after=True),
    "before it gets its name": Moment("peftcli.merge.merge:replace_folder"),
}


DRILLS = [Scenario("20+40+43+44", "identity", identity), Scenario("41+42", "merging", merged_loss)]
