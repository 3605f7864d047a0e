"""An export is verified tensor by tensor and file by file; whatever was changed is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ercsvd_deploy.format.files.manifest import MANIFEST_FILE, ManifestError, verify_export, write_manifest
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from ercsvd_deploy.pipelines.reporting.report.files import REPORT_FILES
from ercsvd_deploy.pipelines.stages.export import CARD_FILE, PAGE_FILE
from tests.recipe_runs import invoke

WEIGHTS = "model.safetensors"


@pytest.fixture
def export(finished_export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_export, tmp_path / "out"))


def change_tensor(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def drop_tensor(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def add_tensor(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS) | {"extra": torch.zeros(1)}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def change_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["rms_norm_eps"] = 1.0
    (directory / "config.json").write_text(json.dumps(config))


def future_format(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (directory / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor": (change_tensor, "tensor model.norm.weight: changed since the export was written"),
    "missing tensor": (drop_tensor, "tensor model.norm.weight: missing"),
    "surplus tensor": (add_tensor, "tensor extra: was not part of the export"),
    "truncated": (lambda d: os.truncate(d / WEIGHTS, 5000), "not a complete safetensors file"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "model.safetensors"),
    "config": (change_config, "config.json: changed since the export was written"),
    "newer format": (future_format, "config.json: "),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "more weights": (
        lambda d: (d / "other.safetensors").write_bytes((d / WEIGHTS).read_bytes()),
        "other.safetensors: was not part of the export",
    ),
    "a pipe": (lambda d: os.mkfifo(d / "pipe"), "pipe: was not part of the export"),
    "a dangling link": (lambda d: (d / "link").symlink_to("nowhere"), "link: was not part of the export"),
    "more files": (lambda d: (d / "evil.py").write_text("pass"), "evil.py: was not part of the export"),
}


def test_an_export_is_sound(export: Path) -> None:
    status, output, _ = invoke("verify", export, "--json")
    assert status == 0
    found = json.loads(output)
    assert found["sound"]
    assert found["num_tensors"] == len(load_file(export / WEIGHTS))
    assert "sound" in invoke("verify", export)[1]
    # The card is the user's to change, and a model is sound without its report.
    (export / CARD_FILE).write_text("# Mine\n")
    (export / PAGE_FILE).unlink()
    (export / REPORT_FILE).unlink()
    assert invoke("verify", export)[0] == 0


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind: str, export: Path) -> None:
    damage, expected = DAMAGE[kind]
    damage(export)
    status, _, error = invoke("verify", export)
    assert status == 1
    assert expected in error
    assert "Traceback" not in error
    assert "error: 1" not in error


def test_resharded_copies_are_recognised(export: Path) -> None:
    tensors = load_file(export / WEIGHTS)
    (export / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, export / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in halves.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (export / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not verify_export(export, unlisted=REPORT_FILES).problems


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (None, "has no"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"manifest_version": 1}', "damaged"),
        ('{"manifest_version": 1, "files": {"a": 1}, "tensors": {}, "written_by": "x"}', "damaged"),
        ('{"manifest_version": 1, "files": {}, "tensors": {}}', "damaged"),
    ],
)
def test_without_a_manifest(contents: str | None, expected: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / MANIFEST_FILE).write_text(contents)
    with pytest.raises(ManifestError, match=expected):
        verify_export(tmp_path)
    with pytest.raises(ManifestError, match="no such directory"):
        verify_export(tmp_path / "nowhere")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**9), flip=st.integers(1, 255))
def test_any_flipped_byte_of_the_weights_is_noticed(
    position: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("flipped")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}.weight": torch.randn(4, 4, generator=generator) for i in range(3)}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / "config.json").write_text("{}")
    write_manifest(directory)
    contents = bytearray((directory / WEIGHTS).read_bytes())
    # The header holds metadata and spaces too, which nothing reads.
    start = 8 + int.from_bytes(contents[:8], "little")
    contents[start + position % (len(contents) - start)] ^= flip
    (directory / WEIGHTS).write_bytes(contents)
    problems = [problem for problem in verify_export(directory).problems if problem.startswith("tensor")]
    assert len(problems) == 1
    assert problems[0].endswith("changed since the export was written")
