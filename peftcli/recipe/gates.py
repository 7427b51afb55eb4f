"""The `gates` section: metrics with limits."""

from functools import partial

from peftcli.nearest import nearest
from peftcli.recipe.earlier_names import RENAMED_KEYS
from peftcli.recipe.fields import GATE_NAMES, Gate, parse_gate
from peftcli.recipe.problems import Problems, printable, show
from peftcli.recipe.yaml import Tree
from peftcli.tasks.base import AVERAGED_METRICS

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
            gates.append(parse_gate(name, text))
        except ValueError as error:
            problems.add(where, f"gates.{name} = {show(text)}: {error}")
    return tuple(gates)


def _unknown(name: str) -> str:
    near = RENAMED_KEYS.get(f"gates.{name}", "").removeprefix("gates.") or nearest(name, GATE_NAMES)
    fix = f"did you mean gates.{near}?" if near else f"the metrics are {', '.join(_SHORT)}"
    return f"gates.{printable(name)} is not a metric that a gate can check; {fix}"
