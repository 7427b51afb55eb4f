"""`eval`: evaluates a run, an adapter, a merged model or a base model on the test split of a recipe."""

import time
from dataclasses import replace

from transformers import PreTrainedModel

from peftcli.data.prepare import PreparedData
from peftcli.model.evaluate import (
    Evaluation,
    decoding_for,
    evaluate_model,
    evaluation_json,
    sampling_note,
    with_threshold,
)
from peftcli.model.load import load_base
from peftcli.model.target import Target
from peftcli.progress import Progress
from peftcli.recipe.schema import EvaluationSection
from peftcli.results import EvalJson


def evaluate(
    target: Target,
    data: PreparedData,
    evaluation: EvaluationSection,
    *,
    batch_rows: int,
    seed: int,
    with_base: bool,
    progress: Progress,
) -> EvalJson:
    """Evaluate a target on all test rows.

    Args:
        target: the model to evaluate.
        data: the data of its recipe, tokenized with the target's tokenizer.
        batch_rows: batch size; the metrics do not depend on it.
        seed: for sampled answers.
        with_base: also evaluate the base model of an adapter.

    Returns:
        The content of `eval.json`; its metrics are under the kind of the target.
    """
    begun = time.monotonic()
    model, tokenizer = target.load()
    decoding = decoding_for(evaluation, data, tokenizer, seed)
    measured: dict[str, Evaluation | None] = {}
    if evaluation.threshold == "auto" and target.base.threshold is None and target.kind != "base":
        progress.note("note: no threshold was chosen when this model was trained, so 0.5 is used")
    if sampled := sampling_note(evaluation, data, seed):
        progress.note(f"note: {sampled}")

    def run(what: str, model: PreTrainedModel) -> Evaluation:
        # A tuned threshold is that of the trained model; the base has the default, as in training.
        settings = evaluation if what == "base" else with_threshold(evaluation, target.base)
        return evaluate_model(
            model, tokenizer, data, settings, decoding, batch_rows=batch_rows, progress=progress, what=what
        )

    if with_base and target.base.absorbed:  # disabling the adapter would give the result of the previous stage
        measured["base"] = run("base", load_base(replace(target.base, absorbed=())).eval())
    elif with_base and target.adapter is not None:
        with model.disable_adapter():
            measured["base"] = run("base", model)
    measured[target.kind] = run(target.kind, model)
    value = evaluation_json(data, evaluation, decoding, measured)
    return replace(value, seconds=round(time.monotonic() - begun, 3))
