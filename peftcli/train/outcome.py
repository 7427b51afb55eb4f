"""What a session of training came to: `train.json`."""

from pathlib import Path

from trl import SFTConfig

from peftcli.model.hardware import peak_memory_bytes
from peftcli.model.padding_free import served
from peftcli.model.varlen_attention import rejected
from peftcli.plan.plan import Plan
from peftcli.rundir import RunDir, write_json
from peftcli.train import checkpoints
from peftcli.train.steps import StepTrainer
from peftcli.train.stops import is_first_process
from peftcli.train.watch import Watch


def rows_seen(epochs: float, rows: int, arguments: SFTConfig) -> int:
    """Rows that were trained on, each pass over the data counted; the last step of an epoch may be short.

    Args:
        epochs: as the trainer counts them, in steps of the epoch.
        rows: of the training side.
    """
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    whole = int(epochs)
    steps = round((epochs - whole) * -(-rows // step))
    return whole * rows + int(min(steps * step, rows))


def write_train(run: RunDir, trainer: StepTrainer, watch: Watch, plan: Plan, resume_from: Path | None) -> None:
    """Write `train.json`; every process counts, the first one writes."""
    state = trainer.state
    rows = len(trainer.train_dataset)
    counted = trainer.counters()
    if not is_first_process():
        return
    seconds, of_tokens = counted["seconds"], trainer.fed == "tokens"
    write_json(
        run.train,
        {
            "schema": 1,
            "status": "finished" if watch.stop_reason is None else "stopped",
            "stop_reason": watch.stop_reason,
            "steps": state.global_step,
            "planned_steps": state.max_steps,
            "rows": rows_seen(state.epoch or 0.0, rows, trainer.args),
            "epochs": state.epoch,
            "tokens": int(counted["tokens"]) if of_tokens else None,
            "trained_tokens": int(counted["trained_tokens"]) if of_tokens else None,
            "tokens_per_second": round(counted["tokens"] / seconds, 1) if seconds and of_tokens else None,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(trainer.args.device.type),
            "resident_before_bytes": watch.resident_before,
            "resumed_from_step": None if resume_from is None else int(resume_from.name.rsplit("-", 1)[1]),
            "first_loss": watch.losses[0][1] if watch.losses else None,
            "last_loss": watch.losses[-1][1] if watch.losses else None,
            "out_of_memory": [{"step": step, "pieces": pieces} for step, pieces in trainer.pieces.events],
            "batching": {
                "kind": plan.batching.kind if trainer.pieces.lines else "padded",
                "attention": sorted(served) if trainer.pieces.lines else None,
                "rejected_kernels": dict(rejected),
                "real_tokens": trainer.pieces.real,
                "padded_tokens": trainer.pieces.padded,
            },
            "levers": sorted(trainer.levers),
            "calibration": trainer.calibration,
            "stamp": trainer.stamp,
        },
    )
    checkpoints.clear_staging(run.checkpoints)
