"""Fuzz: texts and conversations to calibrate on, and what an interrupted run left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ercsvd_deploy.data.conversations import open_images, read_conversations
from ercsvd_deploy.data.documents import read_documents
from ercsvd_deploy.data.images import DamagedImageError
from ercsvd_deploy.data.rows import jsonl_rows, read_text
from ercsvd_deploy.data.texts import (
    CalibrationError,
    Tokenizer,
    load_tokenizer,
    sample_windows,
    token_windows,
)
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from tests.conftest import ModelDirectory
from tests.fuzz.strategies import FuzzLog, as_json, cases, damaged_bytes, damaged_values, listing
from tests.tiny_models import VOCAB_SIZE

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
DOCUMENTS = [{"text": "def f(x):\n    return x + 1\n" * 3, "id": number} for number in range(4)]
FINGERPRINT = {
    "model": {"model.safetensors": "0123"},
    "factorize": {"beta": 0.1},
    "libraries": {"torch": "2"},
}
VALUES = {"loss": 0.25, "ranks": {"q_proj": 16, "k_proj": None}, "worst": float("inf"), "names": ["a", "b"]}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: ModelDirectory) -> Tokenizer:
    return load_tokenizer(str(tiny_model("llama")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz-data")


def as_lines(records: Any) -> bytes:
    return b"\n".join(map(as_json, records if isinstance(records, list) else [records]))


def text_of(path: Path) -> str:
    """The text of JSON lines; conversations cannot be rendered here."""

    def refuse(_messages: list[dict[str, Any]]) -> str:
        raise CalibrationError("no chat template")

    return "\n\n".join(read_documents(str(path), jsonl_rows(path), "text", refuse).texts)


def windows_of(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    return sample_windows(token_windows(text, tokenizer, 16, VOCAB_SIZE), 2, seed=0)


@cases(250)
@given(content=damaged_values(DOCUMENTS).map(as_lines) | damaged_bytes(as_lines(DOCUMENTS)))
@example(content=b'{"text": ' + b"9" * 5000 + b"}")
@example(content=b'{"text": "' + b"abcd " * 50 + b'\\ud800"}')
@example(content=b'{"text": ' + b"[" * 100_000)
def test_damaged_json_lines(content: bytes, folder: Path, tokenizer: Tokenizer, fuzz_log: FuzzLog) -> None:
    path = folder / "lines.jsonl"
    path.write_bytes(content)
    text = fuzz_log.attempt("calibration JSON lines", lambda: text_of(path), named=path.name)
    if text is not None:
        windows = fuzz_log.attempt("calibration windows", lambda: windows_of(text, tokenizer))
        assert windows is None or windows.shape == (2, 16)


@cases(150)
@given(content=damaged_bytes("Ein Text, mit Umlauten: äöü, und mehr. ".encode() * 4) | st.binary(max_size=80))
def test_damaged_texts(content: bytes, folder: Path, tokenizer: Tokenizer, fuzz_log: FuzzLog) -> None:
    path = folder / "text.txt"
    path.write_bytes(content)
    text = fuzz_log.attempt("calibration text", lambda: read_text(path), named=path.name)
    if text is not None:
        windows = fuzz_log.attempt("calibration windows", lambda: windows_of(text, tokenizer))
        assert windows is None or windows.shape == (2, 16)


def embedded_conversations() -> list[Any]:
    lines = (PICTURES / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    return [json.loads(line) for line in lines]


@cases(250)
@given(
    content=damaged_values(embedded_conversations()).map(as_lines)
    | damaged_values(embedded_conversations()).map(as_json)
    | damaged_bytes(as_lines(embedded_conversations()))
)
def test_damaged_conversations(content: bytes, folder: Path, fuzz_log: FuzzLog) -> None:
    path = folder / "conversations.jsonl"
    path.write_bytes(content)

    def read() -> int:
        found = read_conversations(path, image_root=PICTURES)
        for conversation in found:
            try:
                assert all(image.mode == "RGB" for image in open_images(conversation))
            except DamagedImageError as error:  # counted and named in a report, not fatal
                fuzz_log.refuse("picture", str(error))
        return len(found)

    found = fuzz_log.attempt("conversations", read)
    assert found is None or found > 0


@cases(200)
@given(data=st.data())
def test_damaged_work_is_done_again_never_reused(
    data: st.DataObject, folder: Path, fuzz_log: FuzzLog
) -> None:
    """Whatever happened to a finished piece: it is found as it was, or not at all."""
    stage = folder / "stage"
    work = CacheFolder(stage, FINGERPRINT)
    tensors = {"weight": torch.arange(6.0)}
    work.write("layer", VALUES, tensors)
    assert work.entry("layer") == VALUES
    whole = {path.name: path.read_bytes() for path in stage.iterdir()}
    name = data.draw(st.sampled_from(sorted(whole)))
    damage = damaged_bytes(whole[name])
    if name.endswith(".json"):
        damage = damage | damaged_values(json.loads(whole[name])).map(as_json)
    (stage / name).write_bytes(data.draw(damage))
    others = {path: seen for path, seen in listing(folder).items() if not path.startswith("stage")}

    def found_again() -> Any:
        return CacheFolder(stage, FINGERPRINT).entry("layer")

    found = fuzz_log.attempt("finished work", found_again)
    assert found in (None, VALUES)
    if found is not None:
        assert (stage / "layer.safetensors").read_bytes() == whole["layer.safetensors"]
    assert {path: seen for path, seen in listing(folder).items() if not path.startswith("stage")} == others
