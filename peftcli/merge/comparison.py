"""The rows that a merged model is compared on, and the outputs of both sides for them."""

from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.data.formats import LABELLED
from peftcli.data.prepare import PreparedData
from peftcli.merge.drift import MOST_ROWS, Drift, compare, rows_to_compare, trained_logits
from peftcli.merge.label_drift import compare_labels
from peftcli.model.classification import Head, head_of, output_names, row_logits
from peftcli.progress import Progress


@dataclass(frozen=True)
class Comparison:
    """Rows that go through the adapter and through each merged model.

    Attributes:
        data: whose first test rows are taken, or training rows where it has none.
        batch_rows: rows that go through together.
    """

    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    batch_rows: int
    progress: Progress

    @cached_property
    def rows(self) -> pa.Table:
        """The rows to compare, as many as may be."""
        return self.data.comparable(MOST_ROWS)

    @property
    def rows_from(self) -> str:
        """Where they are from: `test` or `training`."""
        return "test" if self.data.holds_out else "training"

    def logits(self, model: PreTrainedModel, what: str) -> list[Tensor]:
        """The outputs of a model: for each row those that its loss is taken on, float32 on the CPU."""
        if self.data.format not in LABELLED:
            return self._of_text(model, what)
        rows = self.rows
        head = head_of(output_names(self.data), self.data.problem, model, self.tokenizer)
        ids, labels = (rows.column(name).to_pylist() for name in (head.column, "labels"))
        return row_logits(
            model,
            ids,
            labels if head.problem == "tagging" else None,
            head,
            batch_rows=self.batch_rows,
            progress=self.progress,
            what=f"{what}: labels",
        )

    def drift(self, reference: list[Tensor], merged: list[Tensor]) -> Drift:
        """How far the outputs of a merged model are from those of the adapter."""
        if self.data.format not in LABELLED:
            return compare(reference, merged)
        return compare_labels(Head(output_names(self.data), self.data.problem or "tagging"), reference, merged)

    def _of_text(self, model: PreTrainedModel, what: str) -> list[Tensor]:
        return trained_logits(
            model,
            rows_to_compare(self.rows, model.config.get_text_config().vocab_size),
            pad_id=self.tokenizer.pad_token_id or 0,
            batch_rows=self.batch_rows,
            progress=self.progress,
            what=f"{what}: logits",
        )
