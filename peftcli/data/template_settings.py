"""Settings of a chat template: values of its variables, the system role, earlier reasoning, and the date.

The settings are written into the template itself, as a header, so that everything that uses the template does the same:
training, evaluation, generation, the saved adapter, the merged model, and a server that loads it.
"""

import datetime
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from peftcli.errors import RecipeError
from peftcli.nearest import nearest

OPENING, CLOSING = "{#- peftcli settings: ", " -#}"
END = "{#- end of the settings -#}{{- '' }}"
"""Ends the header; the empty output protects a line break at the beginning of the template."""

GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}
"""Variables that the caller of a template always sets."""
NO_TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
"""Special tokens for a template that is rendered without a tokenizer."""
SHOWS_EARLIER = {"preserve_thinking": True, "clear_thinking": False, "truncate_history_thinking": False}
"""Variables of known templates that show the reasoning of earlier turns."""

FOLD = (
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- set peftcli_system = messages[0]['content'] %}"
    "{%- if peftcli_system is not string %}"
    "{%- set peftcli_system = peftcli_system | map(attribute='text') | join %}{%- endif %}"
    "{%- if messages | length > 1 and messages[1]['role'] == 'user' %}"
    "{%- set peftcli_user = messages[1]['content'] %}"
    "{%- if peftcli_user is string %}{%- set peftcli_user = peftcli_system + '\\n\\n' + peftcli_user %}"
    "{%- else %}{%- set peftcli_user = [{'type': 'text', 'text': peftcli_system + '\\n\\n'}] + peftcli_user %}"
    "{%- endif %}"
    "{%- set messages = [{'role': 'user', 'content': peftcli_user}] + messages[2:] %}"
    "{%- else %}{%- set messages = [{'role': 'user', 'content': peftcli_system}] + messages[1:] %}{%- endif %}"
    "{%- endif %}"
)
OMIT_SYSTEM = "{%- if messages and messages[0]['role'] == 'system' %}{%- set messages = messages[1:] %}{%- endif %}"
OMIT_REASONING = (
    "{%- set peftcli_chat = namespace(messages=[]) %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- set peftcli_turn = dict(message) %}"
    "{%- set peftcli_text = message['content'] %}"
    "{%- if peftcli_text is string and '</think>' in peftcli_text %}"
    "{%- set peftcli_text = peftcli_text.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}"
    "{%- set peftcli_turn = dict(peftcli_turn, content=peftcli_text, reasoning_content='', thinking='') %}"
    "{%- set peftcli_chat.messages = peftcli_chat.messages + [peftcli_turn] %}"
    "{%- else %}{%- set peftcli_chat.messages = peftcli_chat.messages + [message] %}{%- endif %}"
    "{%- endfor %}"
    "{%- set messages = peftcli_chat.messages %}"
)

REASONING = "Zyxwv."
_CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": REASONING, "thinking": REASONING},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]


def settle(template: Any, settings: Mapping[str, Any], file: str | None = None) -> Any:
    """A chat template with settings written into it; without any, the template itself.

    Args:
        template: Jinja text, or named templates as some tokenizers have them.
        settings: `variables` by name; `thinking`: keep, last or drop; `system`: keep, fold or drop; and the `date` that
            a template with a date writes, today by default.
        file: of the template, for messages.

    Raises:
        RecipeError: the template has no such variable, or cannot show the reasoning of earlier turns.
    """
    if isinstance(template, Mapping):
        return {name: settle(one, settings, file) for name, one in template.items()}
    if template is None or has_settings(template):
        return template
    variables = dict(settings.get("variables") or {})
    _check_names(variables, template, file or "the chat template")
    thinking, system = settings.get("thinking", "last"), settings.get("system", "keep")
    if thinking == "keep":
        template, variables = _keeping(template, variables)
    stated: dict[str, Any] = {"variables": variables} if variables else {}
    stated |= {"thinking": thinking} if thinking != "last" else {}
    stated |= {"system": system} if system != "keep" else {}
    if writes_date(template, variables):
        stated["date"] = settings.get("date") or today().isoformat()
    return header(stated, template) + template if stated else template


def header(settings: Mapping[str, Any], template: str) -> str:
    """The Jinja text that applies settings to the template that follows it."""
    parts = [OPENING, json.dumps(settings, sort_keys=True).replace("#}", "#\\u007d"), CLOSING]
    for name, value in sorted((settings.get("variables") or {}).items()):
        # A server's own value wins.
        parts.append(f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}")
    if date := settings.get("date"):
        parts.append(_date_macro(datetime.date.fromisoformat(date), template))
    parts += [OMIT_REASONING] if settings.get("thinking") == "drop" else []
    parts += {"fold": [FOLD], "drop": [OMIT_SYSTEM]}.get(str(settings.get("system")), [])
    return "".join([*parts, END])


def has_settings(template: str) -> bool:
    """Whether settings were written into a template."""
    return template.startswith(OPENING)


def split_settings(template: str) -> tuple[str, str]:
    """The header of a template, empty if it has none, and the template below it."""
    if not has_settings(template):
        return "", template
    end = template.index(END) + len(END)
    return template[:end], template[end:]


