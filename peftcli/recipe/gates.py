"""The `gates` section: metrics with limits."""

import math
from functools import partial

from peftcli.nearest import nearest
from peftcli.recipe.earlier_names import RENAMED_KEYS
from peftcli.recipe.fields import GATE_NAMES, Gate, parse_gate
from peftcli.recipe.problems import Problems, printable, show
from peftcli.recipe.yaml import Tree
from peftcli.tasks.base import AVERAGED_METRICS, CLASS_METRICS, ENTITY_METRICS

_SHARES = (
    *("exact_match", "token_accuracy", "unfinished_answers", "merge_top1_agreement"),
    *(name for name in (*CLASS_METRICS, *ENTITY_METRICS)),
)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_SHARES, (0.0, 1.0)),
    **dict.fromkeys(
        ("loss", "mse", "mae", "merge_kl_nats", "merge_max_abs_logit_difference", "merge_mean_abs_logit_difference"),
        (0.0, math.inf),
    ),
    **dict.fromkeys(("pearson", "spearman"), (-1.0, 1.0)),
    "chrf": (0.0, 100.0),
    "perplexity": (1.0, math.inf),
    "r2": (-math.inf, 1.0),
}
"""Least and greatest value of a metric; others may have any value."""
_SHORT = [name for name in GATE_NAMES if name not in AVERAGED_METRICS]


def read_gates(tree: Tree, problems: Problems) -> tuple[Gate, ...]:
    """Parse all gates; those that cannot be parsed are added to the problems."""
    section = tree.get("gates")
    if section is None:
        return ()
    if not isinstance(section, dict):
        problems.add(tree.place(("gates",)), 'gates must be a section, such as gates: {exact_match: ">= 0.8"}')
        return ()
    gates = []
    for name, text in section.items():
        where = tree.place(("gates", name))
        if ("gates", name) in tree.spoiled:
            continue
        if name not in GATE_NAMES:
            problems.add(where, f"gates.{printable(name)}", partial(_unknown, name))
            continue
        try:
            if not isinstance(text, str):
                raise ValueError('must be a limit in quotes such as ">= 0.8" (>=, <=, > or <, and a number)')
            gate = parse_gate(name, text)
            if (fault := _unreachable(gate)) is not None:
                raise ValueError(fault)
            gates.append(gate)
        except ValueError as error:
            problems.add(where, f"gates.{name} = {show(text)}: {error}")
    return tuple(gates)


def _unreachable(gate: Gate) -> str | None:
    """Why no value of the metric can meet a gate, if so."""
    low, high = RANGES.get(gate.name, (-math.inf, math.inf))
    # The strictest value of the range for this operator: if even that one fails, all do.
    best = high if gate.operator in (">", ">=") else low
    if math.isinf(best) or gate.met(best):
        return None
    top = "" if math.isinf(high) else f" to {high:g}"
    share = f'; write a share, such as ">= {gate.limit / 100:g}"' if 1 < gate.limit <= 100 and high == 1 else ""
    return (
        f"can never be met: {gate.name} is {'at least ' if not top else ''}{low:g}{top}{share or '; change the limit'}"
    )


def _unknown(name: str) -> str:
    near = RENAMED_KEYS.get(f"gates.{name}", "").removeprefix("gates.") or nearest(name, GATE_NAMES)
    fix = f"did you mean gates.{near}?" if near else f"the metrics are {', '.join(_SHORT)}"
    return f"gates.{printable(name)} is not a metric that a gate can check; {fix}"
