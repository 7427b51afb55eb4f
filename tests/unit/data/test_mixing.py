"""Several sources by shares: how many rows of each are used, and what is said of them."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftcli.data.prepare import PreparedData, prepare
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Silent
from peftcli.recipe.schema import DatasetSection

RULE = LossMask(completion_only=True, assistant_only=True, asked=(), max_length=64)
Prepare = Callable[..., PreparedData]


@pytest.fixture
def mixed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A function from the numbers of rows of two sources and the keys of each to the data."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def make(rows: tuple[int, int], *keys: dict[str, Any], **dataset: Any) -> PreparedData:
        sources = [{"path": write(tmp_path, name, count)} for name, count in zip("ab", rows, strict=True)]
        sections = [source | own for source, own in zip(sources, keys, strict=True)]
        section = DatasetSection.model_validate({"sources": sections, "split": {"test_size": 10, "seed": 1}} | dataset)
        return prepare(section, tokenizer, RULE, 0, Silent())

    return make


def write(folder: Path, name: str, count: int) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{name} {at} {at * 7919}"}) + "\n" for at in range(count)))
    return str(path)


def used(data: PreparedData) -> Counter[str]:
    texts = data.train.store.examples.column("text")
    return Counter(texts[int(row)].as_py() for row in data.train.rows)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.1])
def test_without_repeats_the_rows_have_the_shares_until_a_source_is_used_up(mixed: Prepare, share: float) -> None:
    data = mixed((120, 60), {"share": share}, {"share": 1 - share})
    rows = used(data)
    of_a = sum(count for text, count in rows.items() if text.startswith("a"))
    assert set(rows.values()) == {1}
    assert abs(of_a - share * len(data.train.rows)) <= 1  # each count is rounded
    left = [one["train_rows"] - one["mixed_rows"] for one in data.facts["sources"]]
    assert min(left) == 0 and sum(one["train_rows"] for one in data.facts["sources"]) == 170


def test_with_all_rows_the_smaller_source_is_repeated(mixed: Prepare) -> None:
    data = mixed((120, 60), {"share": 0.5}, {"share": 0.5}, stopping_strategy="all_exhausted")
    rows, facts = used(data), data.facts["sources"]
    assert len(rows) == 170 and len(data.train.rows) == sum(one["mixed_rows"] for one in facts)
    assert facts[0]["mixed_rows"] == facts[0]["train_rows"] == facts[1]["mixed_rows"] > facts[1]["train_rows"]
    assert max(rows.values()) - min(count for text, count in rows.items() if text.startswith("b")) <= 1


def test_weights_are_counted_after_mixing(mixed: Prepare) -> None:
    data = mixed((120, 60), {"weight": 0.5}, {"weight": 2})
    facts = data.facts["sources"]
    assert facts[0]["mixed_rows"] == round(0.5 * facts[0]["train_rows"])
    assert facts[1]["mixed_rows"] == 2 * facts[1]["train_rows"]


def test_a_share_that_repeats_rows_too_often_names_the_key(mixed: Prepare) -> None:
    with pytest.raises(
        DataError, match=r"would repeat each row .* times per epoch.*stopping_strategy: first_exhausted"
    ):
        mixed((400, 12), {"share": 0.1}, {"share": 0.9}, stopping_strategy="all_exhausted")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"share": 0.5}, {"share": 0.4}], "the shares of dataset.sources add up to 0.9; change them"),
        ([{"share": 0.5}, {}], "dataset.sources[1] has no share, but other sources have one; add it"),
        ([{"share": 0.5, "weight": 2}, {"share": 0.5}], "rows are used by shares or by weights; keep one"),
        ([{"interleave_probs": 0.5}, {}], "did you mean dataset.sources.share?"),
        ([{}, {}], "dataset.stopping_strategy needs sources with a share"),
    ],
)
def test_shares_that_do_not_fit_are_refused(
    run_cli: Callable[..., int],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sources: list[dict[str, Any]],
    message: str,
) -> None:
    sections = [{"path": write(tmp_path, name, 9)} | one for name, one in zip("ab", sources, strict=True)]
    dataset = {"sources": sections, "path": None, "prompt": None, "completion": None}
    recipe = write_recipe(dataset=dataset | {"stopping_strategy": "all_exhausted"})
    assert run_cli("validate", recipe) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_report_shows_the_rows_after_mixing(
    run_cli: Callable[..., int],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sections = [{"path": write(tmp_path, name, 40), "share": share} for name, share in (("a", 0.75), ("b", 0.25))]
    dataset = {"sources": sections, "path": None, "prompt": None, "completion": None, "split": {"test_size": 8}}
    assert run_cli("data", write_recipe(dataset=dataset | {"limits": {"max_leaked": 1}})) == 0
    captured = capfd.readouterr()
    lines = [line.split() for line in (captured.out + captured.err).splitlines()]
    at = next(at for at, line in enumerate(lines) if line[:1] == ["Source"])
    assert " ".join(lines[at]) == "Source Rows Read as Share Training Used per epoch of all"
    (a_train, a_used), (b_train, b_used) = ([int(cell) for cell in lines[at + one][4:6]] for one in (1, 2))
    assert a_train + b_train == 72 and a_used <= a_train and b_used <= b_train
    assert lines[at + 1][3] == "0.75" and abs(a_used - 0.75 * (a_used + b_used)) <= 1
