"""The report room: a pure function of the JSON files of a run, safe to open and safe to pass on."""

import doctest
import functools
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from peftcli.errors import DataError, RecipeError
from peftcli.plan.machine import Machine, ModelFacts
from peftcli.plan.optimizer import Trained
from peftcli.plan.plan import Plan
from peftcli.plan.planner import make_plan
from peftcli.recipe.fields import parse_gate
from peftcli.recipe.load import load_recipe
from peftcli.report.build import write_report
from peftcli.results import save
from peftcli.run_dir import RunDir, read_json, write_json, write_text
from peftcli.summary import write_metrics

HOSTILE = (
    "<script>alert(1)</script></style></title>]]> <img src=http://evil.example/x.png> \x1b[31mred\x00 "
    "\u202egnp.exe | `tick` **bold** [link](http://evil.example)\n\n# heading\n| a | b |\n|---|---|\ud800 "
    "{{ 7*7 }}"
)


T4 = Machine("cuda", "Tesla T4", (7, 5), native_bf16=False, arch_list=("sm_75",), memory_bytes=15_828_320_256)
LINEAR = tuple(f"model.layers.{layer}.self_attn.{leaf}" for layer in range(32) for leaf in ("q_proj", "v_proj"))
LLAMA = ModelFacts("m", "LlamaForCausalLM", 6_738_415_616, (*LINEAR, "lm_head"), LINEAR, "lm_head", 4096)
PRODUCTS = Path(__file__).parents[3] / "recipes" / "products-llama2-7b.yaml"
GATES = [
    parse_gate("exact_match", ">= 0.75"),
    parse_gate("loss", "<= 0.6"),
    parse_gate("forgetting_change", "<= 0.1"),  # was not measured
]


def sample_run(folder: Path, *, smoke: bool = False) -> RunDir:
    """Write a run as `train` and `merge` leave it, with the figures of a 7B QLoRA run on one T4."""
    run = RunDir(folder)
    save(run.plan, make_products_plan(smoke).as_json())
    for path, make in STAGES.items():
        write_json(folder / path, {"schema": 1, **make()})
    run.adapter.mkdir(parents=True, exist_ok=True)
    with (run.adapter / "adapter_model.safetensors").open("wb") as file:
        file.truncate(134_235_048)
    write_metrics(run, GATES)
    write_text(run.log, "".join(json.dumps(row) + "\n" for row in log_rows()))
    return run


@functools.cache
def make_products_plan(smoke: bool) -> Plan:
    """The plan of a shipped recipe on a T4."""
    recipe = load_recipe(PRODUCTS, ["name=products", "trainer.max_steps=600"]).recipe
    notice = "The completion starts with a space; it is tokenized as part of the completion."
    return make_plan(recipe, T4, LLAMA, lambda adapter: Trained(33_554_432), smoke=smoke, notices=(notice,))


def log_rows(steps: int = 600, every: int = 5) -> list[dict[str, Any]]:
    """A loss that falls from 3.1 to about 0.6 with noise, a linear warm-up and a cosine decay."""
    noise = random.Random(7)
    rows = []
    for step in range(every, steps + 1, every):
        loss = 0.62 + 2.5 * math.exp(-step / 70) + noise.gauss(0, 0.07) * (0.6 + math.exp(-step / 200))
        rate = 2e-4 * (step / 18 if step < 18 else 0.5 * (1 + math.cos(math.pi * (step - 18) / (steps - 18))))
        rows.append(
            {
                "step": step,
                "loss": round(loss, 4),
                "learning_rate": rate,
                "grad_norm": round(0.5 + 1.6 * math.exp(-step / 50) + abs(noise.gauss(0, 0.12)), 4),
                "epoch": round(step * 16 / 39750, 4),
                "tokens_per_second": round(1240 + noise.gauss(0, 25) - (160 if step == every else 0), 1),
                "memory_bytes": 9_812_000_000,
                "elapsed_seconds": round(step * 0.268, 2),
            }
        )
    return rows


