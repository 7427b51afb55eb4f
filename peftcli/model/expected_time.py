"""Says how long a stretch of work will take, from the time of its first batch."""

import time

from peftcli.progress import Progress
from peftcli.report.format import count, duration


class ExpectedTime:
    """Measures the first batch of some rows and says once what all of them will take."""

    def __init__(self, what: str, rows: int, progress: Progress, *, least_seconds: float = 0.0) -> None:
        """
        Args:
            what: name of the work, for people.
            rows: of all batches.
            least_seconds: nothing is said of work that takes less.
        """
        self._what = what
        self._rows = rows
        self._progress = progress
        self._least = least_seconds
        self._begun = time.monotonic()
        self._said = False

    def restart(self) -> None:
        """Begin to measure again, since an attempt failed."""
        self._begun = time.monotonic()

    def after(self, done: int, ratio: float) -> None:
        """Say the expected time after the first batch; later calls do nothing.

        Args:
            done: rows of the first batch.
            ratio: its share of the whole work, 0..1; rows run from the longest to the shortest, so it may be a bound.
        """
        if self._said:
            return
        self._said = True
        seconds = time.monotonic() - self._begun
        if done < self._rows and seconds / ratio >= self._least:
            self._progress.note(
                f"  {self._what}: the first {count(done)} of {count(self._rows)} rows took {duration(seconds)}, so all "
                f"take at most about {duration(seconds / ratio)}"
            )
