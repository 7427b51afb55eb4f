"""Models that name the class of an image, through the command line, and image files as data of strangers."""

import csv
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import merge_sections, prepare_labels, write_yaml
from peft import PeftModel
from PIL import Image, ImageDraw
from torch.nn import BatchNorm2d
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from peftcli.data.image_processor import DAMAGED, EMPTY, HUGE, MISSING, NO_IMAGE, ImageProcessor, pixel_hash, read_image
from peftcli.data.values import SkipRow
from peftcli.model.classification import label_loss, row_logits, task_head
from peftcli.model.load import load_base
from peftcli.progress import Silent
from peftcli.run_dir import read_json, read_log
from peftcli.train.step import TrainerSetup
from peftcli.train.trainers import make_label_trainer

Cli = Callable[..., int]
Write = Callable[..., Path]
KINDS = {"ball": (210, 40, 40), "box": (40, 200, 60), "bars": (50, 60, 220)}


def draw(kind: str, chance: random.Random) -> Image.Image:
    """A shape in the colour of its kind on a dark ground, both a little different each time."""
    image = Image.new("RGB", (32, 32), tuple(chance.randrange(50) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    colour = tuple(part + chance.randrange(-30, 30) for part in KINDS[kind])
    x, y = chance.randrange(2, 9), chance.randrange(2, 9)
    if kind == "ball":
        pen.ellipse((x, y, x + 20, y + 20), fill=colour)
    elif kind == "box":
        pen.rectangle((x, y, x + 20, y + 20), fill=colour)
    else:
        for row in range(y % 3, 32, 6):
            pen.rectangle((0, row, 32, row + 3), fill=colour)
    return image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with 16 images of each of three classes."""
    chance = random.Random(0)
    folder = tmp_path / "photos"
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        for number in range(16):
            draw(kind, chance).save(folder / kind / f"{number:02d}.{'jpg' if number % 4 else 'png'}")
    return folder


@pytest.fixture
def image_recipe(tmp_path: Path, photos: Path) -> Write:
    """A function that writes a small recipe over the photos; keyword arguments replace or add sections."""

    def write(model: str = "tiny:vit", **sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "name": "shapes",
            "model": {"name": model, "task": "image-classification"},
            "adapter": {"r": 8},
            "dataset": {"path": str(photos), "split": {"test_size": 0.25, "seed": 1}},
            "trainer": {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1},
            "evaluation": {"samples": 2},
        }
        return write_yaml(tmp_path, merge_sections(recipe, sections))

    return write


def facts_of(recipe: Path) -> dict[str, Any]:
    return prepare_labels(recipe)[1].facts


@pytest.mark.numeric
@pytest.mark.parametrize("model", ["tiny:vit", "tiny:resnet"])
def test_images_are_learned_evaluated_labelled_and_merged(
    model: str, image_recipe: Write, photos: Path, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = image_recipe(model, trainer={"max_steps": 20})
    assert run_cli("train", recipe) == 0
    run = tmp_path / "runs" / "shapes"
    metrics = read_json(run / "metrics.json")
    assert metrics["adapter"]["accuracy"] >= 0.9 and metrics["adapter"]["labels"] == ["ball", "bars", "box"]
    assert metrics["train"]["rows"] == 144 and metrics["train"]["tokens"] is None
    assert "image" in (run / "report.md").read_text()

    capfd.readouterr()
    assert run_cli("eval", "runs/shapes", "--set", "evaluation.batch_size=5", "--json") == 0
    again = json.loads(capfd.readouterr().out)["adapter"]
    assert again["loss"] == pytest.approx(metrics["adapter"]["loss"], abs=1e-6)

    assert run_cli("generate", "runs/shapes", photos / "box" / "00.png", photos / "ball" / "01.jpg") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("\t")[1].split(" ")[0] for line in lines] == ["box", "ball"]

    assert run_cli("merge", "runs/shapes") == 0
    merge = read_json(run / "merge.json")
    assert merge["top1_agreement"] == 1.0 and merge["max_abs_logit_difference"] < 1e-4
    plain = AutoModelForImageClassification.from_pretrained(run / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(run / "merged", backend="pil")
    with torch.inference_mode():
        logits = plain(**processor(Image.open(photos / "box" / "00.png"), return_tensors="pt")).logits
    assert plain.config.id2label[int(logits.argmax())] == "box"


@pytest.mark.numeric
@pytest.mark.parametrize("model", ["tiny:vit", "tiny:resnet"])
def test_plain_peft_loads_the_adapter_to_the_same_outputs(
    model: str, image_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    recipe = image_recipe(model)
    assert run_cli("train", recipe) == 0
    adapter = tmp_path / "runs" / "shapes" / "adapter"
    plan, data, _ = prepare_labels(recipe)
    config = AutoConfig.from_pretrained(adapter)
    base = AutoModelForImageClassification.from_pretrained(plan.base.path, config=config, ignore_mismatched_sizes=True)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    reader = ImageProcessor(AutoImageProcessor.from_pretrained(adapter, backend="pil"))
    head = task_head(plan.base.labels, plan.base.problem_type, tuned, reader)
    paths, labels = (data.test.column(name).to_pylist() for name in ("image", "labels"))
    logits = row_logits(tuned, paths, None, head, batch_rows=4, progress=Silent(), what="")
    measured = read_json(tmp_path / "runs" / "shapes" / "metrics.json")["adapter"]["loss"]
    assert label_loss(head, logits, labels) == pytest.approx(measured, abs=1e-6)


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Int8FloatLinear")])
def test_quantized_a_vit_keeps_its_head_in_float_and_merges(
    image_recipe: Write, run_cli: Cli, tmp_path: Path, bits: int, kind: str
) -> None:
    recipe = image_recipe(quantization={"bits": bits})
    plan, _, _ = prepare_labels(recipe)
    base = load_base(plan.base)
    assert plan.base.head == ("classifier",) and base.classifier.weight.is_floating_point()
    assert sum(type(part).__name__ == kind for part in base.modules()) == 12
    assert run_cli("train", recipe) == 0
    assert run_cli("merge", "runs/shapes") == 0
    merge = read_json(tmp_path / "runs" / "shapes" / "merge.json")
    assert merge["into"] == "dequantized" and merge["max_abs_logit_difference"] < 0.01


def test_all_linear_means_the_convolutions_of_a_network_without_linear_layers(image_recipe: Write) -> None:
    plan, _, _ = prepare_labels(image_recipe("tiny:resnet"))
    said = {decision.key: decision for decision in plan.decisions}
    assert plan.targets == {"convolution": 16} and said["targets"].value == "16 convolutions"
    assert said["batch norms"].value == "frozen"


@pytest.mark.numeric
def test_training_leaves_the_statistics_of_batch_norms_as_they_were(image_recipe: Write, tmp_path: Path) -> None:
    plan, data, reader = prepare_labels(image_recipe("tiny:resnet"))
    base = load_base(plan.base)
    before = {name: value.clone() for name, value in base.state_dict().items() if "running" in name or "num_b" in name}
    rows = data.test.column("image").to_pylist()
    head = task_head(plan.base.labels, plan.base.problem_type, base, reader)
    outputs = row_logits(base, rows, None, head, batch_rows=4, progress=Silent(), what="")
    trainer = make_label_trainer(TrainerSetup(plan, data, reader), tmp_path / "run" / "checkpoints", base)
    trainer.train()
    tuned = trainer.model
    norms = [part for part in tuned.modules() if isinstance(part, BatchNorm2d)]
    after = {name.replace("base_model.model.", ""): value for name, value in tuned.state_dict().items()}
    assert norms and before and all(torch.equal(after[name], value) for name, value in before.items())
    with tuned.disable_adapter():
        off = row_logits(tuned, rows, None, head, batch_rows=4, progress=Silent(), what="")
    assert torch.equal(torch.stack(outputs), torch.stack(off))


def test_a_convolutional_network_in_4_bit_is_refused_with_the_mend(
    image_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("plan", image_recipe("tiny:resnet", quantization={"bits": 4})) == 2
    assert "consists of convolutions" in capfd.readouterr().err


@pytest.mark.numeric
def test_a_stopped_run_goes_on_to_the_bits_of_an_unbroken_one(
    image_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    recipe = image_recipe(
        adapter={"dropout": 0.1}, evaluation={"baseline": False}, trainer={"max_steps": 4, "save_steps": 2}
    )
    assert run_cli("train", recipe, "--output-dir", "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "stopped" / name)
    for name in ("train.json", "eval.json", "metrics.json"):
        (tmp_path / "stopped" / name).unlink()
    assert run_cli("train", recipe, "--output-dir", "stopped") == 0
    assert read_json(tmp_path / "stopped" / "train.json")["resumed_from_step"] == 2
    one, two = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "stopped"))
    assert one.read_bytes() == two.read_bytes()
    last = [[row["loss"] for row in read_log(tmp_path / name / "log.jsonl")][-2:] for name in ("whole", "stopped")]
    assert last[0] == last[1]


@pytest.mark.numeric
def test_outputs_do_not_depend_on_the_batch(image_recipe: Write) -> None:
    plan, data, reader = prepare_labels(image_recipe())
    base = load_base(plan.base)
    head = task_head(plan.base.labels, plan.base.problem_type, base, reader)
    rows = data.test.column("image").to_pylist()
    one, many = (
        torch.stack(row_logits(base, rows, None, head, batch_rows=size, progress=Silent(), what="")) for size in (1, 8)
    )
    assert torch.allclose(one, many, atol=2e-6)


def test_a_smoke_run_takes_a_stand_in_for_a_model_of_the_hub(image_recipe: Write, run_cli: Cli, tmp_path: Path) -> None:
    assert run_cli("train", image_recipe("someone/resnet-50"), "--smoke") == 0
    plan = read_json(tmp_path / "runs" / "shapes-smoke" / "plan.json")
    assert plan["smoke"] and "tiny random resnet model" in " ".join(plan["notices"])


def png_of(width: int, height: int) -> bytes:
    """A PNG whose head says how large it is, and whose body is a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def test_each_file_that_is_no_image_is_counted_by_reason_with_its_name(image_recipe: Write, photos: Path) -> None:
    whole = (photos / "ball" / "01.jpg").read_bytes()
    (photos / "ball" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "ball" / "none.png").write_bytes(b"")
    (photos / "box" / "notes.txt").write_text("not an image")
    (photos / "box" / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    (photos / "bars" / "bomb.png").write_bytes(png_of(60_000, 60_000))
    (photos / "bars" / "short.png").write_bytes(png_of(64, 64))
    (photos / "loose.png").write_bytes((photos / "box" / "00.png").read_bytes())
    (photos / "bars" / "old").mkdir()
    (photos / "bars" / "old" / "a.png").write_bytes((photos / "box" / "00.png").read_bytes())
    (photos / "nothing").mkdir()
    (photos / ".hidden").mkdir()
    (photos / "ball" / "Thumbs.db").write_bytes(b"x")
    facts = facts_of(image_recipe(dataset={"limits": {"max_dropped": 1.0}}))
    assert facts["rows"] == 48 + 9 and facts["train_rows"] + facts["test_rows"] == 48
    assert facts["dropped"] == {
        DAMAGED: 2,
        EMPTY: 1,
        NO_IMAGE: 2,
        HUGE: 1,
        "outside the class folders": 1,
        "in a subfolder of a class folder": 1,
        "with an empty class folder": 1,
    }
    places = facts["dropped_examples"]
    assert sorted(places[DAMAGED]) == ["photos/ball/cut.jpg", "photos/bars/short.png"]
    assert places["with an empty class folder"] == ["photos/nothing/"]
    assert facts["classes"] == ["ball", "bars", "box"]


def test_equal_images_are_found_under_any_name_and_class(image_recipe: Write, photos: Path) -> None:
    shutil.copy(photos / "box" / "00.png", photos / "box" / "copy.png")
    Image.open(photos / "box" / "04.png").save(photos / "box" / "again.bmp")
    shutil.copy(photos / "ball" / "00.png", photos / "bars" / "wrong.png")
    facts = facts_of(image_recipe(dataset={"limits": {"max_leaked": 1.0}}))
    assert facts["duplicate_rows"] + facts["leaked_rows"] == 2
    assert facts["conflicting_rows"] + facts["leaked_prompts"] - facts["leaked_rows"] == 1
    assert facts["labels"]["train"].keys() == set(KINDS)


def test_a_changed_image_is_read_again(image_recipe: Write, photos: Path) -> None:
    recipe = image_recipe()
    first, second = facts_of(recipe), facts_of(recipe)
    draw("ball", random.Random(9)).save(photos / "ball" / "00.png")
    third = facts_of(recipe)
    assert [first["cache"], second["cache"], third["cache"]] == ["made", "reused", "made"]


def test_a_table_names_images_relative_to_itself(image_recipe: Write, photos: Path, tmp_path: Path) -> None:
    table = photos.parent / "labels.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "kind"])
        writer.writerows([f"photos/{kind}/{number:02d}.png", kind] for kind in KINDS for number in range(0, 16, 4))
        writer.writerows([["photos/box/99.png", "box"], ["", "box"], ["https://example.org/a.png", "box"]])
    columns = {"image": "file", "label": "kind"}
    recipe = image_recipe(dataset={"path": str(table), "columns": columns, "limits": {"max_dropped": 1.0}})
    plan, data, _ = prepare_labels(recipe)
    assert data.labels == ("ball", "bars", "box") and data.facts["train_rows"] + data.facts["test_rows"] == 12
    assert data.facts["dropped_examples"][MISSING] == ["labels.csv:14"]
    assert data.facts["dropped"]["with a URL instead of a file"] == 1
    assert data.test.column("prompt")[0].as_py().startswith("photos/") and plan.base.labels == data.labels
    before = data.facts["fingerprint"]
    draw("box", random.Random(5)).save(photos / "box" / "00.png")
    assert facts_of(recipe)["fingerprint"] != before


def test_test_images_may_have_a_folder_of_their_own(image_recipe: Write, photos: Path, tmp_path: Path) -> None:
    test = photos / "test"
    for kind in KINDS:
        (test / kind).mkdir(parents=True)
        shutil.move(photos / kind / "00.png", test / kind / "00.png")
    recipe = image_recipe(dataset={"test": {"path": str(test)}})
    recipe.write_text(recipe.read_text().replace("  split:\n    test_size: 0.25\n    seed: 1\n", ""))
    facts = facts_of(recipe)
    assert (facts["train_rows"], facts["test_rows"], facts["dropped_rows"]) == (45, 3, 0)


def test_folders_of_folders_are_not_taken_for_classes(
    image_recipe: Write, photos: Path, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "all").mkdir()
    shutil.move(photos, tmp_path / "all" / "train")
    assert run_cli("data", image_recipe(dataset={"path": str(tmp_path / "all")})) == 3
    assert "dataset.path: all/train" in capfd.readouterr().err


def test_an_image_of_any_mode_becomes_rgb_as_it_is_seen(tmp_path: Path) -> None:
    colour = (200, 30, 90)
    plain = Image.new("RGB", (6, 4), colour)
    plain.putpixel((0, 0), (0, 0, 0))
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    plain.convert("RGBA").save(tmp_path / "alpha.png")
    plain.save(tmp_path / "exact.bmp")
    plain.save(tmp_path / "exact.webp", lossless=True)
    digests = {pixel_hash(read_image(tmp_path / name)) for name in ("palette.png", "alpha.png", "exact.bmp")}
    assert digests == {pixel_hash(plain)} == {pixel_hash(read_image(tmp_path / "exact.webp"))}
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((1, 1)) == (155, 155, 155)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    plain.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == (4, 6)
    frames = [Image.new("RGB", (6, 4), shade) for shade in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_no_decoder_is_let_at_a_file_of_another_kind(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.tiff")
    with pytest.raises(SkipRow, match="not an image"):
        read_image(tmp_path / "a.tiff")


def test_a_file_that_cannot_be_labelled_is_named(
    image_recipe: Write, run_cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", image_recipe(trainer={"max_steps": 1}, evaluation={"baseline": False})) == 0
    capfd.readouterr()
    assert run_cli("generate", "runs/shapes", "away.jpg") == 3
    assert "away.jpg: a missing image; pass image files" in capfd.readouterr().err


def test_keys_that_say_nothing_of_images_are_refused(
    image_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = image_recipe(
        dataset={"max_length": 64, "columns": {"text": "text"}},
        trainer={"packing": True},
        evaluation={"temperature": 0.5},
        gates={"entity_f1": ">= 0.5", "accuracy": ">= 0.1"},
        adapter={"method": "prompt", "r": None},
    )
    assert run_cli("validate", recipe) == 2
    said = capfd.readouterr().err
    for key in ("dataset.max_length", "dataset.columns.text", "trainer.packing", "evaluation.temperature"):
        assert key in said
    assert "gates.entity_f1" in said and "gates.accuracy" not in said and "is not supported by" in said


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from peftcli.errors import MachineError

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MachineError, match=r"pip install 'peftcli\[image\]'"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("model", "word", "reason"),
    [("tiny:vit", "eva", "the rows are images"), ("tiny:resnet", "pissa", "a target is a convolution")],
)
def test_a_start_that_cannot_be_had_is_refused(
    model: str, word: str, reason: str, image_recipe: Write, run_cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", image_recipe(model, adapter={"init_lora_weights": word})) == 2
    assert reason in capfd.readouterr().err


def test_a_4bit_vit_is_merged_into_its_full_weights_under_their_older_names(
    image_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    assert run_cli("train", image_recipe(quantization={"bits": 4}, evaluation={"baseline": False})) == 0
    assert run_cli("merge", "runs/shapes", "--into", "original") == 0
    assert read_json(tmp_path / "runs" / "shapes" / "merge.json")["into"] == "original"


def test_another_method_on_convolutions_is_merged_beside_a_trained_head(
    image_recipe: Write, run_cli: Cli, tmp_path: Path
) -> None:
    assert run_cli("train", image_recipe("tiny:resnet", adapter={"method": "loha"})) == 0
    assert run_cli("merge", "runs/shapes") == 0
    assert read_json(tmp_path / "runs" / "shapes" / "merge.json")["max_abs_logit_difference"] < 1e-4


def test_images_may_have_several_classes_or_a_number(
    image_recipe: Write, photos: Path, run_cli: Cli, tmp_path: Path
) -> None:
    table = photos.parent / "labels.jsonl"
    rows = [
        {
            "image": f"photos/{kind}/{number:02d}.{'jpg' if number % 4 else 'png'}",
            "label": [kind, "even"][: 2 - number % 2],
        }
        for kind in KINDS
        for number in range(16)
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_cli("train", image_recipe(dataset={"path": str(table)})) == 0
    metrics = read_json(tmp_path / "runs" / "shapes" / "metrics.json")
    assert metrics["adapter"]["labels"] == ["ball", "bars", "box", "even"] and "f1_micro" in metrics["adapter"]


def test_names_and_links_of_any_kind_are_counted(image_recipe: Write, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for number in range(4):
        draw("box", random.Random(number)).save(tmp_path / "far" / f"{number}.png")
    (photos / "linked").symlink_to(tmp_path / "far")
    (photos / "ball" / "round").symlink_to(photos)  # leads back to itself
    (photos / "ball" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    odd = bytes(photos / "ball") + b"/\xff.png"
    with open(odd, "wb") as file:
        file.write((photos / "ball" / "00.png").read_bytes())
    recipe = image_recipe(dataset={"limits": {"max_dropped": 1.0, "max_leaked": 1.0}})
    facts = facts_of(recipe)
    assert facts["classes"] == ["ball", "bars", "box", "linked"]
    assert facts["dropped"] == {MISSING: 1, "with a lone surrogate (half a character)": 1}
    assert facts["dropped_examples"]["with a lone surrogate (half a character)"] == ["photos/ball/?.png"]


def test_two_folders_are_two_sources_and_classes_keep_their_shares(image_recipe: Write, photos: Path) -> None:
    more = photos.parent / "more"
    shutil.copytree(photos / "box", more / "box")
    shutil.copytree(photos / "ball", more / "heap")
    recipe = image_recipe(dataset={"limits": {"max_leaked": 1.0}, "split": {"test_size": 0.25, "seed": 1}})
    asked = yaml.safe_load(recipe.read_text())
    del asked["dataset"]["path"]
    asked["dataset"] |= {"sources": [{"path": str(photos)}, {"path": str(more)}]}
    asked["dataset"]["split"]["stratify"] = "label"
    recipe.write_text(yaml.safe_dump(asked))
    facts = facts_of(recipe)
    assert facts["rows"] == 80 and facts["classes"] == ["ball", "bars", "box", "heap"]
    assert facts["labels"]["test"] == {"box": 8, "ball": 4, "bars": 4, "heap": 4}