def _environment() -> dict[str, Any]:
    names = {"torch": "2.13.0+cu130", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2"}
    return {
        "python": "3.12.11",
        "platform": "Linux-6.6.105+-x86_64-with-glibc2.35",
        "packages": {**names, "bitsandbytes": "0.50.2", "datasets": "4.9.0", "accelerate": "1.16.0"},
        "device": {
            "kind": "cuda",
            "name": "Tesla T4",
            "capability": "7.5",
            "memory_bytes": 15_828_320_256,
            "count": 1,
        },
        "cpu_count": 4,
        "ram_bytes": 33_655_000_000,
        "command": "peftcli train /home/ada/work/recipes/products.yaml --max-time 8h30m",
    }


def _data() -> dict[str, Any]:
    return {
        "format": "prompt_completion",
        "sources": [{"path": "/home/ada/work/data/products.csv", "rows": 49688}],
        "joins": [{"path": "departments.csv", "on": ["department_id"], "rows": 21, "unmatched": 0}],
        "rows": 49688,
        "train_rows": 39746,
        "test_rows": 9937,
        "dropped_rows": 5,
        "dropped": {"an empty prompt": 4, "with a prompt longer than max_length 64": 1},
        "truncated_rows": 12,
        "leaked_rows": 31,
        "merged_boundary_rows": 0,
        "tokens": {"train": 604_114, "trained": 119_238, "test": 151_020, "test_trained": 29_811},
        "length": {"min": 6, "median": 14.0, "p95": 25.0, "max": 71},
        "max_length": 64,
        "eos_trained_rows": 39734,
        "split": {"test_size": 0.2, "seed": 42},
        "fingerprint": {"train": "9f2c41d07ab35e18" * 4, "test": "03be77a1c4d9f260" * 4},
    }


def whole_data() -> dict[str, Any]:
    """What `data.json` holds beyond the counts of `_data`."""
    labels = [" personal care", " snacks", " pantry", " beverages", " frozen", " dairy eggs", " household"]
    return {
        "dropped_examples": {"an empty prompt": ["/home/ada/data/products.csv:12", "products.csv:340"]},
        "truncated_examples": ["products.csv:77"],
        "leaked_examples": [{"test": "products.csv:3", "train": "products.csv:700"}],
        "leaked_prompts": 44,
        "duplicate_rows": 120,
        "duplicate_examples": [{"row": "products.csv:90", "first": "products.csv:8"}],
        "near_duplicate_rows": 0,
        "unknown_token_rows": 3,
        "length_histogram": {
            "edges": [*range(0, 99, 3), 7778],
            "counts": [0, 0, 400, 4600, 9000, 9500, 7000, 4200, 2700, 1800, 1000, 500, 200, 90, 40, *[9] * 17, 7],
        },
        "eos_trained_rows": 39731,
        "eos_expected_rows": 39734,
        "labels": {
            "of": "completion",
            "distinct": 21,
            "train": {name: 5254 - 600 * at for at, name in enumerate(labels)},
            "test": {name: 1310 - 150 * at for at, name in enumerate(labels)},
        },
        "columns": [
            {
                "source": "products.csv",
                "column": "product_name",
                "rows": 49688,
                "null": 4,
                "empty": 0,
                "types": {"text": 49684},
                "control_characters": 2,
                "email": 1,
                "key": 0,
                "first": {"control_characters": ["products.csv:881", "products.csv:882"], "email": ["products.csv:19"]},
            }
        ],
        "warnings": ["3 rows hold text that the tokenizer knows only as <unk> (first products.csv:5)"],
        "checks": [
            {"name": "end token", "result": "ok", "said": "</s> (id 2) ends a row."},
            {"name": "text kept", "result": "warn", "said": "The tokenizer changes text ('Na' comes back as 'na')."},
            {"name": "start token", "result": "skip", "said": "The tokenizer has none."},
            {"name": "chat template", "result": "fail", "said": "It refuses chats; set model.chat_template."},
        ],
        "preview": [
            {
                "place": "products.csv:2",
                "tokens": 17,
                "trained": 4,
                "parts": [
                    {"kind": "prompt", "text": "<s>Chocolate Sandwich Cookies ->:"},
                    {"kind": "trained", "text": " cookies cakes</s>"},
                ],
            },
            {
                "place": "products.csv:77",
                "tokens": 64,
                "trained": 1,
                "parts": [
                    {"kind": "prompt", "text": "<s>All-Seasons Salt" + ", and more" * 18 + "\non two lines ->:"},
                    {"kind": "trained", "text": " pan"},
                    {"kind": "dropped", "text": "try</s>"},
                ],
            },
        ],
    }


def _train() -> dict[str, Any]:
    return {
        "status": "finished",
        "steps": 600,
        "rows": 9600,
        "epochs": 0.2415,
        "tokens": 199_412,
        "trained_tokens": 57_630,
        "tokens_per_second": 1239.6,
        "seconds": 160.87,
        "peak_memory_bytes": 9_812_000_000,
        "resumed_from_step": 320,
        "first_loss": 3.0894,
        "last_loss": 0.6312,
    }


BASE = (4.8721, 130.59, 0.2984, 0.0125, 9.41, 0.9812)
ADAPTER = (0.6274, 1.8727, 0.8391, 0.7812, 84.03, 0.0)
MERGED = (0.6275, 1.8729, 0.8390, 0.7812, 84.03, 0.0)
KEYS = ("loss", "perplexity", "token_accuracy", "exact_match", "chrf", "unfinished_answers")


def _metrics_of(figures: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(KEYS, figures, strict=True))


def _eval() -> dict[str, Any]:
    rows = [
        (
            "Fresh Scent Dish Soap ->:",
            " household",
            " $3.99\nFresh Scent Dish Soap ->: $3.99\nFresh",
            " household",
        ),
        ("Organic Lowfat Kefir, Blueberry ->:", " dairy eggs", " Organic Lowfat Kefir, Straw", " dairy eggs"),
        ("Sweet Potato Tots ->:", " frozen", "\tSweet Potato Tots\n\nIngredients:  ", " frozen"),
        ("Toasted Sesame Dressing ->:", " pantry", " 12 oz.", " deli"),
        ("Whitening Toothpaste, \u0645\u0639\u062c\u0648\u0646 ->:", " personal care", "", " personal care"),
    ]
    return {
        "rows": 9937,
        "generated_rows": 160,
        "base": _metrics_of(BASE),
        "adapter": _metrics_of(ADAPTER),
        "samples": [dict(zip(("prompt", "reference", "base", "adapter"), row, strict=True)) for row in rows],
        "decoding": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 16},
    }


