"""Compares, for chat templates of the field, the text that is trained with the text that inference asks.

Prints the table of docs/chat-templates.md. `python scripts/template_parity.py [--write]`
"""

import sys
from pathlib import Path
from typing import Any, ClassVar

import trl

from peftcli.data.shown_answers import REJECTED, AnswerFinder, TemplateProblem, has_reasoning, render_chat
from peftcli.data.template_settings import marked_template, settle
from peftcli.errors import RecipeError

PAGE = Path(__file__).parent.parent / "docs" / "chat-templates.md"
BEGIN, END = "<!-- parity table: scripts/template_parity.py --write -->", "<!-- end of the parity table -->"
FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = (
    "cohere2",
    "deepseek_r1_distill",
    "gemma",
    "gemma3",
    "glm4moe",
    "gptoss",
    "llama3",
    "llama3_2",
    "nemotron_3_nano",
    "phi3",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
)
OFF: dict[str, Any] = {"variables": {"enable_thinking": False}}
CHANGED: list[tuple[str, str, dict[str, Any]]] = [
    ("gemma", "`system: fold`", {"system": "fold"}),
    *(
        (name, "`enable_thinking: false`", OFF)
        for name in ("glm4moe", "nemotron_3_nano", "qwen3", "qwen3_5_think", "qwen3_8")
    ),
    *((name, "`thinking: keep`", {"thinking": "keep"}) for name in ("qwen3", "qwen3_6", "glm4moe", "nemotron_3_nano")),
    *(
        (name, "`thinking: keep`, `enable_thinking: false`", OFF | {"thinking": "keep"})
        for name in ("qwen3", "qwen3_5_think")
    ),
    *((name, "`thinking: drop`", {"thinking": "drop"}) for name in ("qwen3", "gptoss")),
]
DATE = "2026-01-31"

SYSTEM = {"role": "system", "content": "Answer in one word."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}},
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, reasoning: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"reasoning_content": reasoning} if reasoning else {}), **more}


PLAIN = [user("One plus one?"), answer("Two."), user("And doubled?"), answer("Four.")]
CHATS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "several turns": (PLAIN, None),
    "system": ([SYSTEM, *PLAIN], None),
    "tools": (
        [user("Rain in Oslo?"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "wet"}, answer("Yes.")],
        [TOOL],
    ),
    "reasoning": ([user("One plus one?"), answer("Two.", "One and one more.")], None),
    "reasoning in several turns": (
        [user("One plus one?"), answer("Two.", "One and one more."), user("Doubled?"), answer("Four.", "Twice two.")],
        None,
    ),
}


class Template:
    """A tokenizer that only renders."""

    special_tokens_map: ClassVar = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        return self.chat_template


def load(name: str, **settings: Any) -> Any:
    """A template of the installed trl with settings of a recipe."""
    return Template(settle((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), {"date": DATE, **settings}))


def served(tokenizer: Any, chat: list[dict[str, Any]], tools: Any, text: str) -> bool:
    """Whether a text begins with the prompt that the template writes for the last answer at inference."""
    return text.startswith(render_chat(chat[:-1], tools, tokenizer, prompt=True))


def ours(tokenizer: Any, chat: list[dict[str, Any]], tools: Any) -> str:
    """What the default run does with a chat."""
    try:
        found = AnswerFinder(tokenizer, assistant_only=True).find(chat, tools)
    except TemplateProblem:
        return "stops: ambiguous"
    except REJECTED:
        return "refused"
    if found.mismatch is not None:
        return "stops"
    assert served(tokenizer, chat, tools, found.text), "the trained text is not what is asked"
    answers = sum(turn["role"] == "assistant" for turn in chat)
    trained = len(found.spans)
    return "served" if trained == answers else f"served, {trained} of {answers} answers"


def theirs(tokenizer: Any, chat: list[dict[str, Any]], tools: Any) -> str:
    """Whether the text of TRL's training template is what inference asks, followed by the answer."""
    marked = marked_template(tokenizer.chat_template)
    if marked is None:
        return "none"
    try:
        text = render_chat(chat, tools, tokenizer, marked)
        prompt_is_kept = served(tokenizer, chat, tools, text)
    except REJECTED:
        return "refused"
    if not prompt_is_kept:
        return "differs"
    if has_reasoning(chat):
        return "served"
    rest = text[len(render_chat(chat[:-1], tools, tokenizer, prompt=True)) :]
    return "empty block" if rest.lstrip().startswith(("<think>", "</think>")) else "served"


def table() -> str:
    """The table as Markdown: what peftcli trains, and in brackets what TRL's training template trains."""
    lines = [f"| template | {' | '.join(CHATS)} |", f"|---|{'---|' * len(CHATS)}"]
    for name in TEMPLATES:
        tokenizer = load(name)
        cells = [f"{ours(tokenizer, *chat)} ({theirs(tokenizer, *chat)})" for chat in CHATS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, title, settings in CHANGED:
        try:
            tokenizer = load(name, **settings)
        except RecipeError:
            lines.append(f"| {name}, {title} | {' | '.join('no such setting' for _ in CHATS)} |")
            continue
        lines.append(f"| {name}, {title} | {' | '.join(ours(tokenizer, *chat) for chat in CHATS.values())} |")
    return "\n".join(lines)


def page() -> str:
    """The page with the current table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table())
