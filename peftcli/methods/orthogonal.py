"""Methods that multiply a weight by an orthogonal matrix instead of adding to it."""

from peftcli.methods.base import CODES, SHAPE, Method

ORTHOGONAL = (
    Method(
        name="oft",
        title="OFT",
        what="each weight is multiplied by a block-diagonal orthogonal matrix",
        paper="Qiu et al. 2023, arXiv:2306.07280",
        config="OFTConfig",
        peft_module="oft",
        argument_names={"dropout": "module_dropout"},
        defaults={"dropout": 0.0},
        must_divide={"oft_block_size": 32},
    ),
    Method(
        name="boft",
        title="BOFT",
        what="orthogonal matrices built as products of sparse butterfly matrices",
        paper="Liu et al. 2023, arXiv:2311.06243",
        config="BOFTConfig",
        peft_module="boft",
        argument_names={"dropout": "boft_dropout"},
        defaults={"dropout": 0.0},
    ),
    Method(
        name="hra",
        title="HRA",
        what="a few learned Householder reflections are applied to each weight",
        paper="Yuan et al. 2024, arXiv:2405.17484",
        config="HRAConfig",
        peft_module="hra",
        argument_names={"r": "r"},
        defaults={"r": 8},
        four_bit=SHAPE,
        eight_bit=CODES,
    ),
    Method(
        name="road",
        title="RoAd",
        what="pairs of output features are rotated and scaled",
        paper="Liao and Monz 2024, arXiv:2409.00119",
        config="RoadConfig",
        peft_module="road",
        must_divide={"group_size": 64},
    ),
)
