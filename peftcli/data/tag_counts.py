"""Entities in the tags of the rows, and tags that cannot follow each other."""

import json
from collections import Counter
from typing import Any

from peftcli.data.dropped import Dropped
from peftcli.data.readings import Examples
from peftcli.data.rows import Rows
from peftcli.metrics.tagging import entities_of, span_tags

_INSIDE = ("I", "E", "L")
"""Prefixes of tags that go on with an entity."""


class TagCounts:
    """Counts entities by type, and tags that go on with an entity which has not begun."""

    def __init__(self) -> None:
        self._entities: Counter[str] = Counter()
        self._odd = Dropped()
        self._seen: set[str] = set()

    def add(self, rows: Rows, examples: Examples) -> None:
        """Count the tags of the examples of a batch."""
        for row, text in zip(examples.kept, examples.columns["tags"], strict=True):
            tags: list[str] = json.loads(text)
            self._seen.update(tags)
            self._entities.update(kind for kind, _, _ in entities_of(span_tags([tags], tags)[0]))
            self._odd.add(rows, [(row, "odd")] * _odd_tags(tags))

    def facts(self) -> dict[str, Any]:
        """Entities by type, and the odd tags; none of these where no tag says that an entity begins."""
        begins = any(tag.startswith("B-") for tag in self._seen)
        spans = begins or any(tag.startswith("I-") for tag in self._seen) or "O" in self._seen
        return {
            "entities": dict(self._entities.most_common()) if spans else {},
            "odd_tags": self._odd.counts["odd"] if begins else 0,
            "odd_tag_examples": self._odd.places.get("odd", []) if begins else [],
        }


def _odd_tags(tags: list[str]) -> int:
    """Tags that go on with an entity that the tag before is no part of.

    >>> _odd_tags(["O", "I-PER", "I-PER", "B-LOC", "I-PER"])
    2
    """
    odd = 0
    before = "O"
    for tag in tags:
        prefix, dash, kind = tag.partition("-")
        if dash and prefix in _INSIDE and before not in (f"B-{kind}", f"I-{kind}"):
            odd += 1
        before = tag
    return odd