DRIFT = {"max_abs_logit_difference": 0.0312, "mean_abs_logit_difference": 0.0019, "kl_nats": 2.41e-7}


def _merge() -> dict[str, Any]:
    compared = {"rows": 160, "positions": 2431, **DRIFT, "top1_agreement": 1.0}
    return {
        "into": "dequantized",
        "dtype": "float16",
        **compared,
        "limit": {"top1_agreement": ">= 0.99", "max_abs_logit_difference": "<= 0.1"},
        "met": True,
        "metrics": _metrics_of(MERGED),
        "candidates": [
            {"into": "dequantized", "loss": 0.6275, **compared},
            {"into": "original", "loss": 0.6401, **compared, "max_abs_logit_difference": 1.8},
        ],
        "bytes": 13_476_839_424,
        "seconds": 171.2,
        "samples": [{"prompt": row["prompt"], "merged": row["adapter"]} for row in _eval()["samples"]],
    }


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "environment.json": _environment,
    "data.json": _data,
    "train.json": _train,
    "eval.json": _eval,
    "merge.json": _merge,
}
FILES = ("plan.json", *STAGES, "metrics.json")


class Tags(HTMLParser):
    """All start tags of a page with their attributes, and its text outside of the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.inside == "style" else data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    """Replace every leaf of a JSON file."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key == "schema" else walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, list) else edit(value)

    write_json(path, walk(json.loads(path.read_text(encoding="utf-8"))))


