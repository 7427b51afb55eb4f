"""Finds the name closest to a misspelled word, for every "did you mean"."""

from collections.abc import Iterable

LONGEST_WORD = 80
"""Number of characters of the word that are compared; pasted text may have any length."""


def nearest(word: str, names: Iterable[str], least: float = 0.6) -> str | None:
    """The name most similar to the word, or None if no name is similar.

    >>> nearest("lroa", ["road", "lora"]), nearest("learnin-rate", ["learning_rate", "lr"]), nearest("x", ["lora"])
    ('lora', 'learning_rate', None)

    Args:
        word: as the user wrote it; case is ignored, and a hyphen counts as an underscore.
        names: what the user may have meant; the first of equally similar names wins.
        least: minimum similarity, 0..1.
    """
    found = nearest_names(word, names, most=1, least=least)
    return found[0] if found else None


def nearest_names(word: str, names: Iterable[str], *, most: int, least: float = 0.6) -> list[str]:
    """The names most similar to the word, best first; compared as in `nearest`."""
    # Imported here because a recipe without mistakes does not need it.
    from rapidfuzz.distance import OSA, Indel

    plain = _plain(word)[:LONGEST_WORD]

    def rank(name: str) -> tuple[bool, float, float]:
        # OSA counts two swapped letters as one edit. Indel also finds names that were only written in part, such as
        # `target` for target_modules, where OSA counts every missing letter. The same letters in another order are
        # a stronger match than a missing or wrong letter.
        other = _plain(name)
        osa = OSA.normalized_similarity(plain, other)
        same_letters = len(plain) == len(other) and sorted(plain) == sorted(other)
        return same_letters, max(osa, Indel.normalized_similarity(plain, other)), osa

    ranked = [(rank(name), name) for name in names]
    near = [(found, name) for found, name in ranked if found[1] >= least]
    return [name for _, name in sorted(near, key=lambda one: one[0], reverse=True)[:most]]


def _plain(text: str) -> str:
    return text.lower().replace("-", "_")
