"""The tasks of a recipe, and the keys that say nothing for models that give labels."""

from peftcli.recipe.problems import KeyPath, Problems, dotted
from peftcli.recipe.values import AVERAGED_FIGURES, CLASS_FIGURES, ENTITY_FIGURES, NUMBER_FIGURES
from peftcli.recipe.yaml_text import Tree

CAUSAL, SEQUENCE, TOKENS = "causal-lm", "sequence-classification", "token-classification"
IMAGES = "image-classification"
LABEL_TASKS = (SEQUENCE, TOKENS, IMAGES)

_ALONE = "rows are labelled one by one, each padded to the longest of its micro-batch"
_LABELS = "the loss is on the labels of the rows, and on no token of their text"
_WRITES = "no text is written, so nothing is drawn"
_NO_USE: dict[tuple[str, ...], str] = {
    **{("trainer", name): _ALONE for name in ("packing", "packing_strategy", "eval_packing", "padding_free")},
    **{("trainer", name): _LABELS for name in ("completion_only_loss", "assistant_only_loss", "loss_type")},
    ("trainer", "router_aux_loss_coef"): _LABELS,
    ("trainer", "activation_offloading"): "it belongs to the trainer of language models; use activation_checkpointing",
    **{
        ("trainer", name): "it belongs to the trainer of language models"
        for name in (
            "pad_to_multiple_of",
            "shuffle_dataset",
            "use_liger_kernel",
        )
    },
    ("model", "chat_template"): "a text is labelled as it stands; name its column or write dataset.text",
    ("model", "eos_token"): "nothing is written that could end on it",
    **{("dataset", name): "a row is a text with its label" for name in ("prompt", "completion")},
    **{("dataset", "columns", name): "a row is a text with its label" for name in ("prompt", "completion", "messages")},
    **{("evaluation", name): _WRITES for name in ("max_new_tokens", "temperature", "top_p", "rows")},
    **{
        ("gates", name): "it is no figure of labels; accuracy and f1 are"
        for name in ("perplexity", "token_accuracy", "exact_match", "chrf", "unfinished_answers")
    },
}
_FILES = "a row is an image file with its label"
_NO_USE_OF_IMAGES: dict[tuple[str, ...], str] = {
    **{path: why for path, why in _NO_USE.items() if path[0] in ("trainer", "evaluation", "gates")},
    **{("model", name): "an image has no tokens" for name in ("chat_template", "eos_token")},
    **{("dataset", name): "an image has no tokens" for name in ("max_length", "too_long")},
    **{("dataset", name): _FILES for name in ("text", "prompt", "completion", "name", "url", "url_env")},
    **{("dataset", "columns", name): _FILES for name in ("prompt", "completion", "messages")},
    ("performance", "tokens_per_micro_batch"): "an image has no tokens",
}
_OF_LABELS: dict[tuple[str, ...], str] = {
    ("dataset", "labels"): "only classes and tags have names",
    ("evaluation", "positive_label"): "only classes have one",
    **{
        ("gates", name): "it is a figure of labels"
        for name in (*CLASS_FIGURES, *AVERAGED_FIGURES, *ENTITY_FIGURES, *NUMBER_FIGURES)
    },
}


def find_idle_keys(tree: Tree, problems: Problems) -> None:
    """Add a problem for each key that does nothing for the task of the recipe."""
    task = tree.get("model", "task") or CAUSAL
    if task not in (CAUSAL, *LABEL_TASKS):
        return  # the schema says which there are
    idle = _OF_LABELS if task == CAUSAL else _NO_USE_OF_IMAGES if task == IMAGES else _NO_USE
    for path, why in idle.items():
        _refuse(path, task, why, tree, problems)
    if task not in (SEQUENCE, IMAGES) and tree.get("model", "problem") not in (None, "auto"):
        _refuse(("model", "problem"), task, f"it belongs to {SEQUENCE}", tree, problems)
    if task in (SEQUENCE, IMAGES):
        for name in ENTITY_FIGURES:
            _refuse(("gates", name), task, "entities are found in tags", tree, problems)


def _refuse(path: KeyPath, task: str, why: str, tree: Tree, problems: Problems) -> None:
    if tree.get(*[str(part) for part in path]) not in (None, False, "auto"):
        text = f"{dotted(path)} does nothing with model.task: {task}: {why}; leave it out"
        problems.add(tree.place(path), text)
