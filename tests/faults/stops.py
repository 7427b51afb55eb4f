"""Stops: SIGTERM and Ctrl-C at exact moments, budgets of seconds; numbers 29, 30, 32 and 33 of the matrix."""

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fork_server import ZYGOTE, Moment, send
from table import Judge, Row, Scenario
from workspace import Ended, Workspace

TRAINER = "peftcli.train.trainers:Trainer"
ACCUMULATED = {
    "trainer.per_device_train_batch_size": 2,
    "trainer.gradient_accumulation_steps": 4,
    "trainer.max_steps": 6,
    "trainer.eval_strategy": "steps",
    "trainer.eval_steps": 2,
    "dataset.split": {"test_size": 0.125, "validation_size": 0.125, "seed": 1},
    "trainer.save_steps": 3,
}
"""Steps of four micro-batches, of two at the end of the epoch; evaluations after steps 2, 4 and 6, saves at 3 and 6."""
SIGTERM_MOMENTS = {
    "while the data are read": Moment("peftcli.data.pipeline:TokenizePipeline._add"),
    "while the base is loaded": Moment("peftcli.train.run:load_base"),
    "in the baseline": Moment("peftcli.model.scoring:_score_batch"),
    "between two steps": Moment(f"{TRAINER}.get_batch_samples", 3),
    "before the first micro-batch of step 3": Moment(f"{TRAINER}.training_step", 9),
    "between forward and backward of micro-batch 2 of step 2": Moment(f"{TRAINER}.compute_loss", 6, after=True),
    "after the last micro-batch of step 3": Moment(f"{TRAINER}.training_step", 12, after=True),
    "before the optimizer takes step 3": Moment(f"{TRAINER}.check_step", 3),
    "after the optimizer took step 3": Moment("peftcli.train.callbacks:RunCallback.on_step_end", 3),
    "in an evaluation during training": Moment(f"{TRAINER}.prediction_step"),
    "before a checkpoint is written": Moment(f"{TRAINER}._save_checkpoint"),
    "before a checkpoint is sealed": Moment("peftcli.train.checkpoint:seal"),
    "after a checkpoint got its name": Moment("peftcli.train.checkpoint:promote", after=True),
    "in the last step": Moment(f"{TRAINER}.training_step", 22),
    "while the adapter is written": Moment("peftcli.train.run:save_adapter"),
    "during the final evaluation": Moment("peftcli.train.run:_measure", 2),
}
CTRL_C_MOMENTS = {
    "in the baseline": Moment("peftcli.model.scoring:_score_batch"),
    "in a micro-batch": Moment(f"{TRAINER}.compute_loss", 15),
    "in an evaluation during training": Moment(f"{TRAINER}.prediction_step", 4),
    "in a save, before the optimizer's state": Moment(f"{TRAINER}._save_optimizer_and_scheduler"),
    "before a checkpoint is sealed": Moment("peftcli.train.checkpoint:seal"),
    "before a checkpoint gets its name": Moment("peftcli.train.checkpoint:promote"),
    "before old checkpoints are removed": Moment("peftcli.train.checkpoint:rotate"),
    "while the adapter is written": Moment("peftcli.train.run:save_adapter", after=True),
    "during the final evaluation": Moment("peftcli.train.run:_measure", 2),
}
BUDGET_STEPS = 150
BUDGET_SECONDS = 14
STEP_SECONDS = 0.2
"""A step takes at least so long under a budget, so that a fast machine does not end the run in its first session."""
SESSIONS = 5


def train(ground: Workspace, output_dir: str = "run") -> tuple[str, ...]:
    """The words of the command that all sessions of a drill share."""
    return ("train", str(ground.folder / "recipe.yaml"), "--output-dir", output_dir)


def unbroken(ground: Workspace, keys: Mapping[str, object]) -> str:
    """Digest of the run that nothing stops."""
    whole = Workspace(ground.folder / "unbroken", ground.model)
    whole.recipe(keys)
    end = ZYGOTE.run(whole, *train(whole))
    if end.code:
        raise RuntimeError(end.err)
    return whole.digest()


