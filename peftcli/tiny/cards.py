"""The model cards of the tiny models."""

HEAD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
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
