"""Chooses the test rows that are answered by generation: all of them, or a sample drawn by the seed."""

import hashlib
from collections.abc import Sequence

from peftcli.recipe.schema import EvaluationSection
from peftcli.results import EvalJson

AUTO_ROWS = 500
"""Answered rows at most where `evaluation.rows` is null.

The 95 % interval of an exact match of 0.5 is then 0.456 to 0.544, and narrower for every other share.
"""


def answered_count(evaluation: EvaluationSection, rows: int) -> int:
    """How many of the test rows are answered.

    Args:
        rows: of the test split.
    """
    if evaluation.rows == "all":
        return rows
    return min(AUTO_ROWS if evaluation.rows is None else evaluation.rows, rows)


def choose_answered_rows(evaluation: EvaluationSection, rows: int, seed: int) -> list[int]:
    """Indices of the answered test rows, rising; the same for every model that is evaluated with this seed.

    Args:
        rows: of the test split.
        seed: of the recipe.
    """
    import numpy as np  # not above: views that show a plan start without it

    count = answered_count(evaluation, rows)
    if count == rows:
        return list(range(rows))
    return sorted(np.random.default_rng(seed).permutation(rows)[:count].tolist())


def rows_digest(rows: Sequence[int]) -> str:
    """SHA-256 that tells whether two evaluations answered the same rows of a test split."""
    import numpy as np

    return hashlib.sha256(np.asarray(rows, np.int64).tobytes()).hexdigest()


def answered_digest(evaluation: EvalJson) -> str | None:
    """`rows_digest` of the rows behind the answers of an `eval.json`; None where nothing was answered.

    Args:
        evaluation: an `eval.json`; one of a version that wrote no digest holds answers to the first rows.
    """
    count = evaluation.generated_rows
    if not count:
        return None
    return evaluation.generated_rows_sha256 or rows_digest(range(count))
