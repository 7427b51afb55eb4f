"""The PEFT methods: from the adapter section of a recipe to a PEFT configuration."""

from peft import LoraConfig, PeftConfig, TaskType

from peftcli.recipe.schema import AdapterSection

TASK_TYPES = {"causal-lm": TaskType.CAUSAL_LM}


def peft_config(adapter: AdapterSection, task: str) -> PeftConfig:
    """The PEFT configuration of an adapter section."""
    targets = adapter.target_modules
    return LoraConfig(
        task_type=TASK_TYPES[task],
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=None if adapter.modules_to_save is None else list(adapter.modules_to_save),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        bias=adapter.bias,
    )
