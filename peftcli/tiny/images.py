"""Tiny image models with their image processors: random ones named `tiny:...`, and stand-ins for real ones."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from peftcli.cache import built_once, cache_root
from peftcli.errors import MachineError
from peftcli.tiny.save import content_hash, image_card, isolated, shape_of, stand_in_card, write_model
from peftcli.tiny.shrink import SIZES

# Increase it with every change in this file that changes the written files.
VERSION = 2
SIDE, PATCH, FIRST_WIDTH = 32, 8, 16
"""Image size in pixels, patch size in pixels, and channels of the first stage."""
RANDOM = ("vit", "resnet")
NAMES = tuple(f"tiny:{family}" for family in RANDOM)


def is_of_images(config: PreTrainedConfig) -> bool:
    """Whether transformers has an image classification model of this type."""
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def tiny_image_model(name: str, cache: Path | None = None) -> Path:
    """The folder of a random image model.

    Args:
        name: one of `NAMES`.
    """
    family = name.removeprefix("tiny:")
    config = shrink_images(AutoConfig.for_model(family))
    return _folder(f"tiny-{family}", config, image_card(name), cache_root(cache))


def image_stand_in(config: PreTrainedConfig, cache: Path | None = None) -> Path:
    """The folder of a tiny random model with the architecture of a real one.

    Raises:
        MachineError: no small model of this type can be built.
    """
    if not is_of_images(config):
        raise MachineError(
            f"no image stand-in can be built for the model type {config.model_type!r}: transformers has no image "
            "classification model of this type; use a model of another type"
        )
    try:
        return _folder(
            f"stand-in-{config.model_type}", shrink_images(config), stand_in_card(config.model_type), cache_root(cache)
        )
    except (ValueError, RuntimeError, TypeError, AssertionError) as problem:
        raise MachineError(
            f"no small model of type {config.model_type!r} can be built ({' '.join(str(problem).split())[:120]}); run "
            "without --smoke, or use a model of another type"
        ) from problem


def shrink_images(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small copy of a config: images of 32 pixels, and two layers or one layer per stage."""
    small = deepcopy(config)
    stages = len(getattr(small, "depths", None) or ())
    sizes: dict[str, Any] = {"image_size": SIDE, "patch_size": PATCH}
    sizes |= {"depths": [1] * stages, "hidden_sizes": [FIRST_WIDTH * 2 ** min(one, 2) for one in range(stages)]}
    sizes |= {"embedding_size": FIRST_WIDTH} if stages else SIZES
    if stages:
        del sizes["patch_size"]
    for key, size in sizes.items():
        if isinstance(getattr(small, key, None), (list, tuple) if isinstance(size, list) else int):
            setattr(small, key, size)
    small.dtype = "float32"
    return small


def _folder(name: str, config: PreTrainedConfig, card: str, root: Path) -> Path:
    convolutions = bool(getattr(config, "depths", None))
    processor = (
        ConvNextImageProcessorPil(size={"shortest_edge": SIDE})
        if convolutions
        else ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    )

    def build(folder: Path) -> None:
        with isolated(seed=0):
            model = AutoModelForImageClassification.from_config(config)
        write_model(folder, model.eval(), processor, card)

    return built_once(root, f"{name}-{content_hash(VERSION, shape_of(config))}", build)
