"""Options of LoRA that its papers count as methods of their own, each a key or two beside `method: lora`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A way to begin, to scale or to train LoRA.

    Attributes:
        name: as people call it.
        keys: what a recipe writes.
        what: one line, what it changes.
        paper: authors, year and where it is found.
        needs: what the recipe must have beside it, empty for nothing.
    """

    name: str
    keys: str
    what: str
    paper: str
    needs: str = ""


OPTIONS = (
    Option(
        "rsLoRA",
        "use_rslora: true",
        "the update is scaled by alpha / sqrt(r)",
        "Kalajdzievski 2023, arXiv:2312.03732",
    ),
    Option(
        "DoRA",
        "use_dora: true",
        "the magnitude of each column is learned apart from its direction",
        "Liu et al. 2024, arXiv:2402.09353",
    ),
    Option(
        "LoRA+",
        "loraplus_lr_ratio: 16",
        "the second matrix learns faster than the first by this factor",
        "Hayou et al. 2024, arXiv:2402.12354",
    ),
    Option(
        "PiSSA",
        "init_lora_weights: pissa",
        "begins as the principal part of each weight",
        "Meng et al. 2024, arXiv:2404.02948",
    ),
    Option(
        "OLoRA",
        "init_lora_weights: olora",
        "begins as the QR decomposition of each weight",
        "Büyükakyüz 2024, arXiv:2406.01775",
    ),
    Option(
        "LoftQ",
        "init_lora_weights: loftq",
        "begins as what quantization loses of each weight",
        "Li et al. 2023, arXiv:2310.08659",
        "quantization",
    ),
    Option(
        "LoRA-GA",
        "init_lora_weights: lora_ga",
        "begins along the gradient of training rows, so that its first step is like that of full tuning",
        "Wang et al. 2024, arXiv:2407.05000",
    ),
    Option(
        "EVA",
        "init_lora_weights: eva",
        "begins as the principal directions of each layer's inputs, with more rank where they explain more",
        "Paischer et al. 2024, arXiv:2410.07170",
    ),
)
