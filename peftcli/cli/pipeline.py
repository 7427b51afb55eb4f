"""Steps shared by the heavy commands: recipe, machine, model structure, plan, tokenizer, data."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from peftcli.data.checks import Check, check_embeddings, check_tokenizer
from peftcli.data.formats import LABELLED
from peftcli.data.prepare import PreparedData, prepare
from peftcli.data.preview import sample_rows
from peftcli.data.split_record import SplitRecord, join_records
from peftcli.errors import RecipeError
from peftcli.model.activation_fit import fit_activation_memory
from peftcli.model.classification import output_names
from peftcli.model.files import embedding_rows
from peftcli.model.hardware import probe_machine
from peftcli.model.heads import positions_of
from peftcli.model.init_from import adapter_folder
from peftcli.model.inspect import TINY, inspect_model, resolve_model, trainable_counter
from peftcli.model.load import load_tokenizer
from peftcli.model.new_tokens import extend_config, ids_of, train_rows
from peftcli.model.rehearsal import Rehearsal
from peftcli.model.target import Target
from peftcli.plan.heads import first_labels, keep_labels, resolve_labels
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.memory.forecast import OPTIMIZER, Rows, make_forecast, rows_of
from peftcli.plan.memory.micro_batch import choose_micro_batch
from peftcli.plan.memory.model_shape import ModelDimensions
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import DTYPE_BYTES, LossMask, Plan, TokenizerChoice, template_settings
from peftcli.plan.planner import check_recipe, loss_mask, make_plan
from peftcli.plan.smoke import stand_in_adapter
from peftcli.progress import Progress
from peftcli.recipe.load import Loaded
from peftcli.recipe.schema import AdapterSection, Recipe
from peftcli.results import DataJson, Forecast, ForecastDisk, load_or_default
from peftcli.run_dir import RunDir
from peftcli.tasks.registry import TASKS
from peftcli.train.disk import forecast as disk_forecast
from peftcli.train.disk import tokenizer_bytes

SHOWN_ROWS = 3
"""Default number of preview rows."""
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
"""Names of embedding and output modules."""


@dataclass(frozen=True)
class Planned:
    """A plan, the machine it was made for, and the dimensions of its model if they can be read.

    Attributes:
        counter: makes a function that counts trainable parameters, given the labels of the head.
        rows: the lengths of the training rows; None before the data is read.
    """

    plan: Plan
    machine: Machine
    shape: ModelDimensions | None = None
    counter: Callable[..., Callable[[AdapterSection], Trained]] | None = None
    rows: Rows | None = None


def plan_recipe(
    loaded: Loaded, *, smoke: bool = False, machine: Machine | None = None, merged_adapters: Sequence[str] = ()
) -> Planned:
    """Make the plan of a recipe; no weights are loaded.

    Args:
        machine: the machine to plan for; None for this one.
        merged_adapters: folders of the adapters of earlier stages.
    """
    recipe = loaded.recipe
    if recipe.adapter.init_from is not None:
        adapter_folder(recipe.adapter.init_from)  # fail before anything is loaded if there is none
    machine = probe_machine() if machine is None else machine
    located = resolve_model(recipe.model, smoke=smoke, longest=recipe.dataset.max_length)
    path, config = located.path, located.config
    trust = recipe.model.trust_remote_code
    task, labels = recipe.model.task, first_labels(recipe)
    new = recipe.model.add_tokens
    if new:
        choice = TokenizerChoice(path, recipe.model.revision, None, None, trust, add_tokens=new)
        ids = ids_of(load_tokenizer(choice), new)
        config = extend_config(config, ids)
    facts = inspect_model(path, config, task, labels=labels, trust_remote_code=trust)
    if located.rehearsal is not None:
        recipe, facts = _on_stand_in(recipe, facts, located.rehearsal)
    if new:
        tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        recipe = recipe.model_copy(update={"adapter": train_rows(recipe.adapter, ids, facts, tied=tied)})
    counter = partial(trainable_counter, path, config, task, trust_remote_code=trust)
    plan = make_plan(
        recipe,
        machine,
        facts,
        counter(labels=labels),
        smoke=smoke,
        notices=loaded.notices,
        merged_adapters=tuple(merged_adapters),
        fit_activations=fit_activation_memory,
    )
    return Planned(plan, machine, facts.shape, counter)


def _on_stand_in(recipe: Recipe, facts: ModelFacts, rehearsal: Rehearsal) -> tuple[Recipe, ModelFacts]:
    """A recipe adapted to the tiny stand-in model, and the stand-in's facts, after checking against the real model."""
    notes = rehearsal.notes
    if rehearsal.config is not None:
        name, config, task = recipe.model.name, rehearsal.config, recipe.model.task
        labels = first_labels(recipe)
        real = inspect_model(name, config, task, labels=labels, needs_weights=False)
        check_recipe(recipe, real, trainable_counter(name, config, task, labels=labels))
    if recipe.adapter.init_from is not None:
        notes = (*notes, f"smoke: adapter.init_from is not loaded; its weights belong to {recipe.model.name}")
    adapter = stand_in_adapter(recipe.adapter)
    facts = replace(facts, notes=notes, own_tokenizer=rehearsal.own_tokenizer)
    return recipe.model_copy(update={"adapter": adapter}), facts


