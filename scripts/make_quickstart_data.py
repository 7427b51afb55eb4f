"""Write the text, the chats and the product list that the package ships, from a seed and hand-written words.

Run `python scripts/make_quickstart_data.py`; the bytes are the same every time. `--check` only compares.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from random import Random

from quickstart_text import BRANDS, LINES, MARKS, Good, chat, document, label, read_goods

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "peftcli" / "assets"
DATA = ROOT / "recipes" / "data"
SEED = 20
CORPUS_BYTES = 300_000
CHATS = 300
RECIPE_CHATS = 160
RECIPE_TEXTS = 200
RECIPE_TEXT_LETTERS = 120
PRODUCTS_PER_GOOD = (6, 10)


def make_corpus(goods: list[Good]) -> str:
    """Documents of one line each, no two the same."""
    rng = Random(SEED)
    seen: dict[str, None] = {}
    size = 0
    while size < CORPUS_BYTES:
        text = document(rng, goods)
        if text not in seen:
            seen[text] = None
            size += len(text.encode()) + 1
    return "\n".join(seen) + "\n"


def make_chats(goods: list[Good]) -> str:
    """Conversations as JSON lines with a `messages` key."""
    rng = Random(SEED + 1)
    rows = (json.dumps({"messages": chat(rng, goods)}, ensure_ascii=False) for _ in range(CHATS))
    return "\n".join(dict.fromkeys(rows)) + "\n"


def product_name(rng: Random, good: Good) -> str:
    """One invented product: the noun phrase decides the department, the words around it do not."""
    brand, mark, variety = rng.choice(BRANDS), rng.choice(MARKS), rng.choice(good.varieties)
    size = rng.choice(good.sizes)
    patterns = [
        f"{variety} {good.name}",
        f"{mark} {variety} {good.name}",
        f"{brand} {variety} {good.name}",
        f"{brand} {mark} {good.name}",
        f"{mark} {variety} {good.name}, {size}",
        f"{brand} {good.name}, {variety}",
        f"{good.name}, {mark} {variety}, {size}",
        f'"{rng.choice(LINES)}" {variety} {good.name}',
        f"{brand} {variety} {good.name}, {size}",
        label(rng, good),
    ]
    return rng.choice(patterns)


def make_products(goods: list[Good]) -> tuple[str, str]:
    """The two tables, joined by `department_id`; rows are shuffled, names are unique."""
    rng = Random(SEED + 2)
    departments = sorted({good.department for good in goods})
    number = {name: position for position, name in enumerate(departments, start=1)}
    rows: dict[str, int] = {}
    for good in goods:
        wanted = len(rows) + rng.randint(*PRODUCTS_PER_GOOD)
        while len(rows) < wanted:
            rows.setdefault(product_name(rng, good), number[good.department])
    shuffled = rng.sample(sorted(rows.items()), len(rows))
    products = [("product_id", "product_name", "department_id")]
    products += [(str(i), name, str(identity)) for i, (name, identity) in enumerate(shuffled, start=1)]
    names = [("department_id", "department"), *((str(i), name) for name, i in number.items())]
    return to_csv(products), to_csv(names)


def to_csv(rows: list[tuple[str, ...]]) -> str:
    """RFC 4180 text with `\\n` line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def make_files() -> dict[Path, str]:
    """Every shipped file with its text."""
    goods = read_goods()
    products, departments = make_products(goods)
    corpus, chats = make_corpus(goods), make_chats(goods)
    longer = [line for line in corpus.splitlines() if len(line) > RECIPE_TEXT_LETTERS][:RECIPE_TEXTS]
    texts = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in longer)
    return {
        ASSETS / "corpus.txt": corpus,
        ASSETS / "chats.jsonl": chats,
        DATA / "products.csv": products,
        DATA / "departments.csv": departments,
        DATA / "chats.jsonl": "".join(chats.splitlines(keepends=True)[:RECIPE_CHATS]),
        DATA / "stories.jsonl": texts,
    }


def main() -> int:
    """Write the files, or with `--check` name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    check = parser.parse_args().check
    files = make_files()
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]
    if not check:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    for path in stale:
        sys.stdout.write(f"{'differs' if check else 'written'}: {path.name}\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