def settings_of(template: Any) -> dict[str, Any]:
    """The settings in a template; empty if it has none.

    >>> settings_of(header({"system": "fold"}, "") + "text"), settings_of("text"), settings_of(None)
    ({'system': 'fold'}, {}, {})
    """
    if isinstance(template, Mapping):
        template = template.get("default", next(iter(template.values()), None))
    if not isinstance(template, str) or not has_settings(template):
        return {}
    found: dict[str, Any] = json.JSONDecoder().raw_decode(template, len(OPENING))[0]
    return found


def variables_of(template: str) -> list[str]:
    """The variables of a chat template that a caller may set, sorted."""
    environment = _compile_jinja_template(template).environment
    parsed = environment.parse(template)
    read = meta.find_undeclared_variables(parsed) - GIVEN - set(environment.globals)
    assigned = {node.name for node in parsed.find_all(nodes.Name) if node.ctx in ("store", "param")}
    # A variable that a template sets itself is one of the caller only where the template looks whether it is defined.
    checked = {
        node.node.name
        for node in (*parsed.find_all(nodes.Test), *parsed.find_all(nodes.Filter))
        if node.name in ("defined", "undefined", "default") and isinstance(node.node, nodes.Name)
    }
    return sorted(read - (assigned - checked))


@lru_cache(maxsize=16)
def marked_template(template: str) -> str | None:
    """A template with generation markers: the template itself, TRL's for a known family, or None."""
    if has_generation_markers(template):
        return template
    above, own = split_settings(template)
    try:
        found = get_training_chat_template(_Holder(own))
    except ValueError:  # TRL does not know this family
        return None
    return None if found is None else above + found


def writes_date(template: str, variables: Mapping[str, Any]) -> bool:
    """Whether a template writes the current date."""
    if "strftime_now" not in template:
        return False
    chat = _CHAT[:1]
    found = {
        _rendered(header({"variables": variables, "date": date}, template) + template, chat)
        for date in ("2001-02-03", "2022-11-30")
    }
    return len(found) > 1


def today() -> datetime.date:
    """The date that a template writes unless another one is recorded."""
    return datetime.date.today()


def _keeping(template: str, variables: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The template and the variables that show the reasoning of earlier turns."""
    if _shows_earlier(template, variables):
        return template, variables
    names = variables_of(template)
    for name, value in SHOWS_EARLIER.items():
        if name in names and _shows_earlier(template, tried := {**variables, name: value}):
            return template, tried
    marked = marked_template(template)
    if marked is not None and _shows_earlier(plain := without_markers(marked), variables):
        return plain, variables
    raise RecipeError(
        "dataset.thinking: keep: the chat template leaves out the reasoning of earlier turns, and has no variable that "
        "shows it; set model.chat_template to a template that shows it, or dataset.thinking: last"
    )


def without_markers(template: str) -> str:
    """The template without generation markers, which only transformers understands.

    >>> without_markers("{%- generation -%}{{ text }}{% endgeneration %}")
    '{%- if true -%}{{ text }}{% endif %}'
    """
    begun = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", begun)


def _shows_earlier(template: str, variables: Mapping[str, Any]) -> bool:
    text = _rendered(header({"variables": variables}, template) + template, _CHAT)
    written = [{key: turn[key] for key in ("role", "content")} for turn in _CHAT]
    written[1]["content"] = f"<think>\n{REASONING}\n</think>\n\nTwo."
    return REASONING in (text or "") or REASONING in (_rendered(template, written) or "")


def _rendered(template: str, chat: list[dict[str, str]]) -> str | None:
    try:
        return str(render_jinja_template(conversations=[chat], chat_template=template, **NO_TOKENS)[0][0])
    except (TemplateError, TypeError, ValueError):
        return None


def _check_names(variables: Mapping[str, Any], template: str, where: str) -> None:
    if not variables:
        return
    names = variables_of(template)
    for name in variables:
        if name not in names:
            near = nearest(name, names)
            known = f"its variables are {', '.join(names)}" if names else "it has none"
            fix = f"did you mean {near}?" if near else "remove it, or set model.chat_template"
            raise RecipeError(f"model.template.{name}: {where} has no such variable ({known}); {fix}")


def _literal(value: Any) -> str:
    """A value as Jinja text.

    >>> _literal({"a": [True, None, "it's"]})
    '{"a": [true, none, "it\\'s"]}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, default=str)


def _date_macro(date: datetime.date, template: str) -> str:
    """A macro instead of transformers' function of the same name, which writes the current date."""
    formats = sorted({found[1] for found in re.findall(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)", template)})
    noon = datetime.datetime.combine(date, datetime.time(12))
    cases = "".join(
        f"{{%- if format == {json.dumps(one)} %}}{{{{- {json.dumps(noon.strftime(one))} }}}}{{%- endif %}}"
        for one in formats
    )
    listed = json.dumps(formats)
    other = f"{{%- if format not in {listed} %}}{{{{- {json.dumps(date.isoformat())} }}}}{{%- endif %}}"
    return f"{{%- macro strftime_now(format) %}}{cases}{other}{{%- endmacro %}}"


class _Holder:
    """What TRL reads of a tokenizer to find the training template of a family."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def apply_chat_template(self, conversation: Any, **arguments: Any) -> Any:
        """Render one chat, for TRL's checks of tool calls."""
        chats = conversation if conversation and isinstance(conversation[0], list) else [conversation]
        chosen = {name: arguments[name] for name in ("tools", "add_generation_prompt") if name in arguments}
        texts, _ = render_jinja_template(conversations=chats, chat_template=self.chat_template, **NO_TOKENS, **chosen)
        return texts[0]
