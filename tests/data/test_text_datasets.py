"""Texts and conversations as people have them become windows of tokens; what cannot is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from ercsvd_deploy.data import texts
from ercsvd_deploy.data.texts import CalibrationError, Tokenizer, load_tokenizer, tokenize
from ercsvd_deploy.pipelines.inputs.texts import apportion, calibration_windows, read_windows
from ercsvd_deploy.recipe.sections import (
    Calibration,
    HubDataset,
    JsonLines,
    ParquetFile,
    SavedDataset,
    TextFile,
)

ROOT = Path(__file__).parents[2]
VOCAB = 4096
LENGTH = 16
TURNS = [
    {"role": "user", "content": "What does this function return?"},
    {"role": "assistant", "content": "The sum of both of its arguments, nothing else."},
]
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Shape:\n    def area(self):\n        return 0\n" * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(ROOT / "examples" / "tiny-llama"))


def lines(path: Path, rows: list[Any], *, head: bytes = b"") -> Path:
    data = head + "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def template(tokenizer: Tokenizer, turns: list[dict[str, Any]]) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    return ids


def windows(tokenizer: Tokenizer, dataset: Any) -> torch.Tensor:
    return read_windows(dataset, tokenizer, LENGTH, VOCAB).tokens


CONVERSATIONS: dict[str, tuple[str, Any]] = {
    "content as text": ("messages", TURNS),
    "content as parts": (
        "messages",
        [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS],
    ),
    "ShareGPT": (
        "conversations",
        [
            {"from": "human", "value": TURNS[0]["content"]},
            {"from": "gpt", "value": TURNS[1]["content"]},
        ],
    ),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "folder", "parquet", "hub", "hub of lines", "saved", "saved with splits"]
)
def test_conversations_are_rendered_by_the_chat_template(
    tokenizer: Tokenizer, tmp_path: Path, kind: str, form: str
) -> None:
    """Each window begins where a conversation begins, with the template's own tokens."""
    field, turns = CONVERSATIONS[kind]
    rows = [{field: turns, "id": number} for number in range(4)]
    dataset: Any
    if form in ("jsonl", "jsonl.gz"):
        dataset = JsonLines(jsonl=lines(tmp_path / f"chat.{form}", rows))
    elif form == "folder":
        for number in (0, 1):
            lines(tmp_path / f"part-{number}.jsonl", rows[2 * number : 2 * number + 2])
        dataset = JsonLines(jsonl=tmp_path)
    elif form == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
        dataset = ParquetFile(parquet=tmp_path / "chat.parquet")
    elif form == "hub":  # a local directory is read as a dataset on the hub is
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
        dataset = HubDataset(hub=str(tmp_path))
    elif form == "hub of lines":
        lines(tmp_path / "train.jsonl", rows)
        dataset = HubDataset(hub=str(tmp_path))
    else:
        saved = datasets.Dataset.from_list(rows)
        saved = datasets.DatasetDict(train=saved) if form == "saved with splits" else saved
        saved.save_to_disk(str(tmp_path / "saved"))
        dataset = SavedDataset(saved=tmp_path / "saved")
    expected = template(tokenizer, TURNS)
    assert len(expected) >= LENGTH
    assert windows(tokenizer, dataset).tolist() == [expected[:LENGTH]] * 4


