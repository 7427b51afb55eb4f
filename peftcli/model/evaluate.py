"""Evaluates one model on the test split: loss, answers against references, and forgetting."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.chat_formats import split_reasoning
from peftcli.data.formats import LABELLED
from peftcli.data.prepare import PreparedData
from peftcli.data.quality import hide_keys
from peftcli.data.retention import RetentionText, read_retention
from peftcli.metrics.language import Metrics, chrf, exact_match
from peftcli.model.classification import LabelMetrics, evaluate_labels, output_names, row_logits, task_head
from peftcli.model.distributed import gather, interleave, is_fsdp, local_rows, rank_and_world_size
from peftcli.model.generation import Answer, Decoding, generate_answers
from peftcli.model.scoring import Sums, score, score_shared
from peftcli.plan.answered_rows import choose_answered_rows, rows_digest
from peftcli.plan.memory.evaluation_time import LONGEST_AUTO_ANSWER
from peftcli.plan.plan import Base, Plan
from peftcli.progress import Progress
from peftcli.recipe.schema import EvaluationSection
from peftcli.results import DecodingSettings, EvalJson, Retention, Sample, Scores
from peftcli.typed_json import parse

END_TOKENS = 2
"""Tokens of an answer after its text: the end token, and one more if the answer is written differently."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model and its answers to the rows of `answered_rows`, in their order."""

    metrics: Metrics | LabelMetrics
    answers: list[Answer]

    def scores(self) -> Scores:
        """The metrics as `metrics.json` holds them."""
        metrics = self.metrics
        return parse(Scores, metrics.as_dict() if isinstance(metrics, LabelMetrics) else asdict(metrics))


def decoding_for(
    evaluation: EvaluationSection, data: PreparedData, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Decoding:
    """How the test rows are answered; without a number, an answer may be as long as the longest reference."""
    asked = 1 if data.format in LABELLED or not data.holds_out else evaluation.max_new_tokens
    if isinstance(asked, int):
        longest = asked
    else:
        references = data.test.column("reference").to_pylist()
        encoded = tokenizer(references, add_special_tokens=False)["input_ids"]
        lengths = [len(ids) for ids in encoded]
        if data.format == "messages":  # with the reasoning before the answer
            rows, prompts = (pc.list_value_length(data.test.column(name)) for name in ("input_ids", "prompt_ids"))
            lengths += pc.subtract(pc.subtract(rows, prompts), END_TOKENS).to_pylist()
        longest = min(max(lengths) + END_TOKENS, LONGEST_AUTO_ANSWER)
    return Decoding(longest, evaluation.temperature, evaluation.top_p, seed)


def with_threshold(evaluation: EvaluationSection, base: Base) -> EvaluationSection:
    """The section with the threshold of a trained model, unless the recipe has a number of its own."""
    if isinstance(evaluation.threshold, float) or base.threshold is None:
        return evaluation
    return evaluation.model_copy(update={"threshold": base.threshold})


def answered_rows(evaluation: EvaluationSection, data: PreparedData, seed: int) -> list[int]:
    """Indices of the test rows that are answered; of plain text only the samples, since it has no right answer."""
    rows = len(data.test_split.rows)
    if data.format in LABELLED:
        return list(range(rows))
    if data.format == "text":
        return list(range(min(evaluation.samples, rows)))
    return choose_answered_rows(evaluation, rows, seed)


def sampling_note(evaluation: EvaluationSection, data: PreparedData, seed: int) -> str | None:
    """What to say where answers are generated for a sample only; None where every test row is answered."""
    rows = len(data.test_split.rows)
    if data.format == "text" or data.format in LABELLED or not rows:
        return None
    count = len(answered_rows(evaluation, data, seed))
    if count == rows:
        return None
    whole = "" if evaluation.rows is not None else "; evaluation.rows: all answers every row"
    return f"{count:,} of the {rows:,} test rows, drawn by the seed, are answered; the loss is over all{whole}"


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    evaluation: EvaluationSection,
    decoding: Decoding,
    *,
    batch_rows: int,
    progress: Progress,
    what: str,
) -> Evaluation:
    """Measure a model; several processes share the rows and all get the whole result.

    Args:
        model: on its device.
        data: the test rows.
        evaluation: section of the recipe.
        batch_rows: rows at once; the metrics do not depend on it.
        what: name of the model, for progress.
    """
    if data.format in LABELLED:
        labelled = evaluate_labels(
            model, tokenizer, data, evaluation, batch_rows=batch_rows, progress=progress, what=what
        )
        return Evaluation(*labelled)
    with router_silent(model):
        pad = tokenizer.pad_token_id or 0
        table = data.test.select(["input_ids", "labels"])
        total = _add(
            score_shared(model, table, pad_id=pad, batch_rows=batch_rows, progress=progress, what=f"{what}: loss")
        )
        rows = answered_rows(evaluation, data, decoding.seed)
        answers = answer_rows(
            model, tokenizer, data, rows, decoding, batch_rows=batch_rows, progress=progress, what=f"{what}: answers"
        )
    found = total.metrics()
    if data.format != "text" and answers:
        references = data.test.column("reference").take(pa.array(rows, pa.int64())).to_pylist()
        found = replace(found, **answer_figures(answers, references, chats=data.format == "messages"))
    return Evaluation(found, answers)


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    rows: Sequence[int],
    decoding: Decoding,
    *,
    batch_rows: int,
    progress: Progress,
    what: str,
) -> list[Answer]:
    """Answer some test rows; several processes share them and all get all answers."""
    prompts = data.test.column("prompt_ids").take(pa.array(rows, pa.int64())).to_pylist()
    mine = generate_answers(
        model,
        tokenizer,
        [prompts[row] for row in local_rows(len(rows), in_step=is_fsdp(model))],
        stop_ids=data.stop_ids,
        decoding=decoding,
        batch_rows=batch_rows,
        progress=progress,
        what=what,
    )
    return interleave(gather(mine))[: len(rows)]


