"""Fuzz: indexes, safetensors headers, and the descriptions and checksums of exports."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from ercsvd_deploy.format.files.manifest import MANIFEST_FILE, verify_export, write_manifest
from ercsvd_deploy.format.files.tensor_store import INDEX_FILE, SINGLE_FILE, FileStore
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.pipelines.judging.junit import junit_xml
from ercsvd_deploy.pipelines.reporting.report.check import check_export
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from tests.conftest import ModelDirectory
from tests.fuzz.smallest_report import REPORT
from tests.fuzz.strategies import FuzzLog, as_json, cases, damaged_bytes, damaged_values, listing

pytestmark = pytest.mark.slow  # whole runs

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = {
    "metadata": {"total_size": 384},
    "weight_map": {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND},
}
WHOLE = save(
    {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.empty(0)}
)
HEADER_LENGTH = struct.unpack("<Q", WHOLE[:8])[0]
HEADER: dict[str, Any] = json.loads(WHOLE[8 : 8 + HEADER_LENGTH])
DESCRIPTION: dict[str, Any] = {
    "quant_method": "ercsvd",
    "format_version": 1,
    "written_by": "ercsvd-deploy 0.1.0",
    "modules": {
        "model.layers.0.mlp.up_proj": {"layout": "low_rank", "shape": [64, 32], "rank": 16},
        "model.layers.0.mlp.down_proj": {
            "layout": "dense",
            "shape": [64, 64],
            "weight": {"bits": 4, "group_size": 32, "sym": True},
        },
        "model.layers.1.mlp.up_proj": {
            "layout": "pivoted",
            "shape": [64, 32],
            "rank": 16,
            "pivot_blocks": 4,
            "pivot_rows": {"bits": 8, "group_size": -1, "sym": False},
        },
        "model.layers.1.mlp.down_proj": {
            "layout": "corrected",
            "shape": [64, 64],
            "rank": 8,
            "weight": {"bits": 3, "group_size": 32, "sym": True},
            "factor_b": {"bits": 8, "group_size": -1, "sym": True},
        },
    },
}


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory in a folder of its own, with files beside it that no index may reach."""
    root = tmp_path_factory.mktemp("shards")
    directory = root / "model"
    (directory / "folder.safetensors").mkdir(parents=True)
    save_file({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(2, 8)}, directory / FIRST)
    save_file({"c.weight": torch.ones(16)}, directory / SECOND)
    save_file({"secret": torch.ones(1)}, root / "x.safetensors")
    (directory / "out.safetensors").symlink_to(root / "x.safetensors")
    return directory


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, low_rank_model: ModelDirectory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "export"
    shutil.copytree(low_rank_model("opt"), directory)
    write_manifest(directory, unlisted=frozenset({REPORT_FILE}))
    return directory


def read_index(directory: Path, content: bytes, fuzz_log: FuzzLog) -> None:
    (directory / INDEX_FILE).write_bytes(content)
    store = fuzz_log.attempt("index", lambda: open_directory(directory), named=str(directory))
    if store is not None:
        assert {path.resolve().parent for path in store.files()} == {directory.resolve()}
        assert "secret" not in store.names()


@cases(300)
@given(index=damaged_values(INDEX))
@example(index={"weight_map": {"a.weight": "out.safetensors"}})
@example(index={"weight_map": {"a.weight": "folder.safetensors"}})
def test_damaged_indexes(index: Any, two_shards: Path, fuzz_log: FuzzLog) -> None:
    read_index(two_shards, as_json(index), fuzz_log)


@cases(150)
@given(content=damaged_bytes(as_json(INDEX)))
@example(content=b'{"weight_map": ' + b"9" * 5000 + b"}")
@example(content=b"[" * 100_000)
def test_damaged_index_files(content: bytes, two_shards: Path, fuzz_log: FuzzLog) -> None:
    read_index(two_shards, content, fuzz_log)


def read_weights(path: Path, content: bytes, fuzz_log: FuzzLog) -> None:
    """Every tensor that the header shows can be read, and none is larger than the file."""
    path.write_bytes(content)

    def read() -> dict[str, torch.Tensor]:
        store = FileStore([path])
        tensors = store.read(store.names())
        assert all(tensor.shape == store.info(name).shape for name, tensor in tensors.items())
        return tensors

    tensors = fuzz_log.attempt("weights", read, named=path.name)
    if tensors is not None:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)


@cases(450)
@given(
    header=damaged_values(HEADER),
    length_is_off_by=st.sampled_from([0, 0, 0, 0, 0, 0, 0, -1, 1, -8, 2**31, 2**62]),
    data=st.sampled_from([WHOLE[8 + HEADER_LENGTH :]] * 6 + [b"", b"\0", b"\xff" * 40]),
)
@example(
    header={"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, length_is_off_by=0, data=b""
)
@example(
    header={"a": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 0]}}, length_is_off_by=0, data=b""
)
@example(
    header={"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
    length_is_off_by=0,
    data=b"",
)
def test_damaged_headers(
    header: Any,
    length_is_off_by: int,
    data: bytes,
    tmp_path_factory: pytest.TempPathFactory,
    fuzz_log: FuzzLog,
) -> None:
    text = as_json(header)
    length = struct.pack("<Q", max(len(text) + length_is_off_by, 0))
    read_weights(tmp_path_factory.getbasetemp() / SINGLE_FILE, length + text + data, fuzz_log)


@cases(400)
@given(content=damaged_bytes(WHOLE))
def test_damaged_weight_files(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, fuzz_log: FuzzLog
) -> None:
    read_weights(tmp_path_factory.getbasetemp() / SINGLE_FILE, content, fuzz_log)


@cases(300)
@given(description=damaged_values(DESCRIPTION))
def test_damaged_descriptions(description: Any, fuzz_log: FuzzLog) -> None:
    def read() -> CheckpointConfig:
        config = CheckpointConfig.read(description)
        for module in config.modules.values():
            assert all(side >= 0 for shape in module.tensor_shapes.values() for side in shape)
            assert module.num_parameters > 0
        return config

    config = fuzz_log.attempt("quantization_config", read)
    if config is not None:
        assert CheckpointConfig.read(config.write()) == config


@cases(150)
@given(data=st.data())
def test_damaged_exports(data: st.DataObject, export: Path, fuzz_log: FuzzLog) -> None:
    name = data.draw(st.sampled_from([MANIFEST_FILE, "config.json"]))
    whole = (export / name).read_bytes()
    content = data.draw(damaged_bytes(whole) | damaged_values(json.loads(whole)).map(as_json))
    others = {path: seen for path, seen in listing(export).items() if path != name}
    (export / name).write_bytes(content)
    try:
        found = fuzz_log.attempt("manifest", lambda: verify_export(export, unlisted=frozenset({REPORT_FILE})))
        if found is not None and name == "config.json" and content != whole:
            assert found.problems
        assert {path: seen for path, seen in listing(export).items() if path != name} == others
    finally:
        (export / name).write_bytes(whole)


@cases(250)
@given(content=damaged_values(REPORT).map(as_json) | damaged_bytes(as_json(REPORT)))
def test_damaged_reports(content: bytes, export: Path, fuzz_log: FuzzLog) -> None:
    (export / REPORT_FILE).write_bytes(content)
    results = fuzz_log.attempt("report", lambda: check_export(export), named=str(export))
    if results is not None:
        assert results
        assert "<testcase" in junit_xml(results, str(export))
