"""The optimizer step: run in micro-batches, checked for divergence, counted, and checkpointed."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import DistributedType
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from peftcli.data.prepare import PreparedData
from peftcli.errors import Diverged, MachineError
from peftcli.methods.registry import METHODS
from peftcli.model.distributed import gather, is_fsdp
from peftcli.model.padding_free import RowCheck
from peftcli.plan.plan import Plan
from peftcli.run_dir import RunDir, log_mark, read_json
from peftcli.train import checkpoint
from peftcli.train.adalora import RankAllocation
from peftcli.train.adapter_init import initialize_adapter
from peftcli.train.disk import has_space_for_checkpoint
from peftcli.train.machines import on_this_machine
from peftcli.train.micro_batch import MicroBatches, count_tokens, first_rows
from peftcli.train.precision import upcast_trainable
from peftcli.train.schedule import ScheduleChange, base_rates, follow_schedule

MOST_FLAT_STEPS = 5
"""Consecutive steps with zero gradient; a single one may be chance, such as a row that is already certain."""
MOST_SKIPPED_STEPS = 30
"""Consecutive steps skipped by float16's scaler, which starts at 65536 and halves its scale each time."""

OVERFLOW = (
    "this model overflows float16 (maximum 65504); set model.dtype: float32 (with quantization: {bits: 4} the "
    "weights stay small), or use a GPU of sm_80 or later, which supports bfloat16"
)
"""The fix if the gradient scaler of float16 cannot help."""


@dataclass(frozen=True)
class TrainerSetup:
    """What a trainer is built from, besides the loaded model.

    Attributes:
        plan: of the run, with its labels and targets resolved.
        data: tokenized train and test rows.
        tokenizer: of the model; for images the processor.
        row_check: whether the model supports padding-free batches; None if the plan uses padded ones.
        resume_from: a verified checkpoint to resume from.
        fingerprint: data, base and versions of the run, for the manifest of each checkpoint.
        checkpoint_bytes: expected size of a checkpoint.
    """

    plan: Plan
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    row_check: RowCheck | None = None
    resume_from: Path | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_bytes: int = 0

    @property
    def padding_free(self) -> bool:
        """Whether batches are padding-free."""
        return self.row_check is not None and self.row_check.problem is None


