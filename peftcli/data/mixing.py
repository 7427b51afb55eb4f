"""How often the training rows of each of several sources are used: as often as a weight says, or by shares."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peftcli.data.split import weighted
from peftcli.data.stats import Indices, Split
from peftcli.errors import DataError
from peftcli.recipe.schema import DatasetSection

MOST_REPEATS = 100
"""Maximum number of times that a row is used per epoch, as for a weight."""


def mixed_rows(
    dataset: DatasetSection, train: Split, facts: Sequence[Mapping[str, Any]], seed: int
) -> tuple[Indices, list[dict[str, Any]]]:
    """The training rows as often as they are used, and the facts of the sources with the number of rows of each.

    Args:
        dataset: of the recipe.
        train: the training rows.
        facts: of the sources of the training rows, in order, and of further sources, which are returned unchanged.
        seed: for the choice of rows that are used once more or less than others.

    Raises:
        DataError: a source with a share has no training rows, or they would be repeated too often.
    """
    if not dataset.sources:
        return train.rows, [dict(one) for one in facts]
    of = train.column("source")
    before = np.bincount(of, minlength=len(dataset.sources))
    weights = _weights(dataset, before.tolist(), [str(one["path"]) for one in facts])
    used = weighted(train.rows, weights, of, seed)
    after = np.bincount(train.store.column("source")[used], minlength=len(dataset.sources))
    counted = [
        {**one, "share": section.share, "train_rows": int(before[number]), "mixed_rows": int(after[number])}
        for number, (one, section) in enumerate(zip(facts, dataset.sources, strict=False))
    ]
    return used, [*counted, *(dict(one) for one in facts[len(counted) :])]


def _weights(dataset: DatasetSection, rows: Sequence[int], names: Sequence[str]) -> list[float]:
    shares = [source.share for source in dataset.sources if source.share is not None]
    if not shares:
        return [source.weight for source in dataset.sources]
    empty = [name for name, count in zip(names, rows, strict=False) if not count]
    if empty:
        raise DataError(f"{empty[0]}: has a share, but no training row; add rows, or remove the source")
    found = weights_of_shares(shares, rows, all_rows=dataset.stopping_strategy == "all_exhausted")
    most = max(range(len(found)), key=found.__getitem__)
    if found[most] > MOST_REPEATS:
        raise DataError(
            f"{names[most]}: a share of {shares[most]:g} with {rows[most]:,} training rows would repeat each row "
            f"{found[most]:,.0f} times per epoch, at most {MOST_REPEATS} are allowed; lower its share, or set "
            "dataset.stopping_strategy: first_exhausted"
        )
    return found


def weights_of_shares(shares: Sequence[float], rows: Sequence[int], *, all_rows: bool) -> list[float]:
    """How often the rows of each source are used, so that the used rows have the shares.

    Args:
        shares: of each source; their sum is 1.
        rows: of each source, at least 1.
        all_rows: use every row at least once and repeat those of the other sources; otherwise repeat none.

    >>> weights_of_shares([0.75, 0.25], [300, 300], all_rows=False)
    [1.0, 0.3333333333333333]
    >>> weights_of_shares([0.75, 0.25], [300, 300], all_rows=True)
    [3.0, 1.0]
    """
    totals = [count / share for count, share in zip(rows, shares, strict=True)]
    total = max(totals) if all_rows else min(totals)
    return [max(1, round(share * total)) / count for share, count in zip(shares, rows, strict=True)]
