"""What makes the figures of several runs not comparable, said beside them."""

from collections.abc import Callable, Mapping
from typing import Any

from peftcli.report.format import compact
from peftcli.report.load import Stages, figure, find, text
from peftcli.report.metrics import COUNTED_ON_ANSWERS, Metric


def find_doubts(runs: Mapping[str, Stages], metric: Metric | None, methods: Mapping[str, str]) -> list[str]:
    """One sentence for each reason why the runs cannot be held against each other as they are.

    Args:
        runs: by name.
        metric: the quality that is compared.
        methods: of the runs, as far as they are known.
    """
    answered = metric is not None and metric.key in COUNTED_ON_ANSWERS
    checks: tuple[tuple[Callable[[Stages], Any], str], ...] = (
        (
            lambda run: (find(run.data, "fingerprint", "test"), figure(run.eval, "generated_rows") if answered else 0),
            "were not scored on the same held-out rows, so their quality cannot be compared",
        ),
        (
            lambda run: (text(run.environment, "device", "name"), figure(run.environment, "device", "count")),
            "did not run on the same device, so memory, time and tokens/s cannot be compared",
        ),
        (
            lambda run: find(run.eval, "retention", "sha256"),
            "were not measured on the same text, so their forgetting cannot be compared",
        ),
        (
            lambda run: find(run.metrics, "smoke"),
            "are not all smoke runs, so none of their figures can be compared",
        ),
        (
            lambda run: text(run.plan, "model", "name") if metric is not None and metric.key == "loss" else None,
            "have not the same base, so a loss per token may count other tokens",
        ),
    )
    found = [
        f"The variants {sentence}: {_groups(groups)}."
        for value_of, sentence in checks
        if len(groups := _grouped(runs, value_of)) > 1
    ]
    rate = _one_rate_for_all(runs, set(methods.values()))
    return [*found, rate] if rate else found


def _grouped(runs: Mapping[str, Stages], value_of: Callable[[Stages], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(value_of(run), []).append(name)
    groups.pop(None, None)
    return groups


def _groups(groups: Mapping[Any, list[str]]) -> str:
    shown = [
        ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") for names in groups.values()
    ]
    return "; against ".join(shown)


def _one_rate_for_all(runs: Mapping[str, Stages], methods: set[str]) -> str | None:
    """What several methods with one learning rate cannot show."""
    rates = {figure(run.plan, "trainer", "learning_rate") for run in runs.values()}
    if len(methods) < 2 or len(rates) != 1 or rates == {None}:
        return None
    return (
        f"All methods were trained with the learning rate {compact(rates.pop())}; each has a best one of its own, so a "
        "low score may be the rate's fault."
    )