def answer_figures(answers: Sequence[Answer], references: Sequence[str], *, chats: bool) -> dict[str, float]:
    """The metrics of answers: exact match, chrF, and the share that reached the length limit.

    Args:
        chats: the rows are chats, whose answers are compared without their reasoning.
    """
    texts = [split_reasoning(one.text)[1] if chats else one.text for one in answers]
    return {
        "exact_match": exact_match(texts, references),
        "chrf": chrf(texts, references),
        "unfinished_answers": sum(not one.finished for one in answers) / len(answers),
    }


def estimate_evaluation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    evaluation: EvaluationSection,
    decoding: Decoding,
    *,
    batch_rows: int,
    progress: Progress,
) -> float:
    """Seconds that `evaluate_model` will take, measured on the rows of its first batches, which are the longest.

    Several processes share the rows, and all get the time of the slowest.

    Args:
        model: as it will be evaluated, or as it is before training.
        batch_rows: rows at once.
    """
    if data.format in LABELLED:
        seconds = _time_labels(model, tokenizer, data, batch_rows, progress)
    else:
        with router_silent(model):
            seconds = _time_loss(model, tokenizer, data.test, batch_rows, progress)
            seconds += _time_answers(
                model, tokenizer, data, answered_rows(evaluation, data, decoding.seed), decoding, batch_rows, progress
            )
    return float(max(gather(seconds))) / rank_and_world_size()[1]


def _time_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    batch_rows: int,
    progress: Progress,
) -> float:
    head = task_head(output_names(data), data.problem_type, model, tokenizer)
    ids = sorted(data.test.column(head.column).to_pylist(), key=len, reverse=True)
    begun = time.monotonic()
    row_logits(model, ids[:batch_rows], None, head, batch_rows=batch_rows, progress=progress, what="time of the labels")
    return (time.monotonic() - begun) * len(ids) / len(ids[:batch_rows])


def _time_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test: pa.Table, batch_rows: int, progress: Progress
) -> float:
    first = _longest(test, "input_ids", range(test.num_rows), batch_rows)
    table = test.select(["input_ids", "labels"])
    begun = time.monotonic()
    score(
        model,
        table.take(pa.array(first, pa.int64())),
        pad_id=tokenizer.pad_token_id or 0,
        batch_rows=batch_rows,
        progress=progress,
        what="time of the loss",
    )
    lengths = pc.list_value_length(table.column("input_ids")).to_numpy()
    return float((time.monotonic() - begun) * lengths.sum() / lengths[first].sum())


def _time_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    rows: Sequence[int],
    decoding: Decoding,
    batch_rows: int,
    progress: Progress,
) -> float:
    first = _longest(data.test, "prompt_ids", rows, batch_rows)
    if not first:
        return 0.0
    begun = time.monotonic()
    generate_answers(
        model,
        tokenizer,
        data.test.column("prompt_ids").take(pa.array(first, pa.int64())).to_pylist(),
        stop_ids=data.stop_ids,
        decoding=decoding,
        batch_rows=batch_rows,
        progress=progress,
        what="time of the answers",
    )
    return (time.monotonic() - begun) * len(rows) / len(first)


