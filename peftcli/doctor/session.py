"""How long this machine is ours, against the time that a run may take."""

from peftcli.doctor.verdict import OK, WARN, Verdict
from peftcli.recipe.fields import duration_text
from peftcli.train.deadline import Deadline, Limit


def judge_session(
    limit: Limit | None, until: Deadline | None, now: float, *, budget: float | None = None, runs: bool = False
) -> Verdict:
    """Say when the machine is taken away, and warn where a recipe's run would not end before that.

    Args:
        limit: the session of a notebook service, None elsewhere.
        until: what PEFTCLI_DEADLINE says.
        now: Unix time, seconds.
        budget: `budget.wall_clock` of the recipe, seconds.
        runs: a recipe was named.
    """
    if until is not None:
        left = max(60.0, (until.at - now) // 60 * 60)
        return Verdict("session", OK, f"PEFTCLI_DEADLINE ends every run in {duration_text(left)}")
    if limit is None:
        return Verdict("session", OK, "no notebook service with a time limit was recognised")
    there, _, mend = limit.sentence(now).partition("; ")
    if budget is None:
        return Verdict("session", WARN, there, mend) if runs else Verdict("session", OK, f"{there}; {mend}")
    gone = now - limit.started if limit.started is not None else 0.0
    if budget > limit.seconds - gone:
        there = f"the recipe's budget of {duration_text(budget)} is longer than the session: {there}"
        return Verdict("session", WARN, there, mend)
    return Verdict("session", OK, f"{there}; the recipe's budget of {duration_text(budget)} is shorter")