def prepare_for(planned: Planned, target: Target, progress: Progress) -> tuple[Target, PreparedData]:
    """The rows of a plan tokenized for a target, and the target; one without labels gets those of the rows.

    Raises:
        RecipeError: the target was trained for another task.
    """
    plan, knows = planned.plan, "base" in target.identity
    if target.base.task != plan.task:
        raise RecipeError(
            f"the target was trained for {target.base.task}, but model.task of the recipe is {plan.task}; use a recipe "
            f"for {target.base.task}"
        )
    if knows and not TASKS[plan.task].generates:
        plan = keep_labels(plan, target.base)
    record = None if target.run is None else run_record(target.run)
    _, data = prepare_data(plan, progress, target.tokenizer_folder, record=record)
    if target.run is not None and record is None:
        _note_unrecorded(target.run, data, progress)
    if knows or TASKS[plan.task].generates:
        return target, data
    return replace(target, base=plan_with_labels(planned, data).plan.base), data


def run_record(run: RunDir) -> SplitRecord | None:
    """Which rows a run held out; None where it held out none, and for runs of earlier versions."""
    record = SplitRecord.load(run.rows) if run.rows.exists() else None
    return record if record is not None and len(record.test) else None


def _note_unrecorded(run: RunDir, data: PreparedData, progress: Progress) -> None:
    """Say that the test rows of an old run may have been trained on, where its data changed."""
    before = load_or_default(DataJson, run.data).fingerprint
    if before is not None and before.test not in (None, data.facts["fingerprint"]["test"]):
        progress.note(
            "note: the data changed since training, and this run did not record its split, so rows that it trained on "
            "may be among the test rows"
        )


def earlier_record(recipe: Recipe, before: Sequence[RunDir], *, resumed: RunDir | None = None) -> SplitRecord | None:
    """The rows of the trainings that a run continues.

    Args:
        before: the runs of earlier stages.
        resumed: the run itself where it resumes; its test rows stay the same, and new rows are trained on.
    """
    runs = [*([] if resumed is None else [resumed]), *before]
    if recipe.adapter.init_from is not None:
        folder = Path(recipe.adapter.init_from)
        runs.append(RunDir(folder if (folder / "recipe.yaml").is_file() else folder.parent))
    joined = join_records([SplitRecord.load(run.rows) for run in runs if run.rows.exists()])
    own = None if resumed is None else run_record(resumed)
    return joined if joined is None or own is None else replace(joined, closed=True)


def changed_rows(run: RunDir, data: PreparedData) -> str | None:
    """How the rows differ from those of a run, None if they do not."""
    return SplitRecord.load(run.rows).changed(SplitRecord.of(data.train, data.test_split))


def save_record(run: RunDir, data: PreparedData, earlier: SplitRecord | None) -> None:
    """Record the rows of a run, and those that it or the trainings before it have trained on."""
    record = SplitRecord.of(data.train, data.test_split)
    (record if earlier is None else record.extended(earlier)).save(run.rows)


def plan_with_labels(planned: Planned, data: PreparedData) -> Planned:
    """The plan with the labels found in the rows; that of a language model is unchanged."""
    if TASKS[planned.plan.task].generates or planned.counter is None:
        return planned
    labels = output_names(data)
    count = planned.counter(labels=labels)
    return replace(planned, plan=resolve_labels(planned.plan, labels, data.problem_type, count))


def plan_with_rows(planned: Planned, recipe: Recipe, data: PreparedData) -> Planned:
    """The plan with a micro-batch size that fits the lengths of the training rows."""
    plan = planned.plan
    if planned.shape is None:
        return replace(planned, rows=rows_of(plan, data.facts))
    in_step = plan.batch.per_device * plan.batch.accumulation
    longest = np.sort(data.train.column("length"))[::-1][:in_step]
    rows = rows_of(plan, data.facts, longest.tolist())
    return replace(planned, plan=choose_micro_batch(plan, planned.shape, planned.machine, recipe, rows), rows=rows)


def keep_date(planned: Planned, run: RunDir) -> Planned:
    """The plan with the date that a run's chat template writes, if the run has begun."""
    date = (load_or_default(DataJson, run.data).template or {}).get("date")
    if date is None:
        return planned
    base = replace(planned.plan.base, template={**(planned.plan.base.template or {}), "date": date})
    return replace(planned, plan=replace(planned.plan, base=base))


