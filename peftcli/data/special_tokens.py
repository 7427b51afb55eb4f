"""Finds rows whose text contains a special token, which the tokenizer would encode as that token."""

import re

from transformers import PreTrainedTokenizerBase

from peftcli.data.formats import Examples
from peftcli.data.rows import Dropped, Rows
from peftcli.data.stats import counted


class SpecialTexts:
    """Counts such rows, batch by batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens = [token for token in tokenizer.all_special_tokens if len(token) > 2]
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._example = tokenizer.eos_token
        self._found = Dropped()

    def add(self, rows: Rows, examples: Examples) -> None:
        """Count the examples of a batch."""
        if self._pattern is None:
            return
        found = [
            (examples.kept[number], "special")
            for number, text in enumerate(examples.content)
            if self._pattern.search(text)
        ]
        self._found.add(rows, found)

    def warnings(self) -> list[str]:
        """One sentence, or none."""
        count = self._found.counts["special"]
        if not count:
            return []
        rows = counted(count, "row contains", "rows contain")
        return [
            f"{rows} the text of a special token such as {self._example}, which is encoded as that token "
            f"(first {self._found.places['special'][0]})"
        ]