def test_short_conversations_fill_a_window_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    short = [{"role": "user", "content": "Hi"}]
    rendered = template(tokenizer, short)
    assert len(rendered) < LENGTH
    count = -(-LENGTH // len(rendered))
    path = lines(tmp_path / "chat.jsonl", [{"messages": short}] * (2 * count))
    assert windows(tokenizer, JsonLines(jsonl=path)).tolist() == [(rendered * count)[:LENGTH]] * 2


def test_a_field_is_named_where_the_default_is_not_meant(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", [{"text": TEXT, "chosen": TURNS}])
    plain = windows(tokenizer, JsonLines(jsonl=path))
    chosen = windows(tokenizer, JsonLines(jsonl=path, field="chosen"))
    assert plain[0].tolist() == tokenize(TEXT, tokenizer)[:LENGTH]
    assert chosen[0].tolist() == template(tokenizer, TURNS)[:LENGTH]


@pytest.mark.parametrize("empty", [None, "", " \n", []])
def test_empty_rows_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path, empty: Any) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": empty}, {"text": TEXT}, {"text": empty}])
    read = read_windows(JsonLines(jsonl=path), tokenizer, LENGTH, VOCAB)
    assert read.notes == ("2 of 3 rows are empty and were left out",)
    assert read.tokens.flatten().tolist() == tokenize(TEXT, tokenizer)[: read.tokens.numel()]


def test_empty_cells_of_parquet_are_not_the_word_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = pa.table({"text": [None, TEXT, None]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    read = read_windows(ParquetFile(parquet=tmp_path), tokenizer, LENGTH, VOCAB)
    assert read.notes == ("2 of 3 rows are empty and were left out",)
    assert read.tokens[0].tolist() == tokenize(TEXT, tokenizer)[:LENGTH]


def test_empty_cells_of_the_hub_are_not_the_word_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [None, TEXT, None]}), tmp_path / "train.parquet")
    read = read_windows(HubDataset(hub=str(tmp_path)), tokenizer, LENGTH, VOCAB)
    assert read.notes == ("2 of 3 rows are empty and were left out",)
    assert read.tokens[0].tolist() == tokenize(TEXT, tokenizer)[:LENGTH]


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_byte_order_marks_and_windows_line_ends(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    expected = tokenize(TEXT, tokenizer)
    for path in (tmp_path / name, tmp_path):
        tokens = windows(tokenizer, TextFile(text=path))
        assert tokens.flatten().tolist() == expected[: tokens.numel()]


def test_a_byte_order_mark_before_json_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"text": TEXT}], head=b"\xef\xbb\xbf")
    assert windows(tokenizer, JsonLines(jsonl=path))[0].tolist() == tokenize(TEXT, tokenizer)[:LENGTH]


def test_a_long_text_is_tokenized_in_pieces(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenize(TEXT * 20, tokenizer)
    monkeypatch.setattr(texts, "_CHARACTERS_AT_ONCE", 500)
    lengths = []

    class Spy:
        bos_token_id = tokenizer.bos_token_id
        chat_template = None

        def __call__(self, text: str, **options: bool) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    pieces = tokenize(TEXT * 20, Spy())  # type: ignore[arg-type]
    assert max(lengths) <= 500
    assert len(lengths) > 5
    assert tokenizer.decode(pieces) == tokenizer.decode(whole)  # type: ignore[attr-defined]
    monkeypatch.setattr(texts, "_CHARACTERS_AT_ONCE", 7)
    assert tokenizer.decode(tokenize("x" * 40, tokenizer)) == "x" * 40  # type: ignore[attr-defined]


def test_every_window_begins_as_a_text_begins(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With a tokenizer that puts a token in front of texts, as Llama's does."""

    class Beginning:
        bos_token_id = 7
        chat_template = None

        def __call__(self, text: str, *, verbose: bool, add_special_tokens: bool) -> Any:
            assert not verbose
            return {"input_ids": [7] * add_special_tokens + tokenizer(text)["input_ids"]}

    (tmp_path / "text.txt").write_text(TEXT)
    calibration = Calibration(
        dataset=TextFile(text=tmp_path / "text.txt"), num_samples=3, sequence_length=LENGTH
    )
    tokens, _ = calibration_windows(calibration, Beginning(), VOCAB)  # type: ignore[arg-type]
    assert tokens[:, 0].tolist() == [7, 7, 7]
    plain = tokenize(TEXT, tokenizer)
    starts = {tuple(plain[start : start + LENGTH - 1]) for start in range(0, len(plain), LENGTH - 1)}
    assert {tuple(window[1:].tolist()) for window in tokens} <= starts


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (10, [1, 1], [5, 5]),
        (10, [3, 1], [8, 2]),
        (7, [1, 1, 1], [3, 2, 2]),
        (2, [0.1, 0.9], [0, 2]),
        (5, [2], [5]),
    ],
)
def test_shares(total: int, shares: list[float], counts: list[int]) -> None:
    assert apportion(total, shares) == counts
    assert sum(counts) == total