def interrupted(
    ground: Workspace, name: str, moment: Moment, signals: Sequence[signal.Signals], code: int, expected: str
) -> Row:
    """Stop a session at a moment, run the same command again, and compare the adapter."""
    number, what = ("29", "SIGTERM") if len(signals) == 1 else ("30", "Ctrl-C twice")
    judge = Judge(number, f"{what} {name}", str(code))
    place = Workspace(ground.folder / name.replace(" ", "-"), ground.model)
    place.recipe(ACCUMULATED)
    first = ZYGOTE.run(place, *train(place), hook=lambda: moment.arm(send(*signals)))
    judge.ended(first, code, "stopped", lines=None)
    judge.holds(told_of(first) == 1, f"{told_of(first)} lines tell of the stop")
    judge.holds(number == "30" or not place.digest() or "evaluation" in first.err, "an adapter as if it were final")
    judge.ended(ZYGOTE.run(place, *train(place)), 0)
    judge.holds(place.digest() == expected, f"other bits: {place.digest()}, not {expected}")
    return judge.row()


def told_of(end: Ended) -> int:
    return sum(line.startswith(("error: ", "stopped ")) for line in end.err.splitlines())


def sigterm(ground: Workspace) -> Iterator[Row]:
    """SIGTERM wherever a run can be."""
    expected = unbroken(ground, ACCUMULATED)
    for name, moment in SIGTERM_MOMENTS.items():
        yield interrupted(ground, name, moment, [signal.SIGTERM], 75, expected)


def ctrl_c(ground: Workspace) -> Iterator[Row]:
    """A second Ctrl-C ends at once; what was whole before stays whole."""
    expected = unbroken(ground, ACCUMULATED)
    for name, moment in CTRL_C_MOMENTS.items():
        yield interrupted(ground, name, moment, [signal.SIGINT, signal.SIGINT], 130, expected)


def slow_steps() -> None:
    """Let each step of a session take its time."""
    from peftcli.train.trainers import Trainer  # imported already; the light cases never come here

    whole = Trainer.training_step

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return whole(*args, **kwargs)

    Trainer.training_step = slow


def budgets(ground: Workspace) -> Iterator[Row]:
    """Five sessions of a few seconds each end with the bits of one long one, none of them beyond its budget."""
    keys = {"trainer.max_steps": BUDGET_STEPS, "trainer.save_steps": BUDGET_STEPS}
    expected = unbroken(ground, keys)
    ground.recipe(keys)
    for session in range(1, SESSIONS + 1):
        limited = ("--max-time", f"{BUDGET_SECONDS}s") if session < SESSIONS else ()
        name = f"session {session} of {SESSIONS}, a budget of {BUDGET_SECONDS} s" if limited else "the last session"
        judge = Judge("32", name, "75" if limited else "0")
        end = ZYGOTE.run(ground, *train(ground), *limited, hook=slow_steps if limited else None)
        judge.ended(end, 75 if limited else 0, lines=None)
        over = end.seconds - BUDGET_SECONDS
        judge.holds(not limited or over <= 0, f"{over:.1f} s over its budget")
        judge.holds(bool(limited) or ground.digest() == expected, "other bits than the unbroken run")
        said = next((line for line in reversed(end.err.splitlines()) if "step" in line), "")
        yield judge.row(f"{-over:.1f} s under; {said[:90]}" if limited else "the bits of the unbroken run")


def same_command(ground: Workspace) -> Iterator[Row]:
    """The same command after the end says so; no step is trained."""
    judge = Judge("33", "the same command three times", "0")
    ground.recipe()
    digests, seen = set(), set()
    for turn in range(3):
        judge.ended(ZYGOTE.run(ground, *train(ground)), 0, *(["already finished"] if turn else []))
        digests.add(ground.digest())
        seen.add((ground.folder / "run" / "log.jsonl").read_text())
    judge.holds(len(digests) == 1 and len(seen) == 1, "the run changed")
    yield judge.row()


DRILLS = [
    Scenario("29", "SIGTERM", sigterm),
    Scenario("30", "Ctrl-C twice", ctrl_c),
    Scenario("32", "budgets", budgets),
    Scenario("33", "the same command again", same_command),
]
