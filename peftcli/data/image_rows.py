"""How rows with images are read: a file and its class, from folders or from the columns of a table."""

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
NO_CLASS = "beside the folders of the classes"
BELOW = "in a folder below that of a class"
NOTHING_IN = "with no image in the folder of a class"


def choose_images(first: Rows, section: SourceSection, given: Given) -> RowFormat:
    """The reading of rows that name an image and its class.

    Args:
        first: the first rows of the source.
        section: the source in the recipe.
        given: what is known of the labels, and the folder that the names of the images are relative to.

    Raises:
        DataError: a column is missing, or the columns fit no reading.
    """
    check_named(first, section)
    named = section.columns
    image = (named.image if named else None) or only_column(first, IMAGES, "image", "the image", ())
    asked = "single-label" if first.is_folder and given.rule.problem_type == "auto" else None
    column, names = choose_label(first, section, given, (image,), asked)
    said = f"the images of {image} with the {LABEL_WORDS[column.problem_type]} in {column.name}"
    return RowFormat(
        kind="images",
        name="images",
        said="images, each in the folder of its class" if first.is_folder else said,
        columns=(column.name,),  # a number in the name of a file is nobody's telephone
        prompt=None,
        reads=(image, column.name),
        make=_from_files(given.folder or Path(), column, folders=first.is_folder),
        problem_type=column.problem_type,
        names=None if column.problem_type == "regression" else names,
    )


def _from_files(folder: Path, column: LabelColumn, *, folders: bool) -> Maker:
    """A maker of: path, name as it was given, digest of the pixels, label, and the digest again."""

    def make(values: tuple[Any, ...]) -> tuple[str, ...]:
        name = _file_name(values[0])
        if folders:
            _check_place(name)
        label = column.text(values[1])
        pixels = pixel_hash(read_image(folder / name))
        return str(folder / name), name, pixels, label, pixels

    return make


def _file_name(value: Any) -> str:
    if is_null(value) or value == "":
        raise SkipRow("with no image named")
    if not isinstance(value, str):
        raise SkipRow("with an image that is not the name of a file")
    if "://" in value:
        raise SkipRow("with an address in place of a file")
    if "\0" in value:
        raise SkipRow("with a zero byte in the name of its image")
    return value


def _check_place(name: str) -> None:
    depth = name.rstrip("/").count("/") + name.endswith("/")
    if name.endswith("/"):
        raise SkipRow(NOTHING_IN)
    if depth != 1:
        raise SkipRow(NO_CLASS if depth == 0 else BELOW)


class ImageClasses(TextClasses):
    """Numbers the classes of images, each of which counts as one token."""

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
