"""The rehearsal of a recipe: the same path from end to end, on a few rows for a few steps."""

from peftcli.recipe.schema import Recipe

STEPS = 6
DROPPED = ("num_train_epochs", "save_steps", "save_strategy", "eval_steps", "eval_strategy", "torch_compile")


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a smoke run: small in all that costs time, unchanged in all that decides the path.

    Method, quantization, templates, optimizer and scheduler stay. Gates go: the numbers of a random stand-in say
    nothing about the real model.
    """
    given = recipe.trainer
    trainer = {name: value for name, value in given.items() if name not in DROPPED}
    trainer |= {
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": min(int(given.get("per_device_train_batch_size", 8)), 4),
        "gradient_accumulation_steps": min(int(given.get("gradient_accumulation_steps", 1)), 2),
        "use_cpu": True,
    }
    longest = min(recipe.dataset.max_length, 512)
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-smoke",
            "output_dir": None if recipe.output_dir is None else f"{recipe.output_dir}-smoke",
            "model": recipe.model.model_copy(update={"dtype": "auto", "attention": "auto"}),
            "quantization": None
            if recipe.quantization is None
            else recipe.quantization.model_copy(update={"compute_dtype": "auto"}),
            "dataset": recipe.dataset.model_copy(update={"max_length": longest}),
            "trainer": trainer,
            "evaluation": recipe.evaluation.model_copy(update={"max_new_tokens": 8, "rows": 8}),
            "gates": (),
            "budget": type(recipe.budget)(),
            "report": type(recipe.report)(),
        }
    )
