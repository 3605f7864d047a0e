"""What a stage's result depends on: the code that computes it, the device's model and its settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ercsvd_deploy
from ercsvd_deploy.pipelines.stages import STAGES
from ercsvd_deploy.pipelines.state import code_version as versions
from ercsvd_deploy.pipelines.state.code_version import code_version
from ercsvd_deploy.pipelines.state.device_identity import device_identity

FACTORIZE = "ercsvd_deploy.pipelines.stages.factorize.stage"
QUANTIZE = "ercsvd_deploy.pipelines.stages.quantize.stage"
JUDGE = "ercsvd_deploy.pipelines.stages.judge"
EXPORT = "ercsvd_deploy.pipelines.stages.export"
COMPUTE = {FACTORIZE, QUANTIZE, JUDGE}
ALL = COMPUTE | {EXPORT}


def forget() -> None:
    versions._parsed.cache_clear()
    code_version.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package whose files may be changed."""
    source = Path(ercsvd_deploy.__file__).parent
    copy = tmp_path / "ercsvd_deploy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.txt"))
    monkeypatch.setattr(ercsvd_deploy, "__file__", str(copy / "__init__.py"))
    forget()
    yield copy
    forget()


CHANGES = {
    "linalg/symmetric.py": ALL,
    "linalg/compensation.py": {FACTORIZE},
    # What words of integers hold, names and shapes of tensors, and weights as they are read.
    "format/integer_words.py": ALL,
    "format/schema.py": ALL,
    "format/storage.py": ALL,
    "format/stored_names.py": COMPUTE,
    "format/files/store_views.py": ALL,
    "format/files/stacked_matrices.py": ALL,
    "quantization/gptq_loop.py": None,  # whoever needs it, quantize does
    "evaluation/comparison.py": {JUDGE},
    "models/streaming/ends.py": COMPUTE,
    "models/streaming/layerwise.py": COMPUTE,
    "pipelines/stages/factorize/linear.py": None,
    "pipelines/stages/judge.py": {JUDGE},
    "pipelines/stages/contract.py": set(),
    "pipelines/reporting/card.py": set(),
    "pipelines/cli/app.py": set(),
    "pipelines/planning/feasibility.py": set(),
    "recipe/messages.py": set(),
    "exporters/vllm/directory/writer.py": {EXPORT},
    "format/files/shards.py": {EXPORT},
    "format/files/manifest.py": {EXPORT},
    "format/auto_round.py": {EXPORT},
    "format/compressed_tensors.py": {EXPORT},
    "exporters/vllm/plugin.py": set(),
    "exporters/vllm/cutting.py": set(),
    "pipelines/stages/sizes.py": set(),
}
NEEDS = {"quantization/gptq_loop.py": QUANTIZE, "pipelines/stages/factorize/linear.py": FACTORIZE}


@pytest.mark.parametrize("file", CHANGES)
def test_code_counts_where_it_computes(file: str, package: Path) -> None:
    before = {stage: code_version(stage) for stage in ALL}
    assert all(before.values())
    with (package / file).open("a") as source:
        source.write("\nSOMETHING_NEW = 1\n")
    forget()
    changed = {stage for stage in ALL if code_version(stage) != before[stage]}
    expected = CHANGES[file]
    assert changed == expected if expected is not None else NEEDS[file] in changed


def test_prose_does_not_count(package: Path) -> None:
    before = {stage: code_version(stage) for stage in ALL}
    for file in package.rglob("*.py"):
        text = file.read_text()
        text = text.replace('"""Return', '"""Give back', 1)
        text = re.sub(r'(raise \w+\(f?"|description=")', r"\1More plainly: ", text)
        file.write_text(f"# another comment\n\n{text}")
    forget()
    assert {stage: code_version(stage) for stage in ALL} == before


def test_every_stage_has_a_version() -> None:
    assert all(len(code_version(stage.__module__)) == 64 for stage in STAGES)
    assert code_version("tests.state.test_fingerprint") == ""


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_is_its_model_not_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    first = device_identity(torch.device("cuda"))
    assert first == device_identity(torch.device("cuda:0")) == device_identity(torch.device("cuda:3"))
    assert first["model"] == "NVIDIA H100 80GB HBM3"
    assert first != device_identity(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A10G")
    assert device_identity(torch.device("cuda")) != first


SETTINGS = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "MKL_CBWR", "ATEN_CPU_CAPABILITY")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_that_change_numbers_count(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    before = device_identity(torch.device(device))
    monkeypatch.setenv(name, "1")
    assert device_identity(torch.device(device)) != before


@pytest.mark.usefixtures("one_gpu")
def test_matmul_precision_counts() -> None:
    before = device_identity(torch.device("cuda"))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert device_identity(torch.device("cuda")) != before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert device_identity(torch.device("cuda")) == before


def test_what_decomposes_on_the_host_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = device_identity(torch.device("cpu"))
    assert "BLAS_INFO" in before["blas_of_the_host"]["torch"]
    assert before["blas_of_the_host"]["scipy"] != "unknown"
    shown = torch.__config__.show()
    monkeypatch.setattr(torch.__config__, "show", lambda: shown.replace("BLAS_INFO=mkl", "BLAS_INFO=open"))
    assert device_identity(torch.device("cpu")) != before
