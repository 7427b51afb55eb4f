"""Row format of images: a file and its class, from folders or from the columns of a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peftcli.data.class_labels import LabelColumn
from peftcli.data.examples import Maker
from peftcli.data.formats import Given, RowFormat
from peftcli.data.image_processor import pixel_hash, read_image
from peftcli.data.label_formats import LABEL_WORDS, check_named, choose_label, only_column
from peftcli.data.label_tokenize import TextClasses
from peftcli.data.rows import Rows
from peftcli.data.tokenize import FLAGS, TokenizedBatch
from peftcli.data.values import SkipRow, is_null
from peftcli.recipe.schema import SourceSection

IMAGES = ("image", "file", "file_name", "filename", "path", "image_path", "img")
NO_CLASS = "outside the class folders"
BELOW = "in a subfolder of a class folder"
NOTHING_IN = "with an empty class folder"


def choose_images(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """The format of rows with an image and its class.

    Args:
        first: the first rows of the source.
        section: the source in the recipe.
        given: what is known about the labels, and the base folder of relative image paths.

    Raises:
        DataError: a column is missing, or no format fits.
    """
    check_named(first, section)
    named = section.columns
    image = (named.image if named else None) or only_column(first, IMAGES, "image", "the image", ())
    problem_type = "single-label" if first.is_folder and given.rule.problem_type == "auto" else None
    column, names = choose_label(first, section, given, (image,), problem_type)
    said = f"the images in {image} with the {LABEL_WORDS[column.problem_type]} in {column.name}"
    return RowFormat(
        kind="images",
        name="images",
        said="images in one folder per class" if first.is_folder else said,
        columns=(column.name,),  # file names are not scanned for personal data: numbers in them are not phone numbers
        prompt=None,
        reads=(image, column.name),
        make=_from_files(given.folder or Path(), column, folders=first.is_folder),
        problem_type=column.problem_type,
        names=None if column.problem_type == "regression" else names,
    )


def _from_files(folder: Path, column: LabelColumn, *, folders: bool) -> Maker:
    """A maker of: path, name as given, hash of the pixels, label, and the hash again."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        name = file_name(values[0])
        if folders:
            _check_location(name)
        label = column.text(values[1])
        pixels = pixel_hash(read_image(folder / name))
        return str(folder / name), name, pixels, label, pixels

    return make


def file_name(value: Any) -> str:
    """The image of a cell.

    Raises:
        SkipRow: it is not the name of a file.
    """
    if is_null(value) or value == "":
        raise SkipRow("without an image name")
    if not isinstance(value, str):
        raise SkipRow("with an image that is not a file name")
    if "://" in value:
        raise SkipRow("with a URL instead of a file")
    if "\0" in value:
        raise SkipRow("with a NUL byte in the image name")
    return value


def _check_location(name: str) -> None:
    depth = name.rstrip("/").count("/") + name.endswith("/")
    if name.endswith("/"):
        raise SkipRow(NOTHING_IN)
    if depth != 1:
        raise SkipRow(NO_CLASS if depth == 0 else BELOW)


class ImageClasses(TextClasses):
    """Maps the classes of images to ids; each image counts as one token."""

    def batch(
        self, columns: Mapping[str, Sequence[str]], ends: Sequence[bool] | None, too_long: str | None
    ) -> TokenizedBatch:
        """One token for each image, and its label."""
        count = len(columns["image"])
        ones, none = np.ones(count, np.int64), np.zeros(count, bool)
        return TokenizedBatch(
            of=np.arange(count),
            flat=np.zeros(count, np.int32),
            loss_mask=none,
            lengths=ones,
            uncut=ones,
            trained=ones,
            flags=dict.fromkeys(FLAGS, none),
            dropped=[],
            classes=self._flat_labels([self._labels(label) for label in columns["label"]]),
        )
