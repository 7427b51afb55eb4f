"""Sources, joins, splits and labels: every row counted, and the labels those of TRL."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from peftcli.data.examples import Examples, make_examples
from peftcli.data.join import join_tables
from peftcli.data.prepare import load_sides, prepare
from peftcli.data.sources import read_path
from peftcli.data.split import split_indices
from peftcli.data.tokens import IGNORED, stop_ids, tokenize
from peftcli.errors import DataError
from peftcli.plan.plan import LabelRule
from peftcli.recipe.schema import DatasetSection

RULE = LabelRule(completion_only=True, assistant_only=True, asked=(), max_length=64)


def section(**keys: object) -> DatasetSection:
    return DatasetSection.model_validate(keys)


def examples(format_: str, **columns: list[str]) -> Examples:
    return Examples(format_, pa.table(columns), {})


def test_a_csv_value_stays_the_text_that_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,name\n007,NA\n010,"say \\""hi\\"""\n,null\n', encoding="utf-8")
    table, facts = read_path(path)
    assert table.to_pydict() == {"id": ["007", "010", ""], "name": ["NA", 'say \\"hi\\"', "null"]}
    assert facts.rows == 3


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_every_ending_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = [{"prompt": f"p {number}", "completion": f"c, {number}"} for number in range(3)]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        comma = "," if ending == "csv" else "\t"
        lines = [comma.join(rows[0])] + [comma.join(f'"{cell}"' for cell in row.values()) for row in rows]
        path.write_text("\n".join(lines))
    assert read_path(path)[0].to_pylist() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.json", b'{"text": "x"}', "one dict; a list of rows"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"text\n", "no rows"),
        ("a.csv", b"a,a\n1,2\n", "names a twice"),
        ("a.csv", b"a,b\n1,2,3\n", "cannot be read"),
        ("a.csv", "text\nM\xfcller\n".encode("latin-1"), "UTF"),
        ("a.jsonl", '{"text": "M\xfcller"}\n'.encode("latin-1"), "is not UTF-8"),
        ("a.xlsx", b"PK", "the ending .xlsx is not known"),
        ("a.jsonl.gz", b"\x1f\x8b broken", "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"text": {"a": 1}}\n', "mixes types"),
        ("a.jsonl", b"[1, 2]\n", "row 1 is a list"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("a.jsonl", b'{"n": 99999999999999999999999}\n', "beyond 64 bits"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: cannot be read"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: "),
        ("a.csv", b"x" * 200_000 + b"\n1\n", "cannot be read"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_path(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"no such file; did you mean products\.csv"):
        read_path(tmp_path / "product.csv")


def test_a_join_counts_who_finds_no_partner() -> None:
    left = pa.table({"k": ["1", "2", "1", "9"], "name": ["a", "b", "c", "d"]})
    right = pa.table({"k": [2, 1], "kind": ["two", "one"]})  # numbers here, text there
    joined, facts = join_tables(left, right, ["k"], "right.csv")
    assert joined.column("kind").to_pylist() == ["one", "two", "one"]
    assert joined.column("name").to_pylist() == ["a", "b", "c"]
    assert (facts.rows, facts.unmatched) == (2, 1)


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ({"k": ["1", "1"], "kind": ["a", "b"]}, "k = 1 stands 2 times there"),
        ({"key": ["1"], "kind": ["a"]}, "right.csv has no column k"),
        ({"k": ["1"], "name": ["a"]}, "both sides have a column name"),
        ({"k": ["7"], "kind": ["a"]}, "no row finds a partner"),
    ],
)
def test_a_join_that_would_lose_or_multiply_rows_is_refused(right: dict[str, list[str]], message: str) -> None:
    left = pa.table({"k": ["1", "2"], "name": ["a", "b"]})
    with pytest.raises(DataError, match=message):
        join_tables(left, pa.table(right), ["k"], "right.csv")


def test_the_split_is_seeded_and_complete() -> None:
    train, test = split_indices(49_688, 0.2, seed=42)
    assert (len(train), len(test)) == (39_750, 9_938)
    assert sorted(train + test) == list(range(49_688))
    assert split_indices(49_688, 0.2, seed=42) == (train, test)
    assert split_indices(49_688, 0.2, seed=43)[1] != test


def test_rows_that_cannot_be_used_are_counted_by_reason() -> None:
    table = pa.table({"prompt": ["a", None, "c", "d"], "completion": ["x", "y", " ", "z"]})
    made = make_examples(table, section(path="f.csv"), "f.csv")
    assert made.table.num_rows == 2
    assert made.dropped == {"with prompt null": 1, "with nothing to learn (empty)": 1}


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "with messages that are no list"),
        ([{"role": "user", "content": "a"}], "without an assistant turn"),
        ([{"role": "assistant", "content": "a"}], "with an answer and nothing before it"),
        ([{"role": "asistant", "content": "a"}], "with the unknown role asistant"),
        ([{"content": "a"}], "with a message without a role"),
        ([{"role": "assistant", "content": None}], "with a message whose content is not text"),
    ],
)
def test_a_chat_that_cannot_be_used_is_named(chat: list[object], reason: str) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    table = pa.table({"messages": [json.dumps(good), json.dumps(chat)]})
    assert make_examples(table, section(path="f"), "f").dropped == {reason: 1}