def forecast_run(planned: Planned) -> Forecast | None:
    """The resources that a planned run needs; None if the model's dimensions cannot be read."""
    plan, given = planned.plan, planned.plan.trainer
    # Counted as the trainer does, but without importing it for a plan.
    keep = int(given.get("save_total_limit") or 2) + bool(given.get("load_best_model_at_end"))
    width = DTYPE_BYTES[plan.adapter_dtype]
    needs = disk_forecast(
        plan.trained,
        optimizer=str(given.get("optim", OPTIMIZER)),
        keep=keep,
        width=width,
        tokenizer_bytes=tokenizer_bytes(Path(plan.base.path)),
    )
    disk = ForecastDisk(
        adapter=needs.adapter_bytes,
        checkpoint=needs.checkpoint_bytes,
        checkpoints_at_once=needs.checkpoints,
        total=needs.total,
    )
    return make_forecast(plan, planned.shape, planned.machine, planned.rows or rows_of(plan, None), disk)


def prepare_data(
    plan: Plan,
    progress: Progress,
    adapter: Path | None = None,
    *,
    earlier: SplitRecord | None = None,
    record: SplitRecord | None = None,
) -> tuple[PreTrainedTokenizerBase, PreparedData]:
    """Load the tokenizer and the rows of a plan.

    Args:
        adapter: folder with the tokenizer and chat template used in training.
        earlier, record: rows of other trainings, and of the run that is scored; see `prepare`.
    """
    tokenizer = load_tokenizer(plan.base.tokenizer, None if adapter is None else str(adapter))
    own = plan.own_tokenizer
    data = prepare(
        plan.dataset,
        tokenizer,
        plan.labels,
        plan.seed,
        progress,
        smoke=plan.smoke,
        own_tokenizer=own,
        earlier=earlier,
        record=record,
    )
    return tokenizer, data


def inspect_data(recipe: Recipe, progress: Progress, *, smoke: bool, preview: int) -> PreparedData:
    """The data of a recipe with checks and preview; only the tokenizer and maximum length of the model are read."""
    located = resolve_model(recipe.model, smoke=smoke, longest=recipe.dataset.max_length)
    path, config, made = located.path, located.config, located.rehearsal
    real = config if made is None or made.config is None else made.config
    rule = loss_mask(recipe, positions_of(real), smoke=smoke)
    model = recipe.model
    images = TASKS[model.task].images
    trust = model.trust_remote_code
    own = made is None or made.own_tokenizer
    settings = template_settings(recipe) if own else None
    choice = TokenizerChoice(
        path, model.revision, model.chat_template, model.eos_token, trust, images, model.add_tokens, settings
    )
    tokenizer = load_tokenizer(choice)
    data = prepare(recipe.dataset, tokenizer, rule, recipe.seed, progress, smoke=smoke, own_tokenizer=own)
    if made is not None:
        choice = replace(choice, path=model.name)
        data.facts["warnings"][:0] = made.notes
    add_view(data, tokenizer, rule, preview, check_ends(choice, tokenizer, data, recipe.adapter) if own else [])
    return data


def add_view(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, rule: LossMask, preview: int, more: Sequence[Check]
) -> None:
    """Add the tokenizer checks and the preview of some rows to the statistics of the data.

    Args:
        more: results of checks that were already made.
    """
    checks = list(more)
    if data.format not in LABELLED:  # labeled rows have no trained end token
        checks = check_tokenizer(
            tokenizer, data.format, sample_chats=data.sample_chats(), assistant_only=rule.assistant_only
        )
        checks += more
    data.facts["checks"] = [asdict(check) for check in checks]
    data.crossed.extend(f"{check.name}: {check.said}" for check in checks if check.result == "fail")
    data.facts["warnings"] = [
        *(f"{check.name}: {check.said}" for check in checks if check.result == "warn"),
        *data.facts["warnings"],
    ]
    data.facts["preview"] = sample_rows(data.train, tokenizer, rule, data.too_long, preview)


def real_tokenizer(plan: Plan) -> TokenizerChoice:
    """The tokenizer of a plan, with the path of the real model if a smoke run loads a stand-in."""
    choice = plan.base.tokenizer
    return replace(choice, path=plan.base.name) if plan.smoke and not plan.base.name.startswith(TINY) else choice


def check_ends(
    choice: TokenizerChoice, tokenizer: PreTrainedTokenizerBase, data: PreparedData, adapter: AdapterSection
) -> list[Check]:
    """Check that the base's embeddings of end tokens and added tokens are trained; skipped without local weights."""
    if data.format in LABELLED:
        return []
    added = set(tokenizer.get_added_vocab().values()) & data.used_ids() - set(ids_of(tokenizer, choice.add_tokens))
    found = embedding_rows(choice.path, choice.revision, sorted(data.stop_ids | added))
    if found is None:
        return []
    trained = bool(set(adapter.modules_to_save or ()) & EMBEDDINGS)
    return check_embeddings(found, tokenizer, embeddings_trained=trained, ends=data.stop_ids)