def update(path: Path, **values: Any) -> None:
    """Replace some top-level keys of a JSON file."""
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


def written(run: RunDir) -> tuple[str, str]:
    write_report(run)
    return run.report_md.read_text(encoding="utf-8"), run.report_html.read_text(encoding="utf-8")


def hostile_run(folder: Path) -> RunDir:
    """A run in which every string is an attack, the status and the tasks of the code included."""
    run = sample_run(folder)
    update(run.data, **whole_data())
    for name in FILES:
        raw = read_json(folder / name)

        def spoil(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: item if key == "schema" else spoil(item) for key, item in value.items()}
            if isinstance(value, list):
                return [spoil(item) for item in value]
            return HOSTILE if isinstance(value, str) else value

        spoiled = spoil(raw)
        for keyed in ("dropped", "packages", "trainer", "limit"):
            if keyed in spoiled:
                spoiled[keyed][HOSTILE] = 7 if keyed == "dropped" else HOSTILE
        (folder / name).write_text(json.dumps(spoiled), encoding="utf-8")
    return run


def test_page_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    _, page = written(sample_run(tmp_path))
    tags = Tags(page)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert all(reference.startswith("url(#") for reference in re.findall(r"url\([^)]*", page))
    for tag, attributes in tags.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "img", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "src", "xlink:href") or (value or "").startswith("#")
    assert "default-src 'none'" in page