def test_unknown_columns_name_what_is_there_and_the_mend() -> None:
    with pytest.raises(DataError, match=r"its columns \(a, b\) are no known format.*dataset.prompt"):
        make_examples(pa.table({"a": ["1"], "b": ["2"]}), section(path="f"), "f")
    with pytest.raises(DataError, match="no column nam; it has name"):
        make_examples(pa.table({"name": ["1"]}), section(path="f", text="{nam}"), "f")


def trl_rows(
    rows: list[dict[str, object]], tokenizer: object, **arguments: object
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels as TRL's own trainer prepares them."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path)  # type: ignore[attr-defined]
    config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=64, report_to=[], **arguments)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.filterwarnings("ignore")  # TRL's own defaults warn
@pytest.mark.parametrize("kind", ["prompt_completion", "text", "messages"])
def test_ids_and_labels_are_those_of_trl(kind: str, tokenizer: object, tmp_path: Path, monkeypatch: object) -> None:
    chat = [
        {"role": "user", "content": "Tell me about milk."},
        {"role": "assistant", "content": "Milk is cold."},
        {"role": "user", "content": "And bread?"},
        {"role": "assistant", "content": "Bread is warm."},
    ]
    rows: list[dict[str, object]] = {
        "prompt_completion": [
            {"prompt": "oat milk ->:", "completion": " dairy eggs"},
            {"prompt": "x ", "completion": "word " * 60},
            {"prompt": "a", "completion": "b"},
        ],
        "text": [{"text": "The cat sat on the mat."}, {"text": "One two three. " * 30}],
        "messages": [{"messages": chat}, {"messages": chat[:2]}],
    }[kind]
    columns = {name: [row[name] if kind != "messages" else json.dumps(row[name]) for row in rows] for name in rows[0]}
    table, facts = tokenize(examples(kind, **columns), tokenizer, RULE)  # type: ignore[arg-type]
    ours = [(row["input_ids"], row["labels"]) for row in table.to_pylist()]
    arguments = {"assistant_only_loss": True} if kind == "messages" else {}
    assert ours == trl_rows(rows, tokenizer, **arguments)
    assert facts.rows == len(rows)


def test_no_prompt_token_is_trained_and_the_end_token_is(tokenizer: object) -> None:
    table, facts = tokenize(
        examples("prompt_completion", prompt=["oat milk ->:"], completion=[" dairy eggs"]),
        tokenizer,
        RULE,  # type: ignore[arg-type]
    )
    row = table.to_pylist()[0]
    trained = [token for token in row["labels"] if token != IGNORED]
    assert row["labels"][: len(row["prompt_ids"])] == [IGNORED] * len(row["prompt_ids"])
    assert tokenizer.decode(trained) == " dairy eggs" + tokenizer.eos_token  # type: ignore[attr-defined]
    assert facts.eos_trained == 1 and facts.trained == len(trained)


def test_of_a_chat_only_the_assistant_is_trained_each_turn_with_its_end(tokenizer: object) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    marked, _ = tokenize(examples("messages", messages=[json.dumps(chat)]), tokenizer, RULE)  # type: ignore[arg-type]
    labels = marked.to_pylist()[0]["labels"]
    text = tokenizer.decode([token for token in labels if token != IGNORED])  # type: ignore[attr-defined]
    assert "Good day" in text and "See you" in text
    assert "Hello" not in text and "kind" not in text and "Bye" not in text
    ends = stop_ids(tokenizer)  # type: ignore[arg-type]
    assert sum(token in ends for token in labels) == 2


