"""Images to labels: the class of each with its probability."""

from collections.abc import Sequence
from pathlib import Path

from peftcli.data.image_processor import read_image
from peftcli.data.values import Unused
from peftcli.errors import DataError
from peftcli.model.label import head_of
from peftcli.model.label_rows import row_logits
from peftcli.model.label_texts import Labelled, labelled
from peftcli.model.target import Target
from peftcli.progress import Progress


def label_images(target: Target, paths: Sequence[str], *, batch_rows: int, progress: Progress) -> list[Labelled]:
    """Label image files.

    Args:
        target: a model with a head for images.
        paths: as they were given, relative to the working directory.

    Raises:
        DataError: one of them cannot be read; nothing is labelled then.
    """
    for path in paths:
        try:
            read_image(Path(path))
        except Unused as reason:
            raise DataError(f"{path}: {str(reason).removeprefix('with ')}; name image files") from reason
    model, reader = target.load()
    head = head_of(target.base.labels, target.base.problem, model, reader)
    logits = row_logits(model, list(paths), None, head, batch_rows=batch_rows, progress=progress, what="labels")
    return [labelled(head, *row) for row in zip(paths, logits, strict=True)]
