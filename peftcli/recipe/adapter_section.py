"""The schema of the adapter section: keys that many methods share, and the arguments of the one at hand."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from peftcli.methods.base import CORE
from peftcli.methods.registry import METHODS
from peftcli.recipe.fields import freeze_mapping, freeze_names, read_method, read_trained_dtype
from peftcli.recipe.section import Section
from peftcli.recipe.select_section import SelectSection, read_layers, read_target_modules


class AdapterSection(Section):
    """What is trained.

    A key that the recipe leaves out has the method's own default; one that means nothing to the method is None.
    """

    method: Annotated[str, BeforeValidator(read_method)] = "lora"
    """A method of `peftcli methods`."""
    r: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rank of the update; of AdaLoRA the mean rank at the end."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Numerator of the update's scale: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the adapter's inputs that a training step sets to zero."""
    target_modules: Annotated[
        tuple[str, ...] | Literal["all-linear"] | SelectSection | None, BeforeValidator(read_target_modules)
    ] = None
    """Module names that get an adapter, every linear layer except the output, or those that the gradient chooses; the
    method's own choice when null."""
    layers: Annotated[tuple[int, ...] | SelectSection | None, BeforeValidator(read_layers)] = None
    """Numbers of the layers that get an adapter, or those that the gradient chooses; all when null."""
    use_rslora: bool = False
    """Scale by sqrt(r) in place of r."""
    use_dora: bool = False
    """Learn the magnitude of each weight column apart from its direction."""
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(freeze_names)] | None = None
    """Modules trained whole and stored with the adapter."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Run or adapter whose weights the training starts from; absolute once loaded."""
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(read_trained_dtype)] = "float32"
    """Format of the trained weights, their gradients and, with torch's optimizers, their state; `bfloat16` trains whole
    weights without a float32 copy, and loses updates that are small beside the weight."""
    bias: Literal["none"] = "none"
    """Bias vectors are not trained: with them, switching the adapter off would not give the base back."""
    arguments: Annotated[Mapping[str, Any], PlainValidator(freeze_mapping), PlainSerializer(dict)] = Field(
        default_factory=lambda: MappingProxyType({})
    )
    """Further arguments of the method, under PEFT's names; a recipe writes them beside the keys above."""

    @model_validator(mode="after")
    def _fill(self) -> Self:
        """Put the method's defaults where the recipe says nothing; they do not count as given."""
        row = METHODS[self.method]
        for key in CORE:
            if getattr(self, key) is None and key in row.core:
                self.__dict__[key] = row.defaults.get(key)
        if self.target_modules is None and row.targets == "linear":
            self.__dict__["target_modules"] = "all-linear"
        return self
