"""The dimensions of a base model from which memory and time are computed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and size.

    Attributes:
        name: path within a block, such as `self_attn.q_proj`.
        inputs, outputs: features.
        count: number of blocks that have one.
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
        """Total number of weights."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Norm:
    """Norms of one name.

    Attributes:
        width: features per token, all heads together.
        count: number of blocks that have one.
        in_float32: it computes in float32 on a copy, as RMS norms do; torch's LayerNorm does not copy.
        fusible: it computes the formula of torch's fused RMSNorm.
    """

    width: int
    count: int
    in_float32: bool
    fusible: bool = False


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture-of-experts model; all experts of a block are in one tensor.

    Attributes:
        parameters: of all experts of all blocks.
        per_token: number of experts that process a token.
        total: number of experts per block.
        mlp: intermediate size of one expert.
        layers: number of blocks with experts.
    """

    parameters: int
    per_token: int
    total: int
    mlp: int
    layers: int


@dataclass(frozen=True)
class ModelDimensions:
    """The dimensions of a base model.

    Attributes:
        hidden: width of the residual stream.
        layers: number of blocks.
        queries, keys: total width of the query heads and of the key heads.
        heads: number of query heads.
        mlp: intermediate size of the MLP, 0 if all blocks have experts.
        mlp_kept: tensors of that width saved for its backward pass, except the input of the last linear layer.
        mlp_layers: number of blocks with an MLP.
        vocabulary: rows of the output layer.
        parameters: of the whole model.
        linears: all linear layers of the blocks.
        norms: all norms of the blocks.
        final_norm: the norm after the last block.
        rotary: rotary position embeddings, so that rotated queries and keys are new tensors.
        fused_qkv: one linear layer computes queries, keys and values, so that a saved value keeps all three alive.
        parallel: attention and MLP read the same norm.
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
        """Weights that are quantized: those of the linear layers, but not embeddings, output layer and experts."""
        return sum(linear.weights for linear in self.linears)

    @property
    def active(self) -> int:
        """Weights in the blocks that a token is multiplied with."""
        if self.experts is None:
            return self.quantizable
        return self.quantizable + self.experts.parameters * self.experts.per_token // max(1, self.experts.total)

    @property
    def grouped(self) -> bool:
        """Grouped-query attention: several query heads share a key head."""
        return self.keys < self.queries
