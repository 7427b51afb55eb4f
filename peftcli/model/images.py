"""The image processor of a base model, which stands where a language model has its tokenizer."""

from transformers import AutoImageProcessor

from peftcli.data.image_processor import ImageReader, need_pillow
from peftcli.errors import MachineError
from peftcli.model.hub import explain_missing
from peftcli.plan.plan import TokenizerChoice


def load_image_reader(path: str, choice: TokenizerChoice, *, revision: str | None) -> ImageReader:
    """Load the image processor of a folder or a Hub id, as Pillow carries it out on every machine alike.

    Raises:
        MachineError: there is none, or Pillow is not installed.
    """
    need_pillow()
    try:
        processor = AutoImageProcessor.from_pretrained(
            path, revision=revision, trust_remote_code=choice.trust_remote_code, backend="pil"
        )
    except (OSError, ValueError, ImportError) as problem:
        if "preprocessor_config" not in str(problem) and not isinstance(problem, ImportError):
            raise MachineError(explain_missing(path, problem)) from problem
        raise MachineError(
            f"{path}: holds no image processor that can be used here (preprocessor_config.json): "
            f"{' '.join(str(problem).split())[:200]}; name a model with one"
        ) from problem
    return ImageReader(processor)
