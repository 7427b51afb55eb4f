"""The model cards of the tiny models."""

from peftcli.tiny.pretrain import Pretrained, Schedule

HEAD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
"""


def pretrained_card(trained: Pretrained, schedule: Schedule) -> str:
    """The card of tiny:llama, with what it was trained on and its losses."""
    parameters = sum(p.numel() for p in trained.model.parameters())
    seen = schedule.steps * schedule.rows * schedule.block_tokens
    return f"""{HEAD}
# tiny:llama

A Llama of {parameters:,} parameters for demonstrations and tests of fine-tuning. It was trained on this
machine by peftcli, at first use, and knows nothing but the short invented sentences about shops, kitchens,
animals and school that peftcli ships. It is of no use for anything else.

| | |
|---|---|
| text | {trained.documents:,} documents, {trained.train_tokens:,} tokens, written for peftcli |
| training | {schedule.steps} steps of {schedule.rows} x {schedule.block_tokens} tokens ({seen:,} in all) |
| optimizer | AdamW, learning rate {schedule.learning_rate:g}, cosine, seed {schedule.seed} |
| budget | less than 60 seconds on 2 cores |
| held-out loss | {trained.held_out_loss:.4f} nats per token |
| the same with token frequencies alone | {trained.unigram_loss:.4f} nats per token |
| precision | float32 |

Every document ends in `</s>`, which also ends an assistant turn of the chat template; `<s>` opens a text.
`<pad>` filled the rest of a row and was never an answer, so the model does not write it.

Licence: Apache-2.0, for the text, the tokenizer and the weights.
"""


def random_card(family: str) -> str:
    """The card of a tiny model whose weights are random."""
    return f"""{HEAD}
# tiny:{family}

A {family} model with **random weights** for tests: it has the module names of the real architecture and knows
nothing. Its tokenizer is learned from the text that peftcli ships.

Licence: Apache-2.0.
"""


def image_card(name: str) -> str:
    """The card of a tiny model of images whose weights are random."""
    return f"""{HEAD}
# {name}

A model of images with **random weights** for tests: it has the module names of the real architecture and knows
nothing. It reads images of 32 x 32 pixels.

Licence: Apache-2.0.
"""


def stand_in_card(model_type: str) -> str:
    """The card of a stand-in."""
    return f"""{HEAD}
# Stand-in for a {model_type} model

A tiny {model_type} model with **random weights**, built from a real config so that `peftcli train --smoke`
can walk the whole path without the real weights. It knows nothing; a figure measured on it tells nothing of
the real model.

Licence: Apache-2.0.
"""
