"""Names the columns of a source, and the keys of its chat messages, that nothing reads."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from peftcli.data.chat_formats import CALL_KEYS, FUNCTION_KEYS, MESSAGE_KEYS, PART_KEYS, is_chat
from peftcli.data.rows import LONG_NAME, Rows
from peftcli.data.values import SkipRow, is_null, parsed_list, type_name
from peftcli.recipe.problems import printable

MOST_UNREAD = 100
"""Maximum number of columns and keys that are stored by name."""


class Unread:
    """Collects what is not read of a source, batch by batch."""

    def __init__(self, read: Collection[str], chats: Collection[str] = ()) -> None:
        """Start without rows.

        Args:
            read: columns that the recipe uses for anything.
            chats: those of them that may hold messages.
        """
        self._read = frozenset(read)
        self._chats = tuple(chats)
        self._types: dict[str, dict[str, None]] = {}
        self._keys: Counter[str] = Counter()

    def add(self, rows: Rows) -> None:
        """Look at a batch, with all of its columns."""
        for name, values in rows.columns.items():
            if name not in self._read:
                types = self._types.setdefault(name, {})
                kinds = {type(value) for value in values if value is not None}
                types.update(dict.fromkeys(sorted(map(type_name, kinds))))
        for name in self._chats:
            for value in rows.columns.get(name, ()):
                self._keys.update({f"{name}[].{key}" for key in _unread_keys(value)})

    def facts(self) -> dict[str, Any]:
        """`unread`: the types of the values by column; `unread_keys`: the number of rows by key; and both totals."""
        columns = list(self._types.items())[:MOST_UNREAD]
        return {
            "unread": {printable(name, LONG_NAME): ", ".join(types) or "null" for name, types in columns},
            "unread_columns": len(self._types),
            "unread_keys": {printable(key, LONG_NAME): rows for key, rows in self._keys.most_common(MOST_UNREAD)},
        }


def _unread_keys(value: Any) -> set[str]:
    """The keys of the messages of one row that nothing reads and that have a value."""
    try:
        turns = parsed_list([value] if isinstance(value, dict) else value, "")
    except SkipRow:
        return set()  # the row is dropped with its reason
    if not is_chat(list(turns[:1])):
        return set()
    return {key for turn in turns if isinstance(turn, dict) for key in _of_message(turn)}


def _of_message(turn: Mapping[Any, Any]) -> Iterator[str]:
    yield from _beyond(turn, MESSAGE_KEYS)
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    for part in content if isinstance(content, list | tuple) else ():
        yield from (f"content[].{key}" for key in _beyond(part, PART_KEYS))
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        yield from (f"tool_calls[].{key}" for key in _beyond(call, CALL_KEYS))
        inner = call.get("function") if isinstance(call, dict) else None
        yield from (f"tool_calls[].function.{key}" for key in _beyond(inner, FUNCTION_KEYS))


def _beyond(value: Any, known: Collection[str]) -> Iterator[str]:
    """The keys of an object that are not known; those without a value come from the common columns of Arrow files."""
    if isinstance(value, dict):
        yield from (str(key) for key, one in value.items() if key not in known and not is_null(one))
