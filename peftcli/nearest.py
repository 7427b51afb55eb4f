"""The names that a misspelt word may stand for: the one place behind every "did you mean"."""

from collections.abc import Iterable

LONGEST_WORD = 80
"""Characters of the word that are compared; what a user pastes may be of any length."""


def nearest(word: str, names: Iterable[str], least: float = 0.6) -> str | None:
    """The name most like the word, or None where no name is like it.

    >>> nearest("lroa", ["road", "lora"]), nearest("learnin-rate", ["learning_rate", "lr"]), nearest("x", ["lora"])
    ('lora', 'learning_rate', None)

    Args:
        word: as the user wrote it; case counts for nothing, and a hyphen is an underscore.
        names: what the user may have meant; of two that are equally near the first is taken.
        least: similarity of 0..1 that a name must have.
    """
    found = nearest_names(word, names, most=1, least=least)
    return found[0] if found else None


def nearest_names(word: str, names: Iterable[str], *, most: int, least: float = 0.6) -> list[str]:
    """The names most like the word, the nearest first; `nearest` says how they are compared."""
    # Imported here: a recipe without a mistake is checked without it.
    from rapidfuzz.distance import OSA, Indel

    plain = _plain(word)[:LONGEST_WORD]

    def rank(name: str) -> tuple[bool, float, float]:
        # OSA counts two swapped letters as one mistake. The share of common letters finds a name of which only a part
        # was written, such as `target` for target_modules, whose many missing letters OSA counts one by one. Letters
        # that were all typed, in another order, say more than one that is missing or wrong.
        meant = _plain(name)
        mistakes = OSA.normalized_similarity(plain, meant)
        same_letters = len(plain) == len(meant) and sorted(plain) == sorted(meant)
        return same_letters, max(mistakes, Indel.normalized_similarity(plain, meant)), mistakes

    ranked = [(rank(name), name) for name in names]
    near = [(found, name) for found, name in ranked if found[1] >= least]
    return [name for _, name in sorted(near, key=lambda one: one[0], reverse=True)[:most]]


def _plain(text: str) -> str:
    return text.lower().replace("-", "_")
