"""The limits beyond which nothing is trained, and what to say when one is crossed."""

from collections.abc import Mapping
from typing import Any

from peftcli.recipe.schema import LimitsSection

EQUAL = "equal to an earlier row"
"""The reason of rows that the recipe itself asks to leave out; no limit counts them."""


def crossed_limits(facts: Mapping[str, Any], limits: LimitsSection) -> list[str]:
    """One sentence for each limit that the facts of the data cross.

    Args:
        facts: the content of `data.json`.
        limits: shares in 0..1.

    Returns:
        What is there against what may be, where the first rows stand, and the mend with the key that lifts the limit.
    """
    found = []
    rows, kept = facts["rows"], facts["train_rows"] + facts["test_rows"]
    dropped = facts["dropped_rows"] - facts["dropped"].get(EQUAL, 0)
    if _above(dropped, rows, limits.dropped):
        reasons = sorted(_counted(facts), key=lambda item: -item[1])[:3]
        named = "; ".join(f"{count:,} {reason}{_first(facts, reason)}" for reason, count in reasons)
        found.append(_sentence("dropped", dropped, rows, "rows are left out", limits.dropped) + f": {named}")
    if _above(facts["truncated_rows"], kept, limits.truncated):
        longest = facts["length"]["max"]
        found.append(
            _sentence("truncated", facts["truncated_rows"], kept, "rows are cut", limits.truncated)
            + f" at dataset.max_length {facts['max_length']}, so their end is not {_use(facts)}; the longest has "
            f"{longest} tokens: raise it, or set dataset.too_long: drop"
        )
    if _above(facts["leaked_rows"], facts["test_rows"], limits.leaked):
        pair = next(iter(facts["leaked_examples"]), None)
        where = f" ({pair['test']} is {pair['train']})" if pair else ""
        found.append(
            _sentence("leaked", facts["leaked_rows"], facts["test_rows"], "test rows stand in training", limits.leaked)
            + f"{where}; {_against_leaks(facts)}"
        )
    expected, trained = facts.get("eos_expected_rows", 0), facts.get("eos_trained_rows", 0)
    if expected and trained < limits.eos_trained * expected:
        lacking = expected - trained
        found.append(
            f"the end token is trained in {trained:,} of {expected:,} training rows, so a model would not learn to "
            f"stop (dataset.limits.eos_trained: {limits.eos_trained:g}); {facts['ends_with']}"
            + (f", first {facts['eos_lacking_examples'][0]}" if lacking and facts["eos_lacking_examples"] else "")
        )
    return found


def _use(facts: Mapping[str, Any]) -> str:
    return "trained" if "eos_expected_rows" in facts else "read"


def _against_leaks(facts: Mapping[str, Any]) -> str:
    if not facts["split"]:  # the test rows have their own file
        return "take them out of one of the two files"
    return "set dataset.deduplicate: true, or split by a column with dataset.split.group"


def _counted(facts: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(reason, count) for reason, count in facts["dropped"].items() if reason != EQUAL]


def _above(part: int, whole: int, limit: float) -> bool:
    return bool(whole) and part > limit * whole


def _sentence(key: str, part: int, whole: int, what: str, limit: float) -> str:
    return f"{part:,} of {whole:,} {what} ({part / whole:.1%}, dataset.limits.{key}: {limit:g})"


def _first(facts: Mapping[str, Any], reason: str) -> str:
    places = facts["dropped_examples"].get(reason, ())
    return f" (first {places[0]})" if places else ""
