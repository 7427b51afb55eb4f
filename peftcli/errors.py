"""The errors a user can cause, with the exit code of each.

    PeftcliError            1    never raised itself
    ├── RecipeError         2    the recipe or the command line is wrong
    ├── DataError           3    the data is wrong
    ├── MachineError        4    the machine, the environment or a model folder cannot do it
    │   └── PeerLost        4    another process of a training with several has ended
    ├── MemoryExhausted     5    out of memory, the fall-backs are used up
    ├── Diverged            6    a loss or a gradient is not finite
    ├── GateNotMet          7    a gate of the recipe, or the tolerance of a merge, was not met
    ├── Stopped            75    stopped early on purpose; a whole checkpoint is there
    └── Aborted           130    stopped at once by a second Ctrl-C

A message says where, what is there against what may be, and the mend. Anything that is not one of these is a bug
of ours and keeps its traceback.
"""


class PeftcliError(Exception):
    """An error with a message for the user and an exit code for the script.

    Attributes:
        in_all: it was raised in every process of a training with several, so that none waits for another.
    """

    exit_code = 1
    in_all = False


class RecipeError(PeftcliError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(PeftcliError):
    """The data is missing, unreadable or would train nothing."""

    exit_code = 3


class MachineError(PeftcliError):
    """The machine, the environment or a model folder cannot do what was asked."""

    exit_code = 4


class PeerLost(MachineError):
    """Another process of the same training has ended, on this machine or another one, so this one cannot go on."""


class MemoryExhausted(PeftcliError):
    """Out of memory, and the fall-backs are used up."""

    exit_code = 5


class Diverged(PeftcliError):
    """A loss or a gradient is not finite."""

    exit_code = 6


class GateNotMet(PeftcliError):
    """A gate of the recipe or the tolerance of a merge was not met."""

    exit_code = 7


class Stopped(PeftcliError):
    """Stopped early on purpose; a whole checkpoint is there."""

    exit_code = 75


class Aborted(PeftcliError):
    """Stopped at once by a second Ctrl-C; the last checkpoint is whole."""

    exit_code = 130
