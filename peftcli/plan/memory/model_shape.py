"""The dimensions of a base model that memory and time are computed from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and size.

    Attributes:
        name: path within a block, such as `self_attn.q_proj`.
        inputs, outputs: features.
        count: how many blocks have one.
    """

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Norm:
    """Norms of one name.

    Attributes:
        width: features of a token that go through it, those of all heads together.
        count: how many blocks have one.
        in_float32: it computes in float32 on a copy, as RMS norms do; torch's LayerNorm computes in place.
        fusible: it computes what torch's fused RMSNorm does.
    """

    width: int
    count: int
    in_float32: bool
    fusible: bool = False


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture; their weights stand in one tensor for all experts of a block.

    Attributes:
        parameters: of all experts of all blocks.
        per_token: how many experts see a token.
        total: experts of one block.
        mlp: inner width of one expert.
        layers: blocks that have experts.
    """

    parameters: int
    per_token: int
    total: int
    mlp: int
    layers: int


@dataclass(frozen=True)
class ModelDimensions:
    """The widths of a base model.

    Attributes:
        hidden: width of the stream between the blocks.
        layers: number of blocks.
        queries, keys: width of all query heads and of all key heads.
        heads: number of query heads.
        mlp: inner width of the feed-forward part, 0 where all blocks have experts.
        mlp_kept: tensors of that width that its backward pass needs, the input of the last linear layer aside.
        mlp_layers: blocks that have one.
        vocabulary: rows of the output layer.
        parameters: of the whole model.
        linears: all linear layers of the blocks.
        norms: all norms of the blocks.
        final_norm: the norm after the last block.
        rotary: positions are turned into the queries and keys, so that these are new tensors.
        fused_qkv: one linear layer makes queries, keys and values, so that a kept value keeps all three.
        parallel: attention and feed-forward part read the same norm.
        experts: None for a dense model.
    """

    hidden: int
    layers: int
    queries: int
    keys: int
    heads: int
    mlp: int
    mlp_kept: int
    mlp_layers: int
    vocabulary: int
    parameters: int
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    final_norm: Norm
    rotary: bool = True
    fused_qkv: bool = False
    parallel: bool = False
    experts: Experts | None = None

    @property
    def quantizable(self) -> int:
        """Weights that quantized storage covers: those of the linear layers, not of embeddings, output and experts."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with in the blocks."""
        if self.experts is None:
            return self.quantizable
        return self.quantizable + self.experts.parameters * self.experts.per_token // max(1, self.experts.total)

    @property
    def grouped(self) -> bool:
        """Several query heads share a key head."""
        return self.keys < self.queries
