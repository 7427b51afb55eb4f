"""Recipe files that are hostile, torn or merely odd: numbers 2 to 6 and 24 of the matrix."""

from inputs import VALIDATE, Edit
from table import Case, Prepare
from workspace import Workspace


def make_long(ground: Workspace) -> None:
    """Lengthen the recipe to 100 MB, which this process should not hold itself: a child begins as its copy."""
    with (ground.folder / "recipe.yaml").open("ab") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(f"k{i}: [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n" for i in range(9))


class Whole:
    """Replaces a text as a whole."""

    def __init__(self, text: str | bytes) -> None:
        self._text = text

    def __call__(self, text: str) -> str | bytes:
        return self._text


def hostile(number: str, fault: str, text: str | bytes, says: str, prepare: Prepare | None = None) -> Case:
    """A recipe file that must be refused at once, whatever it holds; each of its faults may have a line."""
    return Case(
        number,
        fault,
        2,
        edit=Whole(text),
        words=VALIDATE,
        says=(says,),
        most_cpu_seconds=1.0,
        most_mib=200,
        most_lines=30,
        repeats=3,
        prepare=prepare,
    )


CASES = [
    Case(
        "2",
        "seven faults told at once, each with its line",
        2,
        {
            "adapter.r": 0,
            "adapter.alpha": float("inf"),
            "trainer.max_steps": -3,
            "trainer.weight_decay": "much",
            "dataset.max_length": True,
            "seed": -1,
            "evaluation.top_p": 2,
        },
        words=VALIDATE,
        says=("has 7 problems",),
        most_lines=8,
        most_cpu_seconds=0.5,
        repeats=3,
    ),
    Case(
        "3",
        "eval_strategy: no and 5e-3 mean what they say",
        0,
        edit=Edit("trainer:", "trainer:\n  eval_strategy: no\n  save_strategy: no"),
        words=VALIDATE,
        most_cpu_seconds=0.5,
        repeats=3,
        peer={"eval_strategy": False, "save_strategy": False},
    ),
    Case(
        "3",
        "r: 010 is read as ten, and noted",
        0,
        edit=Edit("r: 8", "r: 010"),
        words=VALIDATE,
        says=("010 means 10",),
    ),
    hostile("4", "two documents", "model: {name: a}\n---\nmodel: {name: b}\n", "recipe.yaml:"),
    hostile("4", "a list at the top", "- model: a\n", "recipe.yaml:"),
    hostile("4", "an empty recipe", "", "recipe.yaml"),
    hostile("4", "UTF-16", "model: {name: a}\n".encode("utf-16"), "UTF-16"),
    hostile("5", "alias bomb", BOMB, "recipe.yaml:"),
    hostile("5", "a cycle", "a: &a [*a]\n", "recipe.yaml:"),
    hostile("5", "3,000 nested lists", "a: " + "[" * 3000 + "]" * 3000, "recipe.yaml"),
    hostile("5", "a recipe of 100 MB", "a: ", "MB", make_long),
    hostile("6", "a Python tag", "a: !!python/object/apply:os.system ['touch marker']\n", "recipe.yaml:1"),
    Case("6", "an environment variable stays text", 4, {"model.name": "${HOME}/m"}, says=("model.name ${HOME}/m",)),
    hostile("24", "a name that climbs", "name: ../../etc\nmodel: {name: a}\ndataset: {path: b}\n", "name"),
]