class StepTrainer(transformers.Trainer):  # type: ignore[misc]  # transformers' trainer is untyped
    """Base class of the trainers of all tasks; the subclass defines the loss, and the loop is that of transformers.

    A subclass implements `targets`, the number of trained tokens or rows, and `random_baseline`, the loss of random
    guessing.

    Attributes:
        setup: what it was built from.
        seconds_before: seconds of training in earlier sessions of the run.
        seconds: seconds of training in this session, updated by `RunCallback`.
        micro_batches: splits the steps, and counts out-of-memory retries.
        residual: initial weights of PiSSA and OLoRA that are subtracted from the output; None for other methods.
        ranks: AdaLoRA's rank allocation; None for other methods.
        counts: the unit of `tokens`: tokens or images.
        optimizations: names of those in use, as `performance.disable` names them.
        calibration: measurements of one micro-batch before the first step; None without.
        schedule_change: how the learning rate of this session differs from that of its checkpoint; None if it does not.
        evaluated: metrics of the last evaluation during training, by name; None for one that is undefined.
        notes: for the user, about parts of the plan that this model or machine does not support.
    """

    counts = "tokens"

    def __init__(self, setup: TrainerSetup, **kwargs: Any) -> None:
        with allow_fsdp_checkpoints(kwargs["model"], kwargs["args"]):
            super().__init__(**kwargs)
        self.setup = setup
        self.seconds_before = 0.0
        self.seconds = 0.0
        self.optimizations = setup.plan.optimizations
        self.notes: list[str] = []
        self.evaluated: dict[str, float | None] = {}
        self.schedule_change: ScheduleChange | None = None
        self.calibration: dict[str, Any] | None = None
        self.micro_batches = self._micro_batches()
        self._waiting: list[dict[str, Any]] = []
        self._counted: Tensor | int = 0  # (2,) after the first step: all, trained; of this process and session
        self._counted_before = {"tokens": 0.0, "trained_tokens": 0.0}
        self._step_loss: Tensor | None = None
        self._gradient: Tensor | float | None = None
        self._divergence = NanGuard()
        self._batches: Sequence[dict[str, Any]] = ()
        self._before_step: Tensor | int = 0
        self._staging: str | None = None
        upcast_trainable(self.model, setup.plan.adapter_dtype)  # before, since it computes in the weights' dtype
        self.residual = initialize_adapter(self.model, setup.plan, setup.data, setup.tokenizer, setup.resume_from)
        upcast_trainable(self.model, setup.plan.adapter_dtype)
        self.ranks = self._rank_allocation()
        if setup.resume_from is not None:
            self._restore_counters(read_json(setup.resume_from / checkpoint.MANIFEST)["counters"])

    def _micro_batches(self) -> MicroBatches:
        agree = gather if self.accelerator.num_processes > 1 else None
        if getattr(self, "aux_loss_enabled", False):  # the load balancing loss is computed per micro-batch
            return MicroBatches(tokens=None, agree=agree)
        batching = self.setup.plan.batching
        check = self.setup.row_check
        return MicroBatches(
            tokens=batching.tokens if self.setup.padding_free else None,
            most=batching.most,
            boundaries=check is not None and check.boundaries,
            agree=agree,
        )

    def _rank_allocation(self) -> RankAllocation | None:
        adapter = self.setup.plan.adapter
        if not METHODS[adapter.method].allocates_ranks:
            return None
        return RankAllocation(self.model, adapter, self.setup.resume_from)

    def targets(self, labels: Tensor) -> Tensor:
        """Number of trained tokens or rows in the labels: (), int64."""
        raise NotImplementedError

    def random_baseline(self) -> str:
        """The loss of random guessing, in parentheses after a space, or empty if unknown."""
        return ""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Store the micro-batches of the starting step, and the counts before it."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._batches, self._waiting = batches, list(batches)
        self._before_step = self._counted
        return batches, items

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run the whole step, in micro-batches, when its last batch arrives; do nothing before."""
        self._waiting.pop()
        if self._waiting:
            return torch.zeros((), device=self.args.device)
        parent = super().training_step

        def one(piece: dict[str, Any]) -> Tensor:
            # TRL averages some terms, such as the load balancing loss, over this number of micro-batches.
            self.current_gradient_accumulation_steps = self.micro_batches.count
            loss: Tensor = parent(model, piece, num_items_in_batch)
            self._counted = self._counted + torch.stack([count_tokens(piece), self.targets(piece["labels"])])
            self._step_loss = loss if self._step_loss is None else self._step_loss + loss
            return loss

        def restart() -> None:
            model.zero_grad()
            self._step_loss = None
            self._counted = self._before_step

        step = self.state.global_step + 1
        return self.micro_batches.run(self._batches, one, restart, lambda: self._apart(model), step)

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch; AdaLoRA's regularizer contributes its gradient but not its value."""
        loss = super().compute_loss(model, *args, **kwargs)
        if self.ranks is None or not model.training:
            return loss
        # Once per step, however many micro-batches it has.
        share = self.ranks.regularizer() / max(1, self.micro_batches.count)
        return loss + (share - share.detach())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with nullcontext() if self.ranks is None else self.ranks.save_all_ranks(folder):
            super()._save(output_dir, state_dict=state_dict)
        if self.residual is not None:
            self.residual.save(folder)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the recipe, with LoRA+ if it is set."""
        made: torch.optim.Optimizer | None = self.__dict__.get("optimizer")
        ratio = self.setup.plan.adapter.arguments.get("loraplus_lr_ratio")
        if made is not None or ratio is None:
            made = super().create_optimizer(model)
            assert made is not None
            return made
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        made = self.optimizer = create_loraplus_optimizer(
            self.accelerator.unwrap_model(self.model),
            kind,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **settings,
        )
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, then continue on the schedule of this session, whose length or rate may have changed."""
        rates = base_rates(self.lr_scheduler)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.schedule_change = follow_schedule(self.lr_scheduler, self.optimizer, rates)

    @contextmanager
    def _apart(self, model: torch.nn.Module) -> Iterator[None]:
        """Do not exchange gradients between processes, as in all micro-batches of a step except the last."""
        state = self.accelerator.gradient_state
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        state._set_sync_gradients(False)
        try:
            with nullcontext() if deepspeed else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def counters(self) -> dict[str, float]:
        """Counts of all processes and sessions: tokens, trained tokens and seconds of training."""
        fed, trained = self._total()
        return {
            "tokens": self._counted_before["tokens"] + fed,
            "trained_tokens": self._counted_before["trained_tokens"] + trained,
            "seconds": self.seconds_before + self.seconds,
            "shrunk": float(self.micro_batches.oom_retries),
        }

    def _total(self) -> tuple[float, float]:
        """All tokens, and the trained tokens or rows, of all processes in this session."""
        own = torch.zeros(2, dtype=torch.int64, device=self.args.device) + self._counted
        total, trained = self.accelerator.reduce(own, "sum").tolist()
        return float(total), float(trained)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the number of tokens under TRL's name; it is fetched from the device only here."""
        if "loss" in logs:
            logs["num_tokens"] = self._total()[0]
        super().log(logs, start_time)

    @property
    def tokens_before(self) -> float:
        """Tokens of earlier sessions of the run."""
        return self._counted_before["tokens"]

    def _restore_counters(self, counters: dict[str, float]) -> None:
        """Restore the counts of earlier sessions."""
        self._counted_before = {name: counters[name] for name in self._counted_before}
        self.seconds_before = counters["seconds"]
        self.micro_batches.oom_retries = int(counters.get("shrunk", 0))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self._gradient = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._gradient

    def check_float16(self) -> None:
        """Refuse a model whose forward pass overflows float16, where a gradient scaler cannot help.

        The first row is run as in training, with the adapter, and without side effects.

        Raises:
            MachineError: its loss is not finite; raised in every process.
        """
        was_training = self.model.training
        self.model.eval()  # without dropout, which would change the random state
        inputs = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = float(self.compute_loss(self.model, inputs))
        finally:
            self.model.train(was_training)
            for logged in getattr(self, "_metrics", {}).values():
                logged.clear()
        losses = [one for one in gather(loss) if not math.isfinite(one)]
        if losses:
            problem = MachineError(f"before training, the loss of the first row is {losses[0]} in float16: {OVERFLOW}")
            problem.in_all = True
            raise problem

    def check_step(self, step: int) -> None:
        """Stop before the optimizer applies a step that would corrupt the weights, or once the gradient stays 0.

        Raises:
            Diverged: the loss or the gradient of the step is not finite, or the gradient has been 0 for several steps;
                raised in every process.
        """
        loss, self._step_loss = self._step_loss, None
        if loss is None or self._gradient is None:
            return
        found = torch.stack([loss.float(), torch.as_tensor(self._gradient).to(loss).float()])
        if self.accelerator.num_processes > 1:
            # Otherwise only the process whose loss is not finite would stop, and the others would wait for it.
            found = self.accelerator.reduce(found, "mean")
        # One transfer for both, because each waits for the device.
        loss_value, norm = found.tolist()
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if self.ranks is not None:
            self.ranks.skips = not math.isfinite(norm)
        try:
            self._divergence.check(step, loss_value, norm, scaled=scaled, random_baseline=self.random_baseline())
        except Diverged as problem:
            problem.in_all = True
            raise

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate with equal weight per trained token or row, so that the loss does not depend on the batch size."""
        self.model.eval()
        nll = torch.zeros((), dtype=torch.float64, device=self.args.device)
        tokens = torch.zeros((), dtype=torch.float64, device=self.args.device)
        rows, seen = 0, []
        for inputs, own in self._evaluated(dataloader):
            loss, outputs = self.evaluate_batch(inputs)
            if own:
                count = self.targets(inputs["labels"]).to(nll)
                nll += loss.double() * count
                tokens += count
                rows += own
                seen.append(outputs)
        total = self.accelerator.reduce(torch.stack([nll, tokens]), "sum")
        loss_value = (total[0] / total[1]).item()
        self.evaluated = {"loss": loss_value, **self.task_metrics(loss_value, seen)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._comparable(self.evaluated).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def evaluate_batch(self, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The mean loss of a micro-batch, and what `task_metrics` needs of it."""
        raise NotImplementedError

    def task_metrics(self, loss: float, seen: Sequence[Any]) -> dict[str, float | None]:
        """The metrics of the task besides the loss, of all processes; None for one that is undefined.

        Args:
            seen: what `evaluate_batch` returned for the micro-batches of this process.
        """
        raise NotImplementedError

    def _comparable(self, found: Mapping[str, float | None]) -> dict[str, float]:
        """The metrics that are defined; the one that chooses is the worst possible where it is undefined."""
        metrics = {name: value for name, value in found.items() if value is not None}
        name = self.args.metric_for_best_model
        if name in found and found[name] is None:
            metrics[name] = -math.inf if self.args.greater_is_better else math.inf
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save every step that is the best so far: with `save_steps` above `eval_steps`, it could otherwise be lost."""
        is_best = bool(super()._determine_best_metric(metrics, trial))
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _evaluated(self, dataloader: DataLoader[Any]) -> Iterator[tuple[dict[str, Any], int]]:
        """The micro-batches of this process without rows that accelerate repeats, and the number of rows in each.

        A micro-batch with only repeated rows counts 0 rows; it still runs, so that all processes do the same steps.
        """
        size, count = self.args.eval_batch_size, self.accelerator.num_processes
        total = len(dataloader.dataset)  # type: ignore[arg-type]  # the rows were counted when they were read
        for number, inputs in enumerate(dataloader):
            size_here = inputs["labels"].shape[0]
            own = min(size_here, max(0, total - (number * count + self.accelerator.process_index) * size))
            yield (first_rows(inputs, own) if 0 < own < size_here else inputs), own

    def _refuse_without_space(self, folder: Path) -> None:
        """Stop before a checkpoint that would not fit; existing ones are not touched.

        Raises:
            MachineError: raised in every process.
        """
        reason = self._no_space(folder)
        if reason is not None:
            raise MachineError(
                f"step {self.state.global_step}: {reason}; free some space and run the same command again (earlier "
                "checkpoints are complete)"
            )

    def has_space(self) -> bool:
        """Whether a checkpoint fits on the disk."""
        return self._no_space(Path(self.args.output_dir)) is None

    def _no_space(self, folder: Path) -> str | None:
        mine = has_space_for_checkpoint(folder, self.setup.checkpoint_bytes) if self.args.should_save else None
        return next((one for one in gather(mine) if one is not None), None)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the random states of all processes in the first one, because the others may not share its disk."""
        with tempfile.TemporaryDirectory() as own:
            super()._save_rng_state(own)
            states = gather({file.name: file.read_bytes() for file in Path(own).iterdir()})
        if self.args.should_save:
            for name, content in ((name, content) for one in states for name, content in one.items()):
                (Path(output_dir) / name).write_bytes(content)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, which is sent to machines that do not share the first one's disk."""
        best = self.state.best_model_checkpoint
        assert best is not None  # otherwise transformers does not call this
        here = on_this_machine(Path(best), RunDir(Path(self.args.output_dir).parent).received)
        try:
            self.state.best_model_checkpoint = str(here)
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._refuse_without_space(folder)
        self._staging = str(folder / checkpoint.STAGING)
        try:
            super()._save_checkpoint(model, trial)
        except Exception:
            checkpoint.clear_staging(folder)
            self._refuse_without_space(folder)  # the libraries report a full disk in many ways
            raise
        finally:
            self._staging = None
        counters = self.counters()
        self.accelerator.wait_for_everyone()
        is_best = self.state.best_global_step == self.state.global_step
        if is_best:  # in every process; transformers would look for it on the disk, where it is not yet
            self.state.best_model_checkpoint = str(folder / name)
        if self.args.should_save:
            if is_best:
                self.state.save_to_json(str(folder / checkpoint.STAGING / name / "trainer_state.json"))
            checkpoint.seal(
                folder / checkpoint.STAGING / name,
                self.state.global_step,
                counters,
                dict(self.setup.fingerprint),
                log_mark(RunDir(folder.parent).log),
            )
            checkpoint.promote(folder / checkpoint.STAGING / name, folder / name)
            checkpoint.rotate(folder, self.args.save_total_limit or 2, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


class NanGuard:
    """Checks each step before the optimizer applies it."""

    def __init__(self) -> None:
        self._flat = 0
        self._skipped = 0

    def check(self, step: int, loss: float, norm: float, *, scaled: bool, random_baseline: str) -> None:
        """Stop before a step that would corrupt the weights, or once the gradient stays 0.

        Args:
            norm: norm of the gradient.
            scaled: the gradient scaler of float16 skips steps that overflow.
            random_baseline: the loss of random guessing, in parentheses after a space, or empty.

        Raises:
            Diverged: the loss or the gradient of the step is not finite, or the gradient has been 0 for several steps.
        """
        if not math.isfinite(loss):
            raise Diverged(
                f"step {step}: the loss is {loss}; training stopped before the weights were updated; "
                + (
                    OVERFLOW
                    if scaled
                    else "lower trainer.learning_rate or trainer.weight_decay, or check the rows of this step"
                )
            )
        if not math.isfinite(norm):
            # The gradient scaler of float16 finds its scale through steps that overflow, and skips them.
            self._skipped += 1
            if not scaled:
                raise Diverged(
                    f"step {step}: the gradient norm is {norm} at a loss of {loss:.4f}; training stopped before the "
                    "weights were updated; lower trainer.learning_rate, trainer.weight_decay or trainer.max_grad_norm"
                )
            if self._skipped >= MOST_SKIPPED_STEPS:
                raise Diverged(
                    f"step {step}: the gradient norm has been {norm} for {self._skipped} steps at a loss of "
                    f"{loss:.4f}, at every scale; {OVERFLOW}"
                )
            return
        self._skipped = 0
        self._flat = self._flat + 1 if norm == 0.0 else 0
        if self._flat >= MOST_FLAT_STEPS:
            raise Diverged(
                f"step {step}: the gradient has been 0 for {self._flat} steps at a loss of "
                f"{loss:.3f}{random_baseline}, so training no longer progresses; lower trainer.learning_rate and "
                "start over, or from an earlier checkpoint"
            )


@contextmanager
def allow_fsdp_checkpoints(model: torch.nn.Module, arguments: TrainingArguments) -> Iterator[None]:
    """Let transformers construct a trainer that saves checkpoints for an FSDP-sharded base.

    Args:
        model: the loaded model.
        arguments: of the trainer; restored when the context ends.
    """
    strategy = arguments.save_strategy
    if is_fsdp(model):
        # transformers assumes that the trained weights are sharded too, and refuses to save them; here they are not.
        arguments.save_strategy = SaveStrategy.NO
    try:
        yield
    finally:
        arguments.save_strategy = strategy
