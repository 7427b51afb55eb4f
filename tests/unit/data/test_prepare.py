"""The data of a recipe as a whole: joined, split, compared, limited, kept on disk; every row counted."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftcli.data import cache as keeping
from peftcli.data.dedup import Matrix, match_near_duplicates, normalize, signatures
from peftcli.data.pipeline import run_pipeline
from peftcli.data.prepare import PreparedData, prepare
from peftcli.data.split import split_by_class, split_by_group, split_indices, weighted
from peftcli.errors import DataError
from peftcli.plan.plan import LossMask
from peftcli.progress import Silent
from peftcli.recipe.schema import DatasetSection

RULE = LossMask(completion_only=True, assistant_only=True, asked=(), max_length=64)
Prepare = Callable[..., PreparedData]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def prepared(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A function from the keys of a dataset section to its data, with a cache of its own."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))

    def make(seed: int = 0, rule: LossMask = RULE, **keys: Any) -> PreparedData:
        return prepare(DatasetSection.model_validate(keys), tokenizer, rule, seed, Silent())

    return make


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(path: Path, count: int, **more: Callable[[int], Any]) -> str:
    words = ["red", "blue", "green", "heavy", "light", "round", "square"]
    return lines(
        path,
        [
            {"text": " ".join(words[(number * step) % 7] for step in range(1, 9)) + f" {number} {number * 7919}"}
            | {name: make(number) for name, make in more.items()}
            for number in range(count)
        ],
    )


def texts(data: PreparedData, side: str = "train") -> list[str]:
    chosen = data.train if side == "train" else data.test_split
    column = chosen.store.examples.column("text")
    return [column[int(row)].as_py() for row in chosen.rows]


# Joins


def test_a_join_counts_who_finds_no_partner(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("k,name\n" + "".join(f"{n % 11},row {n}\n" for n in range(44)))
    lines(tmp_path / "kinds.jsonl", [{"k": number, "kind": f"kind {number}"} for number in range(10)])
    join = [{"path": str(tmp_path / "kinds.jsonl"), "on": "k"}]
    data = prepared(path=str(tmp_path / "a.csv"), join=join, text="{name} is {kind}", limits={"max_dropped": 0.1})
    facts = data.facts
    assert (facts["rows"], facts["dropped_rows"], facts["train_rows"] + facts["test_rows"]) == (44, 4, 40)
    assert facts["dropped"] == {"without a match in kinds.jsonl": 4}
    assert facts["dropped_examples"] == {"without a match in kinds.jsonl": [f"a.csv:{n}" for n in (12, 23, 34, 45)]}
    assert facts["joins"] == [{"path": "kinds.jsonl", "on": ["k"], "rows": 10, "unmatched": 4}]
    for text in texts(data):
        number = int(text.split()[1])
        assert text == f"row {number} is kind {number % 11}"
    assert not data.crossed


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ("k,kind\n1,a\n1,b\n", r"right.csv:3: k = 1 is a duplicate \(first right.csv:2\)"),
        ("key,kind\n1,a\n", "right.csv: it has no column k, only key, kind; use a key that both tables have"),
        ("k,name\n1,a\n", "both tables have a column name"),
        ("k,kind\n7,a\n", "no row has a match on k; left has '1', right has '7'"),
    ],
)
def test_a_join_that_would_lose_or_multiply_rows_is_refused(
    prepared: Prepare, tmp_path: Path, right: str, message: str
) -> None:
    (tmp_path / "a.csv").write_text("k,name\n1,x\n2,y\n")
    (tmp_path / "right.csv").write_text(right)
    join = [{"path": str(tmp_path / "right.csv"), "on": "k"}]
    with pytest.raises(DataError, match=message):
        prepared(path=str(tmp_path / "a.csv"), join=join, text="{name}")


def test_rows_of_a_test_file_that_are_lost_are_counted(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("k,text\n1,a\n2,b\n")
    (tmp_path / "kinds.csv").write_text("k,kind\n1,x\n2,y\n")
    (tmp_path / "test.csv").write_text("k,text\n1,c\n9,d\n2, \n")
    facts = prepared(
        path=str(tmp_path / "train.csv"),
        join=[{"path": str(tmp_path / "kinds.csv"), "on": "k"}],
        text="{text}",
        test={"path": str(tmp_path / "test.csv")},
    ).facts
    assert (facts["train_rows"], facts["test_rows"], facts["rows"]) == (2, 1, 5)
    assert facts["dropped"] == {
        "of the test rows without a match in kinds.csv": 1,
        "of the test rows with nothing to learn (empty)": 1,
    }
    assert facts["dropped_examples"]["of the test rows without a match in kinds.csv"] == ["test.csv:3"]


# Splits


def test_the_split_is_seeded_and_complete() -> None:
    train, test = split_indices(49_688, 0.2, seed=42)
    assert (len(train), len(test)) == (39_750, 9_938)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(49_688))
    assert np.array_equal(split_indices(49_688, 0.2, seed=42)[1], test)
    assert not np.array_equal(split_indices(49_688, 0.2, seed=43)[1], test)


def test_a_stratified_split_keeps_the_shares_to_the_row() -> None:
    classes = np.repeat(np.array([1, 2, 3], np.uint64), [1000, 90, 7])
    train, test = split_by_class(classes, 0.25, seed=1)
    assert len(test) == 275 and len(np.intersect1d(train, test)) == 0 and len(train) + len(test) == 1097
    assert [int((classes[test] == name).sum()) for name in (1, 2, 3)] == [251, 22, 2]
    assert not np.array_equal(split_by_class(classes, 0.25, seed=2)[1], test)


def test_a_grouped_split_never_divides_a_group() -> None:
    groups = np.random.default_rng(0).integers(0, 60, 1000).astype(np.uint64)
    train, test = split_by_group(groups, 0.2, seed=3)
    assert not set(groups[train]) & set(groups[test])
    assert 180 <= len(test) <= 200 and len(train) + len(test) == 1000


def test_a_column_can_group_or_stratify_the_split(prepared: Prepare, tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 100, customer=lambda n: n % 10, kind=lambda n: "rare" if n % 10 == 0 else "b")
    data = prepared(path=path, split={"group": "customer", "test_size": 0.3})
    sides = [{int(text.split()[-2]) % 10 for text in texts(data, side)} for side in ("train", "test")]
    assert not sides[0] & sides[1] and len(sides[1]) == 3
    data = prepared(path=path, split={"stratify": "kind", "test_size": 0.3})
    assert sum(int(text.split()[-2]) % 10 == 0 for text in texts(data, "test")) == 3
    with pytest.raises(DataError, match=r"dataset.split.group: a.jsonl has no column client; it has text, customer"):
        prepared(path=path, split={"group": "client"})


def test_fewer_training_samples_are_a_part_of_more(prepared: Prepare, tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 60)
    few, more = (prepared(path=path, max_train_samples=count) for count in (10, 20))
    assert len(texts(few)) == 10 and set(texts(few)) <= set(texts(more))
    assert texts(few, "test") == texts(more, "test")
    assert more.facts["cache"] == "reused"


def test_several_sources_are_used_as_often_as_their_weights_say(prepared: Prepare, tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 20), lines(tmp_path / "b.jsonl", [{"text": f"other {n}"} for n in range(20)])
    data = prepared(sources=[{"path": a, "weight": 2}, {"path": b, "weight": 0.5}], split={"test_size": 10, "seed": 5})
    used = texts(data)
    first = [text for text in used if not text.startswith("other")]
    second = [text for text in used if text.startswith("other")]
    assert len(first) == 2 * len(set(first)) and len(second) == len(set(second))
    drawn = data.train.store.column("source")
    assert len(second) == round(0.5 * (20 - int((drawn[data.test_split.rows] == 1).sum())))
    assert [(one["path"], one["rows"], one["weight"]) for one in data.facts["sources"]] == [
        ("a.jsonl", 20, 2.0),
        ("b.jsonl", 20, 0.5),
    ]
    assert len(texts(data, "test")) == len(set(texts(data, "test"))) == 10


def test_weights_of_one_change_nothing() -> None:
    rows = np.array([4, 2, 9])
    assert weighted(rows, [1.0], np.zeros(3, np.int64), seed=0) is rows


def test_sources_of_two_kinds_are_refused(prepared: Prepare, tmp_path: Path) -> None:
    a = numbered(tmp_path / "a.jsonl", 5)
    b = lines(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(DataError, match=r"b.jsonl: its format is prompt_completion .*the previous source is text"):
        prepared(sources=[{"path": a}, {"path": b}])


def test_the_test_file_of_a_folder_is_not_trained(prepared: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    numbered(folder / "train.jsonl", 12)
    lines(folder / "test.jsonl", [{"text": "unseen row"}])
    data = prepared(path=str(folder), test={"path": str(folder / "test.jsonl")})
    assert (data.facts["train_rows"], data.facts["test_rows"], data.facts["leaked_rows"]) == (12, 1, 0)


def test_pieces_of_one_text_stay_on_one_side(prepared: Prepare, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": f"text {n} " + f"word{n} " * 150} for n in range(12)])
    data = prepared(path=path, too_long="split", split={"test_size": 0.3})
    sides = [{int(text.split()[1]) for text in texts(data, side)} for side in ("train", "test")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert data.facts["duplicate_rows"] == data.facts["near_duplicate_rows"] == 0
    assert data.facts["eos_expected_rows"] == data.facts["eos_trained_rows"] == len(sides[0])
    assert not data.crossed


def test_a_plain_text_file_becomes_rows_of_about_max_length(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a long day, and the night was longer.\n" * 200)
    data = prepared(path=str(tmp_path / "book.txt"), split={"test_size": 0.1}, limits={"max_leaked": 1})
    lengths = np.concatenate([data.train.column("length"), data.test_split.column("length")])
    assert lengths.max() <= 64 and lengths.min() > 56
    assert data.facts["truncated_rows"] == data.facts["dropped_rows"] == 0
    assert data.facts["eos_expected_rows"] <= 1 and data.facts["sources"][0]["rows"] == 1


# Equal rows


def test_a_test_row_that_stands_in_training_too_is_counted(prepared: Prepare, tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", [{"text": f"row {n}"} for n in range(6)])
    test = lines(tmp_path / "test.jsonl", [{"text": "Row  3"}, {"text": "new"}])
    data = prepared(path=train, test={"path": test})
    assert (data.facts["leaked_rows"], data.facts["train_rows"], data.facts["test_rows"]) == (1, 6, 2)
    assert data.facts["leaked_examples"] == [{"test": "test.jsonl:1", "train": "train.jsonl:4"}]
    with pytest.raises(
        DataError, match=r"1 of 2 test rows are also in the training split .*dataset.limits.max_leaked: 0.01\)"
    ):
        data.raise_if_crossed("peftcli data r.yaml")


def test_a_prompt_that_stands_on_both_sides_with_another_answer_is_no_leak(prepared: Prepare, tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(6)])
    test = lines(tmp_path / "test.jsonl", [{"prompt": "ask 3", "completion": "nothing"}])
    facts = prepared(path=train, test={"path": test}).facts
    assert (facts["leaked_rows"], facts["leaked_prompts"]) == (0, 1)


def test_deduplicate_keeps_the_first_of_equal_rows(prepared: Prepare, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": f"Row {n % 8}" if n < 20 else f"row  {n % 8}"} for n in range(40)])
    data = prepared(path=path, deduplicate=True, split={"test_size": 2})
    assert sorted(texts(data) + texts(data, "test")) == [f"Row {n}" for n in range(8)]
    assert data.facts["dropped"] == {"equal to an earlier row": 32} and not data.crossed
    assert data.facts["dropped_examples"]["equal to an earlier row"][0] == "a.jsonl:9"
    plain_data = prepared(path=path, split={"test_size": 2})
    assert plain_data.facts["duplicate_rows"] == 38 - 8 and plain_data.crossed


def test_near_duplicates_are_found_and_others_are_not() -> None:
    one = "the quick brown fox jumps over the lazy dog and then runs home through the wood before night falls"
    other = "a completely different sentence that shares nothing with the first one but some letters and spaces"
    rows = [one, other, one.replace("quick", "fast"), one + " again", other.upper(), "short", "short!"]
    found = match_near_duplicates(Matrix(signatures([normalize(row) for row in rows])), None)
    assert found[3] == 0 and found[4] == 1 and found[1] == -1 and found[5] == found[6] == -1
    far = [f"{number * 7919} rows of {number * 104729} words, and {number * 15485863} letters" for number in range(500)]
    assert (match_near_duplicates(Matrix(signatures(far)), None) >= 0).sum() == 0


def test_signatures_estimate_the_share_of_common_pieces() -> None:
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    base = "".join(generator.choice(letters, 2000))
    errors = []
    for share in (0.2, 0.5, 0.8, 0.95):
        cut = int(2000 * share)
        other = base[:cut] + "".join(generator.choice(letters, 2000 - cut))
        pieces = [{text[i : i + 8] for i in range(1993)} for text in (base, other)]
        exact = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
        found = signatures([base, other])
        errors.append(abs((found[0] == found[1]).mean() - exact))
    assert np.mean(errors) < 0.12  # 24 hashes: a standard error of at most 0.1 each


# Limits


def test_the_limits_stop_with_every_one_that_is_crossed(prepared: Prepare, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(30)]
    rows += [{"prompt": None, "completion": "x"}] * 4 + [{"prompt": "long", "completion": "word " * 100}] * 6
    data = prepared(path=lines(tmp_path / "a.jsonl", rows), split={"test_size": 10})
    with pytest.raises(DataError) as caught:
        data.raise_if_crossed("peftcli data r.yaml")
    message = str(caught.value)
    assert "run `peftcli data r.yaml` to see the rows" in message
    assert "4 of 40 rows are dropped (10.0%, dataset.limits.max_dropped: 0.05): 4 with prompt null" in message
    assert "(first a.jsonl:31)" in message
    assert "6 of 36 rows are truncated (16.7%, dataset.limits.max_truncated: 0.05) at dataset.max_length 64" in message
    limits = {"max_dropped": 0.2, "max_truncated": 0.2, "max_leaked": 1.0}
    assert not prepared(path=str(tmp_path / "a.jsonl"), split={"test_size": 10}, limits=limits).crossed


def test_a_template_without_the_end_token_stops_and_its_twin_does_not(
    prepared: Prepare, tokenizer: Any, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    path = lines(tmp_path / "a.jsonl", [{"messages": [chat[0], chat[1] | {"content": f"Day {n}"}]} for n in range(9)])
    assert not prepared(path=path).crossed
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    crossed = prepared(path=path).crossed
    assert len(crossed) == 1 and crossed[0].startswith("the end token is trained in 0 of 7 training rows")
    assert "generation stops on '</s>'" in crossed[0] and "model.chat_template" in crossed[0]


def test_a_doubled_start_is_told_and_its_twin_is_not(prepared: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    def said(rows: list[dict[str, Any]], name: str) -> list[str]:
        warnings: list[str] = prepared(path=lines(tmp_path / name, rows)).facts["warnings"]
        return [warning for warning in warnings if "twice" in warning]

    assert said([{"text": f"<s>row {n}"} for n in range(10)], "a.jsonl")[0].startswith("8 training rows start with <s>")
    assert said([{"text": f"row {n}"} for n in range(10)], "b.jsonl") == []


def test_an_answer_that_no_other_row_has_is_told(prepared: Prepare, tmp_path: Path) -> None:
    rows = [{"text": f"thing {n}", "label": ["good", "bad"][n % 2]} for n in range(60)]
    rows[7] = {"text": "good", "label": "thing 7"}
    path = lines(tmp_path / "a.jsonl", rows)
    keys = {"prompt": "{text} is", "completion": " {label}", "split": {"test_size": 1, "seed": 1}}
    odd = [one for one in prepared(path=path, **keys).facts["warnings"] if "shifted columns" in one]
    assert odd == [
        "1 training row has a unique answer, while all others share a few; check for shifted columns (first a.jsonl:8)"
    ]
    labels = prepared(path=path, **keys).facts["labels"]
    assert labels["distinct"] == 3 and sum(labels["train"].values()) == 59


# On disk


def test_a_second_time_the_rows_come_from_the_cache(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered(tmp_path / "a.jsonl", 30)
    passes: list[int] = []

    def counted(*args: Any) -> None:
        passes.append(1)
        run_pipeline(*args)

    monkeypatch.setattr(keeping, "run_pipeline", counted)
    first = prepared(path=path)
    again = prepared(path=path, split={"test_size": 3}, seed=9)
    assert (first.facts["cache"], again.facts["cache"], len(passes)) == ("made", "reused", 1)
    assert sorted(texts(first) + texts(first, "test")) == sorted(texts(again) + texts(again, "test"))
    numbered(tmp_path / "a.jsonl", 31)
    assert prepared(path=path).facts["cache"] == "made"
    prepared(path=path, rule=LossMask(True, True, (), 32))
    prepared(path=path, text="{text}!")
    assert len(passes) == 4


def test_another_tokenizer_or_template_is_another_entry(prepared: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 5)
    assert prepared(path=path).facts["cache"] == "made"
    tokenizer.chat_template = "{{ messages }}"
    assert prepared(path=path).facts["cache"] == "made"
    tokenizer.eos_token = "<s>"
    assert prepared(path=path).facts["cache"] == "made"
    assert prepared(path=path).facts["cache"] == "reused"


def test_an_error_leaves_nothing_in_the_cache(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"a.jsonl:2"):
            prepared(path=str(tmp_path / "a.jsonl"))
    assert [entry.name for entry in (tmp_path / "cache" / "data").iterdir() if not entry.name.endswith(".lock")] == []


def test_a_compressed_file_gives_the_rows_of_the_plain_one(prepared: Prepare, tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", 20)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    assert texts(prepared(path=str(tmp_path / "b.jsonl.gz"))) == texts(prepared(path=path))


def test_the_fingerprint_tells_any_change(prepared: Prepare, tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} for n in range(10)]
    prints = [prepared(path=lines(tmp_path / "a.jsonl", rows)).facts["fingerprint"] for _ in range(2)]
    rows[4]["text"] = "Row 4"
    changed = prepared(path=lines(tmp_path / "a.jsonl", rows)).facts["fingerprint"]
    assert prints[0] == prints[1] != changed


# What the evaluation gets


def test_the_test_rows_have_prompt_and_reference(prepared: Prepare, tokenizer: Any, tmp_path: Path) -> None:
    pairs = lines(tmp_path / "a.jsonl", [{"prompt": f"ask {n} ->", "completion": f" say {n}"} for n in range(10)])
    row = prepared(path=pairs).test.to_pylist()[0]
    assert tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) == row["prompt"]
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    assert row["reference"].startswith(" say ")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    chats = lines(tmp_path / "b.jsonl", [{"messages": chat} for _ in range(4)])
    row = prepared(path=chats).test.to_pylist()[0]
    assert row["reference"] == "Good day" and "Hi" in row["prompt"] and "Good day" not in row["prompt"]
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    row = prepared(path=numbered(tmp_path / "c.jsonl", 10)).test.to_pylist()[0]
    assert row["prompt_ids"] == row["input_ids"][: len(row["prompt_ids"])]
