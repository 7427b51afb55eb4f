"""The fault matrix as tests: every fault ends as it should. `make faults` runs the same with a table."""

from dataclasses import replace
from pathlib import Path

import pytest
from matrix import all_cases, run_case
from table import Case, Scenario

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", all_cases(kill_count=2, examples=50), ids=lambda case: f"{case.number} {case.fault}")
def test_a_fault_ends_as_the_matrix_says(case: Case | Scenario, tmp_path: Path, tiny_llama: Path) -> None:
    if isinstance(case, Case):  # time and memory belong to the table: here others compute, too, in this process even
        case = replace(case, most_seconds=None, most_cpu_seconds=None, most_mib=None)
    rows = list(run_case(case, tmp_path, tiny_llama, peer_too=False))
    assert rows
    assert [row for row in rows if row.good is False] == []