def _longest(table: pa.Table, column: str, rows: Sequence[int], count: int) -> list[int]:
    """The rows with the longest lists in a column."""
    lengths = pc.list_value_length(table.column(column)).to_numpy()
    return sorted(rows, key=lambda row: -lengths[row])[:count]


@contextmanager
def router_silent(model: PreTrainedModel) -> Iterator[None]:
    """Keep a mixture of experts from its balancing loss, which training asks for and answers cannot compute."""
    config = model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before is not None:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before is not None:
            config.output_router_logits = before


def evaluation_json(
    data: PreparedData, evaluation: EvaluationSection, decoding: Decoding, measured: Mapping[str, Evaluation | None]
) -> EvalJson:
    """The content of `eval.json`; without test rows it holds no figures of theirs.

    Args:
        decoding: whose seed has drawn the answered rows.
        measured: by name of the model (`base`, `adapter`, ...), None for one that was not measured.
    """
    if not data.holds_out:
        return EvalJson(rows=0, generated_rows=0)
    rows = answered_rows(evaluation, data, decoding.seed)
    samples = []
    for place, row in enumerate(rows[: evaluation.samples]):
        sample = {name: data.test.column(name)[row].as_py() for name in ("prompt", "reference")}
        for name, one in measured.items():
            sample[name] = one.answers[place].text if one is not None else None
        samples.append(
            Sample(**{name: None if said is None else hide_keys([said])[0] for name, said in sample.items()})
        )
    generates = data.format not in LABELLED and any(one is not None for one in measured.values())
    scores = {name: None if one is None else one.scores() for name, one in measured.items()}
    return EvalJson(
        rows=data.test.num_rows,
        generated_rows=len(rows) if generates else 0,
        generated_rows_sha256=rows_digest(rows) if generates else None,
        base=scores.get("base"),
        adapter=scores.get("adapter"),
        merged=scores.get("merged"),
        samples=tuple(samples),
        decoding=None if data.format in LABELLED else DecodingSettings(**asdict(decoding)),
    )


def _add(parts: list[Sums]) -> Sums:
    return Sums(
        nll=sum(part.nll for part in parts),
        tokens=sum(part.tokens for part in parts),
        correct=sum(part.correct for part in parts),
    )


def load_retention(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> RetentionText | None:
    """The text of a plan; None where the recipe names none.

    Raises:
        DataError: the text cannot be read, or holds nothing that could be predicted.
    """
    asked = plan.evaluation
    if asked.forgetting_text is None:
        return None
    return read_retention(
        Path(asked.forgetting_text), tokenizer, length=plan.labels.max_length, tokens=asked.forgetting_tokens
    )


def base_retention(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, progress: Progress
) -> Retention | None:
    """Measure the base: the value in `eval.json` under `retention`, whose change is not known yet.

    Args:
        model: without its adapter.

    Returns:
        None where the recipe names no text.
    """
    text = load_retention(plan, tokenizer)
    if text is None:
        return None
    return _retention(text, _loss(text, plan, tokenizer, model, progress, "base: forgetting"), None)


def adapter_retention(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    progress: Progress,
    before: EvalJson | None,
) -> Retention | None:
    """Measure the adapter beside what `base_retention` found; of a text that changed in between no change is known.

    Args:
        before: `eval.json` with the base, None where it was not measured.

    Returns:
        As `base_retention`.
    """
    text = load_retention(plan, tokenizer)
    if text is None:
        return None
    loss = _loss(text, plan, tokenizer, model, progress, "adapter: forgetting")
    known = before.retention if before is not None else None
    base = known.base_loss if known and known.sha256 == text.digest() else None
    if known and base is None:
        progress.note(
            f"  note: {text.name} is no longer the text that the base was measured on; its change is not known"
        )
    return _retention(text, base, loss)


def _retention(text: RetentionText, base: float | None, adapter: float | None) -> Retention:
    return Retention(
        path=text.name,
        tokens=text.tokens,
        dropped=dict(text.dropped.counts),
        dropped_examples={reason: tuple(places) for reason, places in text.dropped.places.items()},
        sha256=text.digest(),
        base_loss=base,
        adapter_loss=adapter,
        change=None if base is None or adapter is None else adapter - base,
    )


def _loss(
    text: RetentionText,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    progress: Progress,
    what: str,
) -> float:
    """Nats per token; several processes share the windows and all get the whole result."""
    table, rows = text.table(), plan.evaluation_batch
    with router_silent(model):
        pad = tokenizer.pad_token_id or 0
        parts = score_shared(model, table, pad_id=pad, batch_rows=rows, progress=progress, what=what)
    return float(sum(part.nll for part in parts) / sum(part.tokens for part in parts))