def test_several_datasets_with_shares(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 5)
    chat = lines(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 8)
    calibration = Calibration(
        datasets=(TextFile(text=tmp_path / "text.txt", share=3), JsonLines(jsonl=chat)),
        num_samples=8,
        sequence_length=LENGTH,
    )
    tokens, notes = calibration_windows(calibration, tokenizer, VOCAB)
    conversation = template(tokenizer, TURNS)[:LENGTH]
    is_conversation = [window == conversation for window in tokens.tolist()]
    assert sum(is_conversation) == 2
    assert is_conversation.index(True) < 4 <= 7 - is_conversation[::-1].index(True), "in both halves"
    assert notes == ()
    again, _ = calibration_windows(calibration, tokenizer, VOCAB)
    assert torch.equal(tokens, again)


def test_plain_text_for_a_chat_model_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = Calibration(
        dataset=TextFile(text=tmp_path / "text.txt"), num_samples=2, sequence_length=LENGTH
    )
    [note] = calibration_windows(calibration, tokenizer, VOCAB)[1]
    assert "chat template" in note


@pytest.mark.parametrize(
    ("rows", "field", "told"),
    [
        ([{"body": TEXT}], None, "no field 'text', 'messages'"),
        ([{"text": TEXT}], "body", "no field 'body'; it has: text"),
        ([{"text": 5}], None, "must be text or a list of messages"),
        ([{"text": {"a": 1}}], None, "must be text or a list of messages"),
        ([{"text": TEXT}, {"text": TURNS}], None, "rows.jsonl:2: holds a conversation"),
        ([{"text": None}, {"text": ""}], None, "no text in 2 rows"),
        ([{"messages": ["hello"]}], None, "message 1: is str; a message has role and content"),
        ([{"messages": [{"content": "x"}]}], None, "message 1: no role; it has: content"),
        ([{"messages": [{"role": "user", "content": 5}]}], None, "its content is int"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
            None,
            "a part of type 'image_url'",
        ),
        ([{"text": "a\ud800b"}], None, "half a surrogate pair"),
        ([5], None, "rows.jsonl:1: is int; each line is a JSON object"),
    ],
)
def test_rows_that_cannot_be_read_are_named(
    tokenizer: Tokenizer, tmp_path: Path, rows: list[Any], field: str | None, told: str
) -> None:
    path = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(CalibrationError) as caught:
        windows(tokenizer, JsonLines(jsonl=path, field=field))
    assert told in str(caught.value)
    assert "rows.jsonl" in str(caught.value)


def test_a_conversation_for_a_model_without_chat_template(tmp_path: Path) -> None:
    class Base:
        bos_token_id = None
        chat_template = None

    path = lines(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    with pytest.raises(CalibrationError, match=r"rows\.jsonl:1: .*no chat template: give plain text"):
        windows(Base(), JsonLines(jsonl=path))  # type: ignore[arg-type]


def test_a_template_without_system_messages_gets_them_in_front() -> None:
    class Strict:
        chat_template = "strict"

        def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool) -> str:
            assert not tokenize
            if messages[0]["role"] != "user":
                raise ValueError("System role not supported")
            return "|".join(message["content"] for message in messages)

    rendered = texts.render_conversation(
        [{"role": "system", "content": "Be brief."}, *TURNS],
        Strict(),  # type: ignore[arg-type]
    )
    assert rendered == f"Be brief.\n\n{TURNS[0]['content']}|{TURNS[1]['content']}"


def test_damaged_and_missing_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    damaged = tmp_path / "rows.parquet"
    damaged.write_bytes(b"PAR1 nothing")
    (tmp_path / "rows.jsonl.gz").write_bytes(b"not gzip")
    empty = tmp_path / "empty"
    empty.mkdir()
    for dataset, told in (
        (ParquetFile(parquet=damaged), "rows.parquet: cannot be read as parquet"),
        (JsonLines(jsonl=tmp_path / "rows.jsonl.gz"), "rows.jsonl.gz: cannot be read"),
        (SavedDataset(saved=empty), "no folder that `save_to_disk`"),
        (JsonLines(jsonl=empty), "the folder has no file named"),
        (TextFile(text=empty), "the folder has no file named"),
    ):
        with pytest.raises(CalibrationError, match=told):
            windows(tokenizer, dataset)
