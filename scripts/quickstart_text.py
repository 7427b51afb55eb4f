"""Seeded sentence patterns: short everyday documents in which goods stand among their surroundings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("quickstart_words.yaml").read_text(encoding="utf-8"))
BRANDS, MARKS, LINES, PEOPLE, HELPERS, ANIMALS, WEATHER, TIMES, FEELINGS, ENDINGS = (
    WORDS[name].split(", ")
    for name in (
        "brands",
        "marks",
        "lines",
        "people",
        "helpers",
        "animals",
        "weather",
        "times",
        "feelings",
        "endings",
    )
)


@dataclass(frozen=True)
class Good:
    """One kind of thing that a shop sells, with the words that go with it."""

    department: str
    kind: str
    name: str
    looks: list[str]
    uses: list[str]
    varieties: list[str]
    places: list[str]
    near: list[str]

    @property
    def word(self) -> str:
        return self.name.lower()

    @property
    def some(self) -> str:
        """The noun with its article, as in "some milk", "a hammer"."""
        return f"a {self.word}" if self.kind == "a" else f"some {self.word}"

    @property
    def any_(self) -> str:
        """The noun as it stands in a general statement, as in "milk", "a hammer"."""
        return f"a {self.word}" if self.kind == "a" else self.word

    @property
    def sizes(self) -> list[str]:
        """Sizes that fit the noun."""
        return WORDS["sizes"][self.department].split("|")[self.kind != "s"].split(",")

    @property
    def be(self) -> str:
        return "are" if self.kind == "p" else "is"

    @property
    def was(self) -> str:
        return "were" if self.kind == "p" else "was"

    @property
    def it(self) -> str:
        return "them" if self.kind == "p" else "it"


def read_goods() -> list[Good]:
    """Parse the table of goods."""
    goods: list[Good] = []
    for line in WORDS["goods"].strip().splitlines():
        fields = [field.strip() for field in line.split("|")]
        if line.startswith("= "):
            department, places, near = fields[0][2:], fields[1].split(", "), fields[2].split(", ")
            continue
        kind, name = fields[0].split(" ", 1)
        looks, uses, varieties = (field.split(", ") for field in fields[1:])
        goods.append(Good(department, kind, name, looks, uses, varieties, places, near))
    return goods


def label(rng: Random, good: Good) -> str:
    """A printed name in title case, as on a jar or a receipt."""
    words = [rng.choice(MARKS)] if rng.random() < 0.4 else []
    variety = rng.choice(good.varieties)
    if rng.random() < 0.25:
        name = f"{' '.join([*words, good.name])}, {variety}"
    else:
        name = " ".join([*words, variety, good.name] if rng.random() < 0.7 else [*words, good.name])
    return f"{name}, {rng.choice(good.sizes)}" if rng.random() < 0.25 else name


def sentence(rng: Random, who: str, g: Good, h: Good) -> str:
    """One sentence about `g` with its neighbour `h` of the same surroundings."""
    place, near, look, use = rng.choice(g.places), rng.choice(g.near), rng.choice(g.looks), rng.choice(g.uses)
    first, second = rng.sample(g.looks, 2)
    helper, feeling = rng.choice(HELPERS), rng.choice(FEELINGS)
    patterns = [
        f"{who} found {g.some} {place}.",
        f"The {g.word} {g.was} {place}, with the {h.word}.",
        f"{who} took the {g.word} to {use}.",
        f"The {g.word} {g.was} {first} and {second}.",
        f'"We need {g.some}," said {helper}.',
        f'"Where {g.be} the {g.word}?" asked {who}. "{place[0].upper()}{place[1:]}," said {helper}.',
        f"You can {use}, or {rng.choice(g.uses)}.",
        f"{who} looked for the {near} and saw the {g.word}.",
        f"Next to the {near} {g.was} {g.some} and {h.some}.",
        f"{who} took the {look} {g.word} and put {g.it} {place}.",
        f"{helper[0].upper()}{helper[1:]} had bought the {g.word} and the {h.word} together.",
        f"There {g.was} no {g.word} left, so {who} was {feeling}.",
        f'On the label stood "{label(rng, g)}".',
        f"{who} showed {helper} how to {use}.",
        f"When you see a {near}, the {g.word} {g.be} never far away.",
        f"{who} did not forget the {g.word}, the {h.word} or the {near}.",
        f"Most people keep {g.any_} {place}.",
    ]
    return rng.choice(patterns)


def story(rng: Random, goods: list[Good]) -> str:
    """A day of two people among goods of one kind of place."""
    g = rng.choice(goods)
    kin = [good for good in goods if good.department == g.department]
    who, other = rng.sample(PEOPLE, 2)
    lines = [f"{rng.choice(WEATHER)}. {rng.choice(TIMES)} {who} and {other} {rng.choice(OPENINGS)}."]
    for _ in range(rng.randint(2, 5)):
        actor, subject = rng.choice([who, other]), rng.choice([g, g, rng.choice(kin)])
        lines.append(sentence(rng, actor, subject, rng.choice(kin)))
    if rng.random() < 0.5:
        lines.append(f"{rng.choice([who, other])} was {' and '.join(rng.sample(FEELINGS, 2))}.")
    lines.append(f"{rng.choice(ENDINGS)}.")
    return " ".join(lines)


OPENINGS = [
    "went to the shop at the corner",
    "helped in the house",
    "stayed at home",
    "walked to the market",
    "cleaned up the old house",
    "had a long list",
    "visited a friend by the river",
    "worked until the bell rang",
    "made plans for the week",
    "waited for the bus",
]


def portrait(rng: Random, goods: list[Good]) -> str:
    """Plain statements about one thing."""
    g = rng.choice(goods)
    h = rng.choice([good for good in goods if good.department == g.department and good is not g])
    lines = [f"{g.any_[0].upper()}{g.any_[1:]} {g.be} {g.looks[0]} and {g.looks[1]}."]
    lines.append(f"People keep {g.it} {rng.choice(g.places)}, near the {rng.choice(g.near)}.")
    lines.append(f"You can {rng.choice(g.uses)}.")
    if rng.random() < 0.6:
        lines.append(f"Where there {g.be} {g.some}, there {h.be} often {h.some} too.")
    if rng.random() < 0.5:
        lines.append(f"{rng.choice(PEOPLE)} likes {g.any_} that {g.be} {g.looks[2]}.")
    return " ".join(lines)


def errand(rng: Random, goods: list[Good]) -> str:
    """A written list in title case, then what happened to it."""
    g = rng.choice(goods)
    kin = [good for good in goods if good.department == g.department]
    chosen = rng.sample(kin, rng.randint(2, 4))
    names = [label(rng, good) for good in chosen]
    who = rng.choice(PEOPLE)
    starts = [
        f"The note of {who} said:",
        f"{who} paid for",
        f"In the bag of {who} {chosen[0].was}",
        f"{who} read aloud:",
    ]
    text = f"{rng.choice(starts)} {', '.join(names[:-1])} and {names[-1]}."
    return f"{text} {sentence(rng, who, chosen[0], chosen[1])} {sentence(rng, who, chosen[-1], chosen[0])}"


def shelf(rng: Random, goods: list[Good]) -> str:
    """Printed names that stand together in one place, with what is near them."""
    g = rng.choice(goods)
    kin = rng.sample([good for good in goods if good.department == g.department], rng.randint(2, 4))
    names = [label(rng, good) for good in kin]
    place, who = rng.choice(g.places), rng.choice(PEOPLE)
    patterns = [
        f"{names[0]} stood {place}, and so did {names[1]}.",
        f"{place[0].upper()}{place[1:]} {who} found {' and '.join(names[:2])}.",
        f"Near the {rng.choice(g.near)} lay {', then '.join(names)}.",
        f'"{names[0]}" was written on one box, "{names[-1]}" on the other. Both were {place}.',
        f"{who} carried {names[0]} past the {rng.choice(g.near)} and put {names[-1]} {place}.",
    ]
    chosen = rng.choice(kin)
    look = f"The {chosen.word} {chosen.was} {rng.choice(chosen.looks)}."
    return f"{rng.choice(patterns)} {look} {sentence(rng, who, kin[0], kin[1])}"


def animal(rng: Random, goods: list[Good]) -> str:
    """A small story about an animal."""
    beast, second = rng.sample(ANIMALS, 2)
    who, g = rng.choice(PEOPLE), rng.choice(goods)
    feel = rng.choice(FEELINGS)
    look = rng.choice(["small", "brown", "white", "old", "young", "clever", "lazy"])
    middles = [
        f"The {beast} smelled the {g.word} {rng.choice(g.places)}.",
        f"A {second} came and looked at the {beast}.",
        f"The {beast} ran after the {second} until both were tired.",
        f"{who} gave the {beast} water and a warm place to sleep.",
        f"One day the {beast} hid behind the {rng.choice(g.near)}.",
        f'"Come here," said {who}, and the {beast} came.',
        f"The {second} was not afraid of the {beast}.",
    ]
    body = " ".join(rng.sample(middles, rng.randint(2, 4)))
    return f"{who} had a {look} {beast}. {body} {who} was {feel}. {rng.choice(ENDINGS)}."


def lesson(rng: Random, goods: list[Good]) -> str:
    """A scene at school or about the weather, with few goods in it."""
    who, other = rng.sample(PEOPLE, 2)
    number, g = rng.randint(2, 12), rng.choice(goods)
    middles = [
        f"The teacher wrote the number {number} on the board.",
        f'"How many days has a week?" asked {who}. "Seven," said {other}.',
        f"{who} counted to {number + 5} and sat down.",
        f"They read a story about a {rng.choice(ANIMALS)} and a {rng.choice(ANIMALS)}.",
        f"{other} had {number} questions about the {rng.choice(g.near)}.",
        f"The children drew {g.some} and {rng.choice(g.near)}.",
        f"Outside the window {who} saw the rain.",
        "The bell rang at ten and everybody ran out.",
    ]
    body = " ".join(rng.sample(middles, rng.randint(3, 5)))
    opening = f"{rng.choice(TIMES)} the class was {rng.choice(FEELINGS)}. {rng.choice(WEATHER)}."
    return f"{opening} {body} {rng.choice(ENDINGS)}."


def document(rng: Random, goods: list[Good]) -> str:
    """One document of any kind; stories are the most frequent."""
    return rng.choice(DOCUMENTS)(rng, goods)


DOCUMENTS: list[Callable[[Random, list[Good]], str]] = [
    *(story, story, portrait, errand),
    *(shelf, shelf, animal, lesson),
]


def chat(rng: Random, goods: list[Good]) -> list[dict[str, str]]:
    """One short conversation; a third of them opens with a system turn."""
    g = rng.choice(goods)
    use, place, look = rng.choice(g.uses), rng.choice(g.places), rng.choice(g.looks)
    kin = rng.choice([good for good in goods if good.department == g.department and good is not g])
    pairs = [
        (f"Where do you keep {g.any_}?", f"I keep {g.it} {place}."),
        (f"What can I do with {g.any_}?", f"You can {use}."),
        (f"How {g.be} the {g.word}?", f"The {g.word} {g.be} {look}."),
        (f"What do you see near the {g.word}?", f"I see a {rng.choice(g.near)} and {kin.some}."),
        ("Tell me about the weather.", f"{rng.choice(WEATHER)}."),
        ("How do you feel?", f"I am {rng.choice(FEELINGS)}, thank you."),
    ]
    turns = rng.sample(pairs, rng.randint(1, 2))
    messages = []
    if rng.random() < 0.33:
        messages.append({"role": "system", "content": "You answer in short sentences."})
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
