"""Loss flags: which messages of a chat are trained, from keys of the messages or from a list beside them.

A flag is a yes or a no. The loss of SFTTrainer has no weights, so a fractional weight is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftcli.data.values import InvalidValue, SkipRow, is_null, parsed_list
from peftcli.recipe.problems import printable

FLAGS = ("train", "trainable", "training", "train_on_turn", "loss", "loss_mask", "loss_scale", "weight")
"""Keys of a message, and columns with one value per message: whether it is trained."""
_PARTS = "train_detail"
"""Axolotl's key for training parts of a message."""
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def message_flag(message: Mapping[str, Any]) -> bool | None:
    """Whether a message is marked as trained; None if it has no flag.

    Raises:
        SkipRow: a flag is neither yes nor no, or two flags disagree.
        InvalidValue: a flag is a setting of another tool.
    """
    if message.get(_PARTS):
        raise SkipRow(f"with {_PARTS}, which trains parts of a message; mark whole messages with train")
    found = {key: read_flag(message[key], key) for key in FLAGS if key in message}
    return _agreed(found)


def flag_keys(values: Iterable[Any]) -> list[str]:
    """The flags that occur in some messages, for the data report.

    Args:
        values: lists of messages; other values are skipped.
    """
    chats = (chat for chat in values if isinstance(chat, list | tuple))
    found = {key for chat in chats for message in chat if isinstance(message, Mapping) for key in message}
    return [key for key in FLAGS if key in found]


def read_flag(value: Any, key: str) -> bool | None:
    """The value of a flag; None if it is null.

    >>> read_flag(1, "weight"), read_flag("false", "train"), read_flag(None, "loss")
    (True, False, None)

    Raises:
        SkipRow: the value is neither yes nor no.
        InvalidValue: it is the name of a loss scale of ms-swift.
    """
    if is_null(value):
        return None
    if isinstance(value, str):
        if key == "loss_scale" and value.strip().lower() not in _WORDS:
            refuse_loss_scale(value)
        value = _WORDS.get(value.strip().lower(), value)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise SkipRow(f"with a message {key} that is neither 0 nor 1")


def refuse_loss_scale(value: Any) -> None:
    """
    Raises:
        InvalidValue: always; `loss_scale` with a name is a setting of ms-swift.
    """
    raise InvalidValue(
        f"loss_scale: {printable(str(value), 40)} is a setting of ms-swift; a message is trained or not: mark messages "
        "with loss: 0 or 1, or set dataset.mask_history to train the last answer only"
    )


def flag_columns(columns: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    """The columns with one flag per message.

    Args:
        columns: of the first rows.
        first: the first value of each that is not null.

    Raises:
        InvalidValue: a column has a setting of another tool.
    """
    value = first.get("loss_scale")
    if isinstance(value, str) and not _is_list(value):
        refuse_loss_scale(value)
    return [name for name in FLAGS if name in columns and _is_list(first.get(name))]


def row_flags(value: Any, name: str, roles: Sequence[str]) -> list[bool | None]:
    """One flag per message from a column; nulls if it has no value.

    Args:
        value: a list with a value per message, or per assistant message.
        name: of the column.
        roles: of the messages.

    Raises:
        SkipRow: the list has another length, or a value that is neither yes nor no.
    """
    given = [read_flag(one, name) for one in parsed_list(value, f"with {name} that is not a list")]
    if not given:
        return [None] * len(roles)
    if len(given) == len(roles):
        return given
    if len(given) != roles.count("assistant"):
        raise SkipRow(f"with a {name} whose length is not the number of messages")
    answers = iter(given)
    return [next(answers) if role == "assistant" else None for role in roles]


def agreed_flags(lists: Iterable[Sequence[bool | None]], count: int) -> list[bool | None]:
    """The flag of each message from several sources.

    Raises:
        SkipRow: two sources disagree.
    """
    return [_agreed(dict(enumerate(values))) for values in (zip(*lists, strict=True) if count else ())]


def _agreed(found: Mapping[Any, bool | None]) -> bool | None:
    given = {flag for flag in found.values() if flag is not None}
    if len(given) > 1:
        raise SkipRow("with loss flags of a message that disagree")
    return given.pop() if given else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith("["))
