"""Decodes untrusted image files to RGB pixels, or rejects them with a reason; takes the role of a tokenizer."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.data.values import SkipRow
from peftcli.errors import MachineError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Formats that Pillow may read; other decoders, such as those that start a program, are not used."""
MOST_PIXELS = 2**26
"""Larger images are not decoded: a few bytes can decompress to gigabytes."""
NO_IMAGE = "with a file that is not an image (JPEG, PNG, WebP, BMP and GIF are supported)"
MISSING = "with a missing image"
EMPTY = "with an empty file"
HUGE = f"with an image of more than {MOST_PIXELS:,} pixels"
DAMAGED = "with a damaged or truncated image"


def read_image(path: Path) -> "Image":
    """The first frame of an image file in RGB, rotated according to its EXIF orientation.

    Raises:
        SkipRow: the image does not exist or cannot be decoded completely.
        MachineError: Pillow is not installed.
    """
    need_pillow()
    from PIL import UnidentifiedImageError
    from PIL.Image import open as open_image

    if not path.is_file():
        raise SkipRow(MISSING)
    try:
        if not path.stat().st_size:
            raise SkipRow(EMPTY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about metadata, and about sizes, which are checked here
            with open_image(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise SkipRow(HUGE)
                image.load()
                return _upright_rgb(image)
    except SkipRow:
        raise
    except UnidentifiedImageError as problem:
        raise SkipRow(NO_IMAGE) from problem
    except Exception as problem:  # decoders can raise anything for malformed files
        raise SkipRow(HUGE if "bomb" in type(problem).__name__.lower() else DAMAGED) from problem


def _upright_rgb(image: "Image") -> "Image":
    from PIL import Image as images
    from PIL import ImageOps

    if image.mode.startswith("I;16"):  # a plain conversion to RGB would only keep the lowest bits
        import numpy as np

        image = images.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    upright = ImageOps.exif_transpose(image) or image
    return upright.convert("RGBA").convert("RGB") if upright.mode == "P" else upright.convert("RGB")


def pixel_hash(image: "Image") -> str:
    """Hexadecimal hash of the size and the pixels of an image, independent of the file format."""
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode() + image.tobytes())
    return digest.hexdigest()[:32]


def need_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        MachineError: it is not, with the command that installs it.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as problem:
        raise MachineError("model.task: image-classification needs Pillow; pip install 'peftcli[image]'") from problem


class ImageProcessor:
    """The image processor of a base model, with the interface of a tokenizer.

    It has the tokenizer attributes that tasks with labels use; each image counts as one token with id 0.

    Attributes:
        processor: from transformers; resizes, crops and normalizes an image as in pretraining.
    """

    chat_template = bos_token = eos_token = unk_token = unk_token_id = sep_token_id = None
    all_special_tokens: Sequence[str] = ()
    pad_token_id = 0
    model_max_length = 1
    model_input_names: Sequence[str] = ("pixel_values",)

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def pixels(self, paths: Sequence[str]) -> "Tensor":
        """(B, 3, H, W) float32, the images of some files, in order.

        Raises:
            SkipRow: an image can no longer be read.
        """
        made: Tensor = self.processor(images=[read_image(Path(path)) for path in paths], return_tensors="pt")[
            "pixel_values"
        ]
        return made

    def fingerprint(self) -> str:
        """SHA-256 over all settings that affect the pixel values."""
        settings = {name: value for name, value in self.processor.to_dict().items() if not name.startswith("_")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def get_vocab(self) -> dict[str, int]:
        """Empty: there is no embedding."""
        return {}

    def save_pretrained(self, folder: str) -> None:
        """Write `preprocessor_config.json`."""
        self.processor.save_pretrained(folder)
