"""The work that is done in a process of its own: `python -m peftcli.bench.child VERB SPEC.json RESULT.json`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from peftcli.errors import PeftcliError


def main(words: Sequence[str]) -> None:
    """Do one piece of work and write what came of it."""
    verb, spec, result = words
    given = json.loads(Path(spec).read_text(encoding="utf-8"))
    # Each verb loads its own libraries only: what another one needs would count as its time and memory.
    if verb == "make":
        from peftcli.bench.make import make as work
    elif verb == "sft":
        from peftcli.bench.sft import train as work
    else:
        from peftcli.bench.judge import judge as work
    try:
        found = work(given)
    except PeftcliError as problem:
        sys.stderr.write(f"error: {problem}\n")
        raise SystemExit(problem.exit_code) from None
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