def test_a_template_without_marks_is_read_by_rendering_the_turns(tokenizer: object) -> None:
    chat = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    tokenizer.chat_template = (  # type: ignore[attr-defined]
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    table, _ = tokenize(examples("messages", messages=[json.dumps(chat)]), tokenizer, RULE)  # type: ignore[arg-type]
    row = table.to_pylist()[0]
    end = tokenizer.eos_token  # type: ignore[attr-defined]
    trained = tokenizer.decode([token for token in row["labels"] if token != IGNORED])  # type: ignore[attr-defined]
    assert trained.replace(" ", "") == f"Goodday{end}Seeyou{end}".replace(" ", "")
    assert row["prompt"].endswith("[assistant] ") and "See you" not in row["prompt"]


def test_a_template_whose_turns_cannot_be_told_apart_stops(tokenizer: object) -> None:
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"  # type: ignore[attr-defined]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="cannot be told apart with certainty"):
        tokenize(examples("messages", messages=[json.dumps(chat)]), tokenizer, RULE)  # type: ignore[arg-type]


def test_a_chat_that_the_template_refuses_is_shown(tokenizer: object) -> None:
    tokenizer.chat_template = (  # type: ignore[attr-defined]
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    chat = [{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"refuses a row \(System role not supported\).*system, assistant.*Be kind"):
        tokenize(examples("messages", messages=[json.dumps(chat)]), tokenizer, RULE)  # type: ignore[arg-type]


def test_rows_cut_before_their_first_trained_token_are_dropped_and_counted(tokenizer: object) -> None:
    long = "word " * 100
    made = examples("prompt_completion", prompt=[long, "short ->:", "short"], completion=["x", "y", long])
    table, facts = tokenize(made, tokenizer, RULE)  # type: ignore[arg-type]
    assert (facts.rows, facts.dropped, facts.truncated, facts.eos_trained) == (2, 1, 1, 1)
    assert table.num_rows == 2


def test_a_test_row_that_stands_in_training_too_is_counted(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {n}"}) for n in range(6)))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("Row  3", "new")))
    dataset = section(path=str(tmp_path / "train.jsonl"), test={"path": str(tmp_path / "test.jsonl")})
    data = prepare(load_sides(dataset, seed=0), tokenizer, RULE)  # type: ignore[arg-type]
    assert (data.facts["leaked_rows"], data.facts["train_rows"], data.facts["test_rows"]) == (1, 6, 2)


def test_rows_of_a_test_file_that_are_lost_are_counted(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("k,text\n1,a\n2,b\n")
    (tmp_path / "kinds.csv").write_text("k,kind\n1,x\n2,y\n")
    (tmp_path / "test.csv").write_text("k,text\n1,c\n9,d\n2, \n")
    dataset = section(
        path=str(tmp_path / "train.csv"),
        join=[{"path": str(tmp_path / "kinds.csv"), "on": "k"}],
        text="{text}",
        test={"path": str(tmp_path / "test.csv")},
    )
    sides = load_sides(dataset, seed=0)
    assert (sides.train.table.num_rows, sides.test.table.num_rows, sides.rows) == (2, 1, 5)
    assert sides.dropped == {
        "of the test file with nothing to learn (empty)": 1,
        "without a partner in kinds.csv (test rows)": 1,
    }


def test_a_chat_that_ends_with_the_user_is_scored_on_its_last_answer(tokenizer: object) -> None:
    turns = [("user", "Hi"), ("assistant", "Good day"), ("user", "Thanks")]
    chat = [{"role": role, "content": content} for role, content in turns]
    table, _ = tokenize(examples("messages", messages=[json.dumps(chat)]), tokenizer, RULE)  # type: ignore[arg-type]
    row = table.to_pylist()[0]
    assert row["reference"] == "Good day" and "Good day" not in row["prompt"] and "Hi" in row["prompt"]


def test_a_prompt_does_not_end_with_the_end_token_that_a_tokenizer_writes(tokenizer: object) -> None:
    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token, tokenizer.eos_token  # type: ignore[attr-defined]
    ids = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]  # type: ignore[attr-defined]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single=f"{bos} $A {eos}", special_tokens=ids
    )
    pair = examples("prompt_completion", prompt=["oat milk ->:"], completion=[" dairy"])
    table, facts = tokenize(pair, tokenizer, RULE)  # type: ignore[arg-type]
    row = table.to_pylist()[0]
    assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    assert (facts.merged_boundaries, facts.eos_trained, row["input_ids"].count(ids[1][1])) == (0, 1, 1)


@pytest.mark.parametrize("column", ["name", "text"])
def test_a_join_after_which_nothing_fits_names_the_columns(tmp_path: Path, column: str) -> None:
    (tmp_path / "a.csv").write_text("k,name\n1,x\n")
    (tmp_path / "b.csv").write_text("k,kind\n1,y\n")
    dataset = section(
        path=str(tmp_path / "a.csv"), join=[{"path": str(tmp_path / "b.csv"), "on": "k"}], text="{" + column + "} {kid}"
    )
    with pytest.raises(DataError, match=r"no column .*it has k, name, kind"):
        load_sides(dataset, seed=0)
