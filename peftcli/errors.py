"""The errors that a user can cause, with their exit codes.

    PeftcliError            1    never raised directly
    ├── RecipeError         2    the recipe or the command line is wrong
    ├── DataError           3    the data is wrong
    ├── MachineError        4    the machine, the environment or a model folder does not support the request
    │   └── PeerLost        4    another process of a distributed run has ended
    ├── MemoryExhausted     5    out of memory even after every fallback
    ├── Diverged            6    a loss or a gradient is not finite
    ├── GateNotMet          7    a gate of the recipe, or the tolerance of a merge, was not met
    ├── Stopped            75    stopped early on purpose; a complete checkpoint was written
    └── Aborted           130    stopped immediately by a second Ctrl-C

A message has three parts: where; what was found and what is allowed; the fix. Any other exception is a bug in peftcli
and shows its traceback.
"""


class PeftcliError(Exception):
    """An error with a message for the user and an exit code for scripts.

    Attributes:
        exit_code: of the process.
        kind: the same in a word, for the JSON object of an error.
        in_all: whether every process of a distributed run raised it, so that none waits for another.
    """

    exit_code = 1
    kind = "bug"
    in_all = False


class RecipeError(PeftcliError):
    """The recipe or the command line is wrong."""

    exit_code = 2
    kind = "recipe"


class DataError(PeftcliError):
    """The data is missing or unreadable, or there is nothing in it to train on."""

    exit_code = 3
    kind = "data"


class MachineError(PeftcliError):
    """The machine, the environment or a model folder does not support the request."""

    exit_code = 4
    kind = "machine"


class PeerLost(MachineError):
    """Another process of this distributed run has ended, here or on another machine, so this one cannot continue."""


class MemoryExhausted(PeftcliError):
    """Out of memory even after every fallback."""

    exit_code = 5
    kind = "memory"


class Diverged(PeftcliError):
    """A loss or a gradient is not finite."""

    exit_code = 6
    kind = "diverged"


class GateNotMet(PeftcliError):
    """A gate of the recipe or the tolerance of a merge was not met."""

    exit_code = 7
    kind = "gate"


class Stopped(PeftcliError):
    """Stopped early on purpose; a complete checkpoint was written."""

    exit_code = 75
    kind = "stopped"


class Aborted(PeftcliError):
    """Stopped immediately by a second Ctrl-C; the last checkpoint is complete."""

    exit_code = 130
    kind = "aborted"
