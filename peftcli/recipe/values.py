"""Values of a recipe with a notation of their own: durations and gates."""

import math
import re
from dataclasses import dataclass

_DURATION = re.compile(
    r"(?:(?P<d>\d+(?:\.\d+)?)d)?(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m(?:in)?)?(?:(?P<s>\d+(?:\.\d+)?)s)?"
)
_UNIT_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}

AVERAGED_FIGURES = tuple(
    f"{name}_{average}"
    for average in ("macro", "micro", "weighted", "samples")
    for name in ("precision", "recall", "f1")
)
"""Figures of classes by how they are averaged over them."""
CLASS_FIGURES = ("accuracy", "precision", "recall", "f1")
ENTITY_FIGURES = tuple(f"{of}_{name}" for of in ("entity", "token_entity") for name in ("precision", "recall", "f1"))
NUMBER_FIGURES = ("mse", "mae", "pearson", "spearman", "r2")
GATE_NAMES = (
    "loss",
    "perplexity",
    "token_accuracy",
    "exact_match",
    "chrf",
    "unfinished_answers",
    "retention_loss",
    "retention_change",
    "merge_top1_agreement",
    "merge_max_abs_logit_difference",
    "merge_mean_abs_logit_difference",
    "merge_kl_nats",
    *CLASS_FIGURES,
    *AVERAGED_FIGURES,
    *ENTITY_FIGURES,
    *NUMBER_FIGURES,
)
_GATE = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `90s`, `10min`, `8h30m` or `1d`.

    >>> parse_duration("8h30m"), parse_duration("10min"), parse_duration("1.5h")
    (30600.0, 600.0, 5400.0)

    Raises:
        ValueError: the text is no duration above zero, or its unit is missing.
    """
    bare = text.strip()
    if re.fullmatch(r"\d+(?:\.\d*)?|\.\d+", bare):
        raise ValueError(f"the unit is missing; write {bare}s, {bare}min or {bare}h")
    match = _DURATION.fullmatch(bare)
    if match is None or not bare:
        raise ValueError("must be a duration such as 90s, 10min or 8h30m")
    seconds = sum(float(match[unit]) * size for unit, size in _UNIT_SECONDS.items() if match[unit])
    if seconds <= 0 or not math.isfinite(seconds):
        raise ValueError("must be a duration above zero, such as 90s, 10min or 8h30m")
    return seconds


def duration_text(seconds: float) -> str:
    """Write seconds so that `parse_duration` reads the same number back.

    >>> duration_text(30600.0), duration_text(0.5)
    ('8h30m', '0.5s')
    """
    if seconds != int(seconds):
        return f"{seconds!r}s" if "e" not in repr(seconds) else f"{seconds:.20f}s"
    rest, text = int(seconds), ""
    for unit, size in (("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return text


@dataclass(frozen=True)
class Gate:
    """A limit that a figure of the run must meet; otherwise the command ends with exit code 7."""

    name: str
    operator: str
    limit: float

    @property
    def text(self) -> str:
        """The limit as the recipe writes it.

        >>> Gate("exact_match", ">=", 0.8).text
        '>= 0.8'
        """
        short = f"{self.limit:.15g}"
        return f"{self.operator} {short if float(short) == self.limit else repr(self.limit)}"

    def met(self, value: float) -> bool:
        """Whether a value meets the limit; nan meets none.

        >>> Gate("loss", "<", 2.0).met(1.9), Gate("loss", "<", 2.0).met(float("nan"))
        (True, False)
        """
        if self.operator == ">=":
            return value >= self.limit
        if self.operator == "<=":
            return value <= self.limit
        return value > self.limit if self.operator == ">" else value < self.limit


def parse_gate(name: str, text: str) -> Gate:
    """Read a gate.

    >>> parse_gate("loss", "<2")
    Gate(name='loss', operator='<', limit=2.0)

    Raises:
        ValueError: the text is not an operator and a number.
    """
    match = _GATE.fullmatch(text)
    if match is None or not math.isfinite(float(match[2])):
        raise ValueError('must be a limit in quotes such as ">= 0.8" (>=, <=, > or <, and a number)')
    return Gate(name, match[1], float(match[2]))
