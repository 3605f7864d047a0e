"""What comes into an export beside the weights, and what must not."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from ercsvd_deploy.format.files.sidecars import licences, sidecars
from ercsvd_deploy.pipelines.inputs.model import MODEL_FILES, NOT_FETCHED

SERVED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tool_use.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "configuration_custom.py",
    "tokenization_custom.py",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "LICENSE",
    "LICENSE.txt",
    "license.md",
    "LICENCE",
    "Llama-LICENSE.txt",
    "COPYING",
    "NOTICE.md",
    "Notice.txt",
    "USE_POLICY.md",
)
MISLEADING = (
    "consolidated.safetensors",
    "consolidated.00.pth",
    "params.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.bin",
    "vocab.pkl",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "hf_quant_config.json",
    "adapter_config.json",
    "config.json",
    "model.gguf",
    ".gitattributes",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in (*SERVED, *MISLEADING):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_served_files_come_and_misleading_ones_do_not(source: Path) -> None:
    found = sidecars(source)
    assert found.keys() == set(SERVED)
    assert all(path == source / name for name, path in found.items())


def test_all_of_them_are_fetched_from_the_hub() -> None:
    fetched = [*SERVED, "additional_chat_templates/tool.jinja", "1_Pooling/config.json", "README.md"]
    for name in fetched:
        assert any(fnmatchcase(name, pattern) for pattern in MODEL_FILES), name
        assert not any(fnmatchcase(name, pattern) for pattern in NOT_FETCHED), name
    for name in ("consolidated.safetensors", "original/consolidated.00.pth", "original/tokenizer.model"):
        assert any(fnmatchcase(name, pattern) for pattern in NOT_FETCHED), name


def test_folders_of_templates_and_modules(tmp_path: Path) -> None:
    for name in (
        "additional_chat_templates/tool_use.jinja",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "2_Dense/deeper/config.json",
        "checkpoint-100/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert sidecars(tmp_path).keys() == {
        "modules.json",
        "additional_chat_templates/tool_use.jinja",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/deeper/config.json",
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[3]",
        '[{"path": 3}]',
        *(json.dumps([{"path": path}]) for path in ("../secret", "/etc", "..", ".", "link", "a\x00")),
    ],
)
def test_modules_cannot_reach_outside(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.json").write_text("{}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "link").symlink_to(tmp_path / "secret")
    (model / "modules.json").write_text(content)
    (model / "optimizer.json").write_text("{}")
    assert sidecars(model).keys() == {"modules.json"}


def test_links_are_followed_to_files_of_their_name_alone(tmp_path: Path) -> None:
    other, model = tmp_path / "other", tmp_path / "model"
    for folder in (other, model / "1_Pooling"):
        folder.mkdir(parents=True)
    for name in ("key", "tokenizer.json", "config.json"):
        (other / name).write_text("{}")
    (model / "modules.json").write_text('[{"path": "1_Pooling"}]')
    (model / "LICENSE").symlink_to(other / "key")
    (model / "1_Pooling" / "secrets.json").symlink_to(other / "key")
    (model / "1_Pooling" / "config.json").symlink_to(other / "config.json")
    (model / "tokenizer.json").symlink_to(other / "tokenizer.json")
    (model / "generation_config.json").symlink_to(model / "modules.json")
    assert sidecars(model).keys() == {
        "modules.json",
        "tokenizer.json",
        "generation_config.json",
        "1_Pooling/config.json",
    }
    assert licences(model) == []


def test_folders_that_are_named_like_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    (tmp_path / "LICENSE").mkdir()
    assert sidecars(tmp_path) == {}
    assert licences(tmp_path) == []


def test_licences_without_and_with_notices(source: Path) -> None:
    assert licences(source) == [
        "COPYING",
        "LICENCE",
        "LICENSE",
        "LICENSE.txt",
        "Llama-LICENSE.txt",
        "license.md",
    ]
    assert set(licences(source, with_notices=True)) - set(licences(source)) == {
        "NOTICE.md",
        "Notice.txt",
        "USE_POLICY.md",
    }
