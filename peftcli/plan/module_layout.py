"""Finds blocks, attention and MLP modules by the structure of a model, not by the names of its family."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCK = re.compile(r"^(?P<stack>.*?\.)(?P<number>\d+)\.(?P<inside>.+)$")
ATTENTION = re.compile(r"(^|\.)(self_|cross_?)?att(n|ention)\b|_attn\b|_attention\b|[a-z]Attention\b")
PLACEMENTS = ("houlsby", "pfeiffer")


@dataclass(frozen=True)
class ModelLayout:
    """The modules of a model that own parameters, in order, grouped by position.

    Attributes:
        embedding, output: names of the first and last layers; None if there is none.
        before: other modules before the first block, such as position embeddings.
        blocks: the modules of each block.
        after: modules after the last block, except the output layer.
    """

    embedding: str | None
    output: str | None
    before: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, ...]:
        return tuple(name for name in (self.embedding, self.output) if name is not None)


def block_number(name: str) -> int | None:
    """Number of the block that contains a module; None outside of all blocks.

    >>> block_number("model.layers.11.mlp.down_proj"), block_number("model.norm")
    (11, None)
    """
    found = BLOCK.match(name)
    return None if found is None else int(found["number"])


def layout_of(owners: Sequence[str], embedding: str | None, output: str | None) -> ModelLayout:
    """Group the modules of a model by position.

    Args:
        owners: names of the modules that own parameters, in the order of the model.
        embedding, output: names of the first and last layers.

    Raises:
        ValueError: one of them contains another one, so it cannot be copied separately.
    """
    known = set(owners)
    for name in owners:
        above = name
        while above := above.rpartition(".")[0]:
            if above in known:
                raise ValueError(f"{above} owns parameters besides those of {name}, so it cannot be one trained module")
    stack = _stack(owners)
    blocks: dict[int, list[str]] = {}
    before: list[str] = []
    after: list[str] = []
    for name in owners:
        found = BLOCK.match(name)
        if found is not None and found["stack"] == stack:
            blocks.setdefault(int(found["number"]), []).append(name)
        elif name not in (embedding, output):
            # OPT registers its last norm before its blocks.
            late = blocks or "final" in name.rsplit(".", 1)[-1]
            (after if late else before).append(name)
    return ModelLayout(
        embedding, output, tuple(before), tuple(tuple(blocks[one]) for one in sorted(blocks)), tuple(after)
    )


def full_targets(
    parts: ModelLayout,
    *,
    last_layers: int,
    layers: Sequence[int] | None,
    head: bool,
    embeddings: bool,
    everything: bool,
) -> list[str]:
    """Names of the modules that are fully trained, in the order of the model.

    Args:
        last_layers: number of blocks, counted from the output.
        layers: block numbers, instead of `last_layers`.
        head: the modules after the last block.
        embeddings: the modules before the first block.
        everything: all modules.

    Raises:
        ValueError: the model has fewer blocks.
    """
    count = len(parts.blocks)
    if last_layers > count:
        raise ValueError(f"last_layers {last_layers}: this model has {count} blocks; set at most {count}")
    refuse_unknown_layers(layers or (), count)
    numbers = range(count - last_layers, count) if layers is None else sorted(layers)
    if everything:
        numbers, head, embeddings = range(count), True, True
    first, last = ([name] if name is not None else [] for name in (parts.embedding, parts.output))
    wanted = [*first, *parts.before] if embeddings else []
    wanted += [name for number in numbers for name in parts.blocks[number]]
    return wanted + ([*parts.after, *last] if head else [])


def bottleneck_targets(
    linears: Mapping[str, tuple[int, int]], hidden: int, placement: str, layers: Sequence[int] | None = None
) -> list[str]:
    """Names of the layers after which a bottleneck is added: those that write into the residual stream.

    Args:
        linears: inputs and outputs of all linear layers, in the order of the model.
        hidden: width of the residual stream.
        placement: `houlsby` (after attention and MLP of each block) or `pfeiffer` (only after the MLP).
        layers: block numbers; None for all.

    Raises:
        ValueError: the last layer of a block's attention or MLP cannot be identified, or a block does not exist.

    Source: Houlsby et al. 2019, arXiv:1902.00751, figure 2; Pfeiffer et al. 2021, arXiv:2005.00247, figure 3.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement {placement}: must be {' or '.join(PLACEMENTS)}")
    targets: list[str] = []
    for block, names in _by_block(linears, layers).items():
        writers = [name for name in names if linears[name][1] == hidden]
        attention = [name for name in writers if ATTENTION.search(name.removeprefix(block))]
        feed = [name for name in writers if name not in attention and linears[name][0] != hidden]
        if not feed or (placement == "houlsby" and not attention):
            what = "feed-forward" if not feed else "attention"
            raise ValueError(
                f"the {what} part of {block}* has no linear layer with {hidden} outputs, so no bottleneck adapter can "
                "be added there; list the layers in adapter.target_modules"
            )
        # The output projection is registered last in both parts, whatever its name.
        targets += ([attention[-1]] if placement == "houlsby" else []) + [feed[-1]]
    if not targets:
        raise ValueError("this model has no blocks of linear layers to add a bottleneck adapter to; use another method")
    return targets


def refuse_unknown_layers(layers: Sequence[int], count: int) -> None:
    """Refuse block numbers that do not exist.

    Raises:
        ValueError: one does not exist.
    """
    unknown = [number for number in layers if not 0 <= number < count]
    if unknown:
        raise ValueError(f"layers {unknown}: this model has {count} blocks, numbered 0 to {count - 1}")


def within(name: str, above: str) -> bool:
    """Whether a module is another one or is inside it."""
    return name == above or name.startswith(f"{above}.")


def _by_block(linears: Mapping[str, tuple[int, int]], layers: Sequence[int] | None) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    numbers = set()
    for name in linears:
        found = BLOCK.match(name)
        if found is None or ".experts." in name:
            continue
        numbers.add(int(found["number"]))
        if layers is None or int(found["number"]) in layers:
            blocks.setdefault(f"{found['stack']}{found['number']}.", []).append(name)
    refuse_unknown_layers(layers or (), len(numbers))
    return blocks


def _stack(owners: Sequence[str]) -> str | None:
    """The name prefix of the blocks: of the stack with the most modules, if there are several."""
    counts: dict[str, int] = {}
    for name in owners:
        found = BLOCK.match(name)
        if found is not None:
            counts[found["stack"]] = counts.get(found["stack"], 0) + 1
    return max(counts, key=lambda stack: counts[stack]) if counts else None