def test_anchors_lead_to_sections(tmp_path: Path) -> None:
    tags = Tags(written(sample_run(tmp_path))[1]).tags
    ids = [attributes["id"] for _, attributes in tags if attributes.get("id")]
    anchors = [str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"]
    assert anchors and set(anchors) <= set(ids)
    assert len(ids) == len(set(ids))


def test_report_says_what_the_run_measured(tmp_path: Path) -> None:
    report, page = written(sample_run(tmp_path))
    for text in (report, page):
        assert "Exact match rose from 0.013 to 0.781 on 160 held-out rows." in text
        assert "the same token as the adapter at 100 % of 2,431 positions." in text
        for figure in (
            "✓ finished",
            "✗ not met",
            "– not measured",
            "2m 41s",
            "128 MiB",
            "33,554,432",
            "9.1 GiB",
        ):
            assert figure in text
    assert page.count("<svg") == 5
    assert "| Loss, nats per trained token ↓ | 4.872 | **0.6274** | 0.6275 | −4.245 better |" in report
    assert "SMOKE" not in report + page


def test_report_hides_the_home_folder(tmp_path: Path) -> None:
    for text in written(sample_run(tmp_path)):
        assert "/home" not in text and "&#47;home" not in text and "~/work/recipes/products.yaml" in text


def test_smoke_run_carries_a_banner(tmp_path: Path) -> None:
    for text in written(sample_run(tmp_path, smoke=True)):
        assert "SMOKE RUN:" in text
        assert "the metrics do not predict those of the real model" in text


def test_same_json_gives_the_same_bytes(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    first = written(run)
    assert written(run) == first


@pytest.mark.parametrize("name", [*STAGES, "log.jsonl"])
def test_absent_stage_has_no_section(tmp_path: Path, name: str) -> None:
    run = sample_run(tmp_path)
    (tmp_path / name).unlink()
    report, page = written(run)
    titles = {"environment.json": "Hardware and versions", "data.json": "Data", "eval.json": "Samples"}
    assert f"## {titles.get(name, 'nothing')}\n" not in report
    assert (page.count("<svg") == 0) == (name == "log.jsonl")


def test_run_with_plan_and_metrics_alone_is_reported(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    for name in ("environment.json", "data.json", "train.json", "eval.json", "merge.json", "log.jsonl"):
        (tmp_path / name).unlink()
    update(
        run.metrics,
        base=None,
        adapter=None,
        merged=None,
        merge=None,
        train=None,
        data=None,
        bytes=None,
        gates=[],
    )
    report, _ = written(run)
    assert "No held-out row was scored" in report
    assert [line for line in report.splitlines() if line.startswith("## ")] == ["## Plan"]


def test_null_figures_are_dashes_and_never_zero(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    run.log.unlink()
    for name in FILES:
        change(tmp_path / name, lambda value: value if isinstance(value, str | bool) else None)
    report, _ = written(run)
    cells = [
        cell.strip() for line in report.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")
    ]
    assert not [cell for cell in cells if re.fullmatch(r"\**[<>]?\s*0(\.0+)?(\s?%|\s?B|s)?\**", cell)]
    assert "| Loss, nats per trained token ↓ | – | – | – | – |" in report
    assert "- Peak memory: –" in report


def test_zero_is_zero_and_not_a_dash(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    report, _ = written(run)
    assert "| Answers that did not stop ↓ | 98.1 % | **0 %** | 0 % |" in report
    assert "| departments.csv | department_id | 21 | 0 |" in report


def test_hostile_text_stays_text_in_the_page(tmp_path: Path) -> None:
    _, page = written(hostile_run(tmp_path))
    tags = Tags(page)
    for tag in ("script", "img", "b", "link"):
        assert tags.count(tag) == 0
    assert tags.count("style") == tags.count("title") == tags.count("h1") == 1
    assert all(
        str(value).startswith("#")
        for tag, attributes in tags.tags
        for name, value in attributes.items()
        if name in ("href", "src", "xlink:href")
    )
    assert "<script>alert(1)</script></style></title>]]>" in tags.text
    assert "␛[31mred␀" in tags.text and "‹U+202E›gnp.exe" in tags.text and "‹U+D800›" in tags.text
    assert "{{ 7*7 }}" in tags.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)


def test_hostile_text_stays_text_in_the_markdown(tmp_path: Path) -> None:
    calm = sample_run(tmp_path / "plain")
    update(calm.data, **whole_data())
    plain, _ = written(calm)
    report, _ = written(hostile_run(tmp_path / "hostile"))
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    shape = {}
    for name, text in (("plain", plain), ("hostile", report)):
        tokens = parser.parse(text)
        flat = [child for token in tokens for child in (token, *(token.children or []))]
        shape[name] = [token.type for token in tokens if token.type in ("table_open", "heading_open", "fence")]
        assert {token.content for token in flat if token.type.startswith("html")} <= {"<br>"}
        assert not [token for token in flat if token.type in ("link_open", "image", "em_open", "code_inline")]
    assert shape["hostile"] == shape["plain"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", report)
    widths = {len(line.strip("|").split("|")) for line in report.splitlines() if line.startswith("| Argument")}
    assert widths == {2}


def test_long_answers_are_whole_in_the_page_and_cut_in_the_markdown(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(run.eval, samples=[{"prompt": "p", "reference": "r", "base": "x" * 10_000, "adapter": " r\n"}])
    report, page = written(run)
    assert "x" * 10_000 in page and "x" * 2_001 not in report
    assert "8,000 more characters" in report
    assert "✓ ·r⏎" in report


def test_samples_tell_correct_from_different_by_a_sign(tmp_path: Path) -> None:
    _, page = written(sample_run(tmp_path))
    assert page.count("✓ correct") == 8 and page.count("✗ differs") == 7


def test_data_section_names_places_labels_checks_and_columns(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(run.data, **whole_data())
    report, page = written(run)
    for line in (
        r"| an empty prompt | 4 | \~/data/products.csv:12, products.csv:340 |",
        "| with a prompt longer than max_length 64 | 1 | – |",
        "| Held out, prompt or text also in training | 44 | 0.44 % |",
        "| Training, end token trained | 39,731 | &gt; 99.99 % |",
        "| personal care | 5,254 | 13.2 % | 13.2 % |",
        "| Held out, also in training | products.csv:3 | products.csv:700 |",
        "| Equal to an earlier row | products.csv:90 | products.csv:8 |",
        "| text kept | ! check | The tokenizer changes text ('Na' comes back as 'na'). |",
        "| chat template | ✗ failed | It refuses chats; set model.chat_template. |",
    ):
        assert line in report.replace("|  ", "| ").splitlines()
    assert "control characters in 2 rows (first products.csv:881), e-mail addresses in 1 row (first" in report
    assert "Nearly equal to an earlier row" not in report
    assert "14 more values not shown." in report and "14 more values not shown." in page
    assert "3 of 39,734 training rows do not teach the model to stop" in report
    assert page.count('<span class="bar"') == 7 and 'style="width: 100.0%"' in page


def test_preview_marks_trained_and_cut_text_by_more_than_a_colour(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(run.data, **whole_data())
    report, page = written(run)
    assert "&lt;s&gt;Chocolate Sandwich Cookies -&gt;:{+·cookies cakes&lt;/s&gt;+}" in report
    assert "⏎<br>on two lines -&gt;:{+·pan+}\\[-try&lt;/s&gt;-\\] |" in report
    assert "<ins><i>·</i>pan</ins><del>try&lt;/s&gt;</del>" in page.replace("\n", "")
    assert "<ins>trained</ins>" in page and "<del>truncated</del>" in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert re.search(r"\.preview ins {[^}]*underline", style) and re.search(r"\.preview del {[^}]*line-through", style)


def test_lengths_are_drawn_with_the_maximum_length_and_the_last_bar_is_no_wider_than_others(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(run.data, **whole_data())
    _, page = written(run)
    assert page.count("<svg") == 7 and page.count('aria-label="Rows by their length"') == 2
    assert page.count("max_length 64</text>") == 2
    assert "contains all longer rows; the longest has 7,777 tokens" in page
    drawing = page[page.index('aria-label="Rows by their length"') :]
    below = re.findall(r"text-anchor: middle[^>]*>([\d,]+)</text>", drawing[: drawing.index("</svg>")])
    assert below == ["0", "20", "40", "60", "80"]
    assert "font-family" not in drawing[: drawing.index("</svg>")]
    update(run.data, max_length=8192)
    _, page = written(run)
    assert "max_length 8" not in page and "The maximum length, 8,192, is larger than the longest row." in page


@pytest.mark.parametrize(
    "histogram",
    [
        None,
        {},
        {"edges": [1, 2], "counts": []},
        {"edges": [1, 2, 3], "counts": [1]},
        {"edges": [2, 1], "counts": [1]},
    ],
)
def test_lengths_that_are_no_histogram_are_not_drawn(tmp_path: Path, histogram: Any) -> None:
    run = sample_run(tmp_path)
    update(run.data, length_histogram=histogram)
    assert "Length of the rows" not in written(run)[1]


def test_null_in_data_json_never_stops_the_report(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(run.data, **dict.fromkeys(whole_data()))
    assert "## Data" in written(run)[0]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("data.json", {"train_rows": "many"}, "train_rows is 'many', but a whole number is expected"),
        ("data.json", {"warnings": "look"}, "warnings is 'look', but a list is expected"),
        ("data.json", {"labels": [3]}, r"labels is \[3\], but an object is expected"),
        ("data.json", {"length_histogram": {"edges": [0, None]}}, r"length_histogram.edges\[1\] is None"),
        ("data.json", {"columns": [{"rows": 1.5}]}, r"columns\[0\].rows is 1.5, but a whole number is expected"),
        ("eval.json", {"samples": [{"prompt": True}]}, r"samples\[0\].prompt is True, but text is expected"),
        ("metrics.json", {"smoke": 1}, "smoke is 1, but true or false is expected"),
        ("plan.json", {"batch": {"effective": {}}}, "batch.effective is {}, but a whole number is expected"),
        ("train.json", {"seconds": "9"}, "seconds is '9', but a number is expected"),
        ("merge.json", {"limit": {"kl_nats": 1}}, "limit.kl_nats is 1, but text is expected"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_file(
    tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    run = sample_run(tmp_path)
    update(tmp_path / file, **change)
    with pytest.raises(DataError, match=message) as caught:
        write_report(run)
    assert str(caught.value).startswith(f"{tmp_path / file}: ") and "run the stage" in str(caught.value)


def test_worse_is_called_worse(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(run.metrics, base=_metrics_of(ADAPTER), adapter=_metrics_of(BASE))
    report, _ = written(run)
    assert "Exact match fell from 0.781 to 0.013 on 160 held-out rows. That is worse than the base." in report
    assert "−0.769 worse" in report and "+4.245 worse" in report
    assert "98.1 % of the adapter's answers did not stop within 16 tokens." in report


def test_small_difference_is_called_unsettled(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(run.metrics, base={**_metrics_of(BASE), "exact_match": 0.75})
    assert "the two 95 % intervals overlap: 160 rows are too few to be sure." in written(run)[0]


def test_the_head_names_model_task_method_and_dtype(tmp_path: Path) -> None:
    for text in written(sample_run(tmp_path)):
        assert "TinyPixel/Llama-2-7B-bf16-sharded · causal-lm · lora · float16" in text


def test_the_stages_of_a_run_name_the_method_of_each(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    for number, method in ((1, "lora"), (2, "ia3")):
        stage = run.stage(number, method)
        recipe = load_recipe(PRODUCTS, [f"adapter={{method: {method}}}"]).recipe
        save(stage.plan, make_plan(recipe, T4, LLAMA, lambda adapter: Trained(1000)).as_json())
        write_json(stage.train, {"schema": 1, **_train()})
        write_metrics(stage, [])
    report, _ = written(run)
    rows = [line.split("|")[1:3] for line in report.splitlines() if line.startswith(("| 1-", "| 2-", "| 3 "))]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["1-lora", "lora"],
        ["2-ia3", "ia3"],
        ["3 (this run)", "lora"],
    ]


@pytest.mark.parametrize(
    ("command", "resume"),
    [
        ("peftcli train r.yaml --overwrite --output-dir 'a b'", "peftcli train r.yaml --output-dir 'a b' --resume"),
        ("peftcli train /home/ada/r.yaml --resume", "peftcli train ~/r.yaml --resume"),
        ("peftcli train 'r.yaml", "peftcli train RECIPE --resume"),
        (None, "peftcli train RECIPE --resume"),
    ],
)
def test_a_stopped_run_says_the_command_that_continues_it(tmp_path: Path, command: str | None, resume: str) -> None:
    run = sample_run(tmp_path)
    update(run.environment, command=command)
    update(run.train, status="stopped")
    write_metrics(run, GATES)
    _, page = written(run)
    assert f"Training stopped early after 600 steps; `{resume}` continues it." in Tags(page).text


@pytest.mark.parametrize(
    ("status", "sentence"), [("stopped", "stopped early after 600"), ("diverged", "diverged after")]
)
def test_status_is_said_in_words(tmp_path: Path, status: str, sentence: str) -> None:
    run = sample_run(tmp_path)
    update(run.metrics, status=status)
    assert all(sentence in text for text in written(run))


def test_classification_metrics_are_shown(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    update(
        run.metrics,
        base={"accuracy": 0.5, "f1": 0.4},
        adapter={"accuracy": 0.9, "f1": 0.8, "brier": 0.1},
        merged=None,
    )
    report, _ = written(run)
    assert "F1 rose from 0.400 to 0.800" in report
    assert "| Accuracy ↑ | 0.500 | **0.900** | – | +0.400 better |" in report
    assert "| brier | – | **0.1** | – | – |" in report


def test_log_survives_a_torn_end_a_repeated_step_and_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    run = sample_run(tmp_path)
    rows = [
        *log_rows(40),
        {"step": 20, "loss": 1.25},
        {"step": 45, "loss": math.nan},
        {"step": 50, "eval_loss": 1.0},
    ]
    write_text(run.log, "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5')
    report, page = written(run)
    assert "| 20 | 1.250 | – | – | – |" in report and "| 45 | – |" in report
    assert "1 logged step has no finite loss" in page


def test_long_log_keeps_its_spikes_and_a_small_page(tmp_path: Path) -> None:
    from peftcli.report.plots import thinned

    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= 710 and (54_321.0, 9.0) in kept
    run = sample_run(tmp_path)
    write_text(run.log, "".join(json.dumps(row) + "\n" for row in log_rows(20_000, 1)))
    assert len(written(run)[1]) < 400_000


def test_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"contains no finished stage; run `peftcli train RECIPE --output-dir \S+` first"
    ) as caught:
        write_report(RunDir(tmp_path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ('{"schema": 2}', "has schema 2"), ("[]", "None")]
)
def test_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    run = sample_run(tmp_path)
    run.eval.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        write_report(run)
    assert str(run.eval) in str(caught.value)


def test_report_imports_nothing_heavy_and_says_nothing(tmp_path: Path) -> None:
    sample_run(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from peftcli.report.build import write_report; "
        "from peftcli.run_dir import RunDir; assert 'matplotlib' not in sys.modules; "
        f"write_report(RunDir(Path({str(tmp_path / 'run')!r}))); "
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib.pyplot'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    fresh = {
        **os.environ,
        "MPLCONFIGDIR": str(tmp_path / "fonts"),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=fresh, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_colours_can_be_read_in_both_schemes() -> None:
    style = (Path(importlib.import_module("peftcli.report.html").__file__ or "").parent / "page.css").read_text()
    light, dark = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in style.split("@media")[:2]]

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    pairs = [("ink", "paper"), ("quiet", "paper"), ("accent", "paper"), ("ink", "wash"), ("ink", "warn-wash")]
    pairs += [(tone, ground) for tone in ("good", "bad", "warn") for ground in ("paper", f"{tone}-wash")]
    for scheme in (light, dark):
        for text, ground in pairs:
            low, high = sorted((luminance(scheme[text]), luminance(scheme[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize("name", ["format", "plots", "markdown", "terminal"])
def test_examples_of_the_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"peftcli.report.{name}")).failed == 0


OPEN = ("dropped", "dropped_examples", "packages", "trainer", "limit", "limits_met", "types", "first", "metrics")
OPEN += ("labels.train", "labels.test", "columns[]", "base", "adapter")
"""Objects whose keys are values: names of packages, reasons, classes, metrics."""


def key_paths(value: Any, path: str = "") -> set[str]:
    """The keys of a file, all items of a list as one; keys that are values are left out."""
    if isinstance(value, list):
        return {found for part in value for found in key_paths(part, f"{path}[]")}
    if not isinstance(value, dict) or path.removeprefix(".").endswith(OPEN):
        return set()
    below = {f"{path}.{key}".removeprefix("."): part for key, part in value.items()}
    return below.keys() | {found for key, part in below.items() for found in key_paths(part, key)}


def test_the_run_of_these_tests_has_only_keys_that_a_run_writes(
    real_run: Path, label_data: list[dict[str, Any]]
) -> None:
    written_by_data = {path for data in label_data for path in key_paths(data)}
    for name, make in STAGES.items():
        real = key_paths(json.loads((real_run / name).read_text(encoding="utf-8")))
        by_hand = key_paths(make())
        if name == "data.json":
            real |= written_by_data
            by_hand |= key_paths(whole_data())
        assert by_hand - real == set(), name
