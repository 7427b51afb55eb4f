"""Methods of the installed PEFT that are not offered, each with the reason."""

from collections.abc import Mapping

LEFT_OUT: Mapping[str, str] = {
    "POLY": "each row must say which task it belongs to, and a recipe has one task",
    "MULTITASK_PROMPT_TUNING": "each row must say which task it belongs to, and a recipe has one task",
    "CPT": "it needs a type for every token of the context, which a recipe does not give",
    "CARTRIDGE": "its start is the cache of a document, made outside of training",
    "ADAPTION_PROMPT": "it replaces the attention of the model, with which TRL's loss fails",
    "XLORA": "it mixes adapters that were trained before, and a recipe trains one",
    "SHADOW": "it trains a second, smaller network beside the model, with a loss of its own",
    "BEFT": "it trains the biases of layers, which most decoders do not have, and cannot be merged without them",
    "ADAMSS": "it decomposes and clusters every weight to be built, a quarter of a minute for each block of a 7B model",
    "FROD": "it decomposes all weights together to be built, more than four minutes for one block of a 7B model",
    "OSF": "it trains half of the directions of every weight, so its adapter is half as large as the model",
}
