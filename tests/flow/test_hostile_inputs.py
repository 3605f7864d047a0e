"""Inputs made to do harm, and machines that misbehave: one message, bounded time and memory, nothing lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ercsvd_deploy.exporters.vllm.directory.target import ExportError, check_target
from ercsvd_deploy.models.description.config_sizes import impossible_sizes
from tests.conftest import ModelDirectory
from tests.fuzz.strategies import listing
from tests.importing.original_llava import convert, original_writer
from tests.peak_memory import growth
from tests.recipe_runs import RecipeWriter, factorize, invoke, start
from tests.state.interrupted_runs import hashes
from tests.tiny_models import WEIGHTS_FILE

pytestmark = pytest.mark.slow  # whole runs

NOBODY = 65534
MEMORY = 16 * 2**30  # bytes of addresses that a child process may have; importing torch takes several
COARSE = factorize(rank_multiple="auto")
QUANTIZE = {"quantize": {"bits": 4, "group_size": 32}}
Change = Callable[[Path], None]


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of a model that a test may damage."""
    return shutil.copytree(llama, tmp_path / "model")


def change_config(part: str | None = None, **values: Any) -> Change:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (config if part is None else config[part]).update(values)
        (model / "config.json").write_text(json.dumps(config))

    return change


def change_tensor(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(model: Path) -> None:
        tensors = load_file(model / WEIGHTS_FILE)
        changed = new(tensors[name].clone())
        save_file(tensors | {name: changed}, model / WEIGHTS_FILE, metadata={"format": "pt"})

    return change


def without_tensor(name: str) -> Change:
    def change(model: Path) -> None:
        tensors = load_file(model / WEIGHTS_FILE)
        del tensors[name]
        save_file(tensors, model / WEIGHTS_FILE, metadata={"format": "pt"})

    return change


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[5] = float("nan")
    return tensor


def index_to(target: str) -> Change:
    def change(model: Path) -> None:
        names = load_file(model / WEIGHTS_FILE)
        (model / WEIGHTS_FILE).rename(model / "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(names, target)})
        )
        (model / "folder.safetensors").mkdir()
        (model / "link.safetensors").symlink_to("/etc/hostname")

    return change


def pickled(model: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(model.parent / "harm"),)

    torch.save(Harmful(), model / WEIGHTS_FILE)


def larger_vocabulary(model: Path) -> None:
    """Give the tokenizer the ids of a model with more tokens."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        token: number if number < 3 else number + 1000 for token, number in vocabulary.items()
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(change_tensor(UP, with_nan), f"{UP} holds NaN", id="NaN in a Linear"),
        pytest.param(
            change_tensor("model.norm.weight", with_nan), "norm.weight holds NaN", id="NaN in a norm"
        ),
        pytest.param(
            change_tensor("model.embed_tokens.weight", with_nan), "NaN or infinite", id="NaN in the embedding"
        ),
        pytest.param(change_tensor("lm_head.weight", with_nan), "NaN or infinite", id="NaN in the head"),
        pytest.param(change_tensor(UP, lambda t: t.to(torch.int8)), UP, id="integers"),
        pytest.param(change_tensor(UP, lambda t: t.to(torch.float8_e4m3fn)), UP, id="8-bit floats"),
        pytest.param(change_tensor(UP, lambda t: t[:7]), UP, id="another shape"),
        pytest.param(change_tensor(UP, lambda t: t.view(-1)), UP, id="another number of dimensions"),
        pytest.param(without_tensor(UP), UP, id="a tensor missing"),
        pytest.param(index_to("/etc/passwd"), "'/etc/passwd' is not the name", id="an absolute path"),
        pytest.param(index_to("../x.safetensors"), "is not the name of a safetensors file", id="a path up"),
        pytest.param(index_to("link.safetensors"), "outside the model directory", id="a link out"),
        pytest.param(index_to("folder.safetensors"), "not a complete safetensors file", id="a folder"),
        pytest.param(pickled, "not a complete safetensors file", id="a pickle"),
        pytest.param(
            larger_vocabulary, "tokenizer and model do not belong together", id="another vocabulary"
        ),
        pytest.param(change_config(vocab_size=100), "vocab", id="a smaller vocabulary in the config"),
        pytest.param(change_config(dtype="int8"), "not a floating-point dtype", id="an integer dtype"),
        pytest.param(change_config(hidden_size=2**40), "hidden_size is 1,099,511,627,776", id="absurd size"),
    ],
)
def test_a_bad_model_is_one_message(
    change: Change,
    expected: str,
    model: Path,
    tmp_path: Path,
    write_recipe: RecipeWriter,
) -> None:
    change(model)
    before = listing(model)
    code, output, error = invoke("run", write_recipe(COARSE, QUANTIZE, model={"path": str(model)}))
    assert code == 1
    assert expected in error
    assert "Traceback" not in error + output
    assert "should have had a better message" not in error
    assert listing(model) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "recipe.yaml", ".out.work"}


def test_a_text_model_needs_no_chat_template(model: Path, write_recipe: RecipeWriter) -> None:
    (model / "chat_template.jinja").unlink()
    code, _, error = invoke("run", write_recipe(factorize(), model={"path": str(model)}))
    assert code == 0, error


def test_nan_is_not_imported(tmp_path: Path, tiny_model: ModelDirectory) -> None:
    assert tiny_model("llava").is_dir()
    source = original_writer(tmp_path, tiny_model)()
    change_tensor("model.layers.0.mlp.up_proj.weight", with_nan)(source)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or infinite values"):
        convert(source)
    assert not (source.parent / "imported").exists()


@pytest.mark.parametrize(
    ("family", "part", "sizes"),
    [
        ("llava", "vision_config", {"hidden_size": 10**9}),
        ("llava", "vision_config", {"image_size": 10**6, "patch_size": 1}),
        ("qwen2", None, {"num_hidden_layers": 10**9}),
        ("llama", None, {"hidden_size": 10**9, "intermediate_size": 10**9, "vocab_size": 10**9}),
    ],
)
def test_absurd_sizes_are_refused_without_memory_or_time(
    family: str,
    part: str | None,
    sizes: dict[str, int],
    tiny_model: ModelDirectory,
    tmp_path: Path,
    write_recipe: RecipeWriter,
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_model(family) / "config.json", bare)
    change_config(part, **sizes)(bare)
    found = start("plan", write_recipe(QUANTIZE, model={"path": str(bare)}), memory=MEMORY)
    _, errors = found.communicate(timeout=120)
    assert found.returncode == 1
    assert all(size in errors for size in sizes if size != "patch_size")
    assert "Traceback" not in errors


def test_sizes_of_real_models_are_possible(tiny_model: ModelDirectory) -> None:
    for family in ("llama", "opt", "qwen2", "llava", "llava_next"):
        assert impossible_sizes(json.loads((tiny_model(family) / "config.json").read_text())) == []
    largest = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    assert impossible_sizes(largest | {"vocab_size": 256_000, "max_position_embeddings": 10_485_760}) == []
    assert impossible_sizes({"num_key_value_heads": None, "text_config": {"head_dim": None}}) == []


def test_sizes_are_named_with_what_is_possible() -> None:
    assert impossible_sizes({"hidden_size": 0, "vision_config": {"image_size": 10**4, "patch_size": 1}}) == [
        "hidden_size is 0; it must be from 1 to 262,144",
        "vision_config.image_size 10,000 has more than 1,048,576 patches of 1",
    ]
    assert "a number of 16610 bits" in impossible_sizes({"vocab_size": 10**5000})[0]


BOMB = "\n".join(
    ["l0: &l0 [x]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 200))]
).encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BOMB, "more than 10000 values"),
        (b"a: &a [" + b"[" * 5000, "nested deeper"),
        (b"model: {path: a, path: b}", "key 'path' appears twice"),
        (b"model: !!python/object/apply:os.system ['touch harm']", "is not allowed; write plain YAML"),
        (b"model: {path: a\0b}", "character #x0000 is not allowed"),
        (bytes(range(256)) * 20, "recipe.yaml:2:118: byte 0x80 is not UTF-8"),
        ("model: {path: x}".encode("utf-16"), "is not UTF-8"),
        ("model: {path: x}".encode("utf-32"), "is not UTF-8"),
    ],
)
def test_a_bad_recipe_file_is_one_message(
    content: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(content)
    for command in ("validate", "plan", "run"):
        code, output, error = invoke(command, "recipe.yaml")
        assert (code, output) == (2, "")
        assert error.startswith("error: ")
        assert expected in error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_huge_recipe_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.truncate(100 * 2**20)
    with growth() as grown:
        code, _, error = invoke("validate", tmp_path / "recipe.yaml")
        assert grown() < 50 * 2**20
    assert code == 2
    assert "is larger than 1048576 bytes" in error


@pytest.mark.parametrize(
    "stages",
    [
        [QUANTIZE, factorize()],
        [factorize(), factorize()],
        [QUANTIZE, QUANTIZE],
        [factorize(), QUANTIZE, factorize()],
        [factorize() | QUANTIZE],
    ],
)
def test_stages_in_an_order_that_makes_no_sense(
    stages: list[dict[str, Any]],
    write_recipe: RecipeWriter,
) -> None:
    for command in ("validate", "plan", "run"):
        code, _, error = invoke(command, write_recipe(*stages))
        assert code == 2
        assert "'stages" in error


def test_a_stage_that_would_do_nothing_is_refused(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe({"quantize": {"bits": 4, "group_size": 32, "ignore": ["*"]}})
    for command in ("plan", "run"):
        code, _, error = invoke(command, recipe)
        assert code == 2
        assert "leaves nothing to quantize" in error


def test_an_output_never_replaces_its_source(tmp_path: Path) -> None:
    """Not even where the directory around the source looks like an earlier export."""
    description = {"quant_method": "ercsvd", "format_version": 1, "modules": {}}
    outer = tmp_path / "outer"
    (outer / "models" / "source").mkdir(parents=True)
    (outer / "config.json").write_text(json.dumps({"quantization_config": description}))
    check_target(outer, tmp_path / "elsewhere")
    link = tmp_path / "link"
    link.symlink_to(outer / "models")
    for source in (outer / "models" / "source", link / "source"):
        with pytest.raises(ExportError, match=r"would replace the source model .*: choose another"):
            check_target(outer, source)
        with pytest.raises(ExportError, match="lies inside the source model"):
            check_target(source / "deep" / "er", source)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to write everywhere, if there is one."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """A folder that, unlike pytest's, other users can read."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_read_only_output(
    readable_by_all: Path, llama: Path, excerpts: Path, write_recipe: RecipeWriter
) -> None:
    model = shutil.copytree(llama, readable_by_all / "model")
    texts = shutil.copytree(excerpts, readable_by_all / "texts")
    raw = yaml.safe_load(write_recipe(factorize(), model={"path": str(model)}).read_text())
    recipe = readable_by_all / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw).replace(str(excerpts), str(texts)))
    code, _, error = invoke("run", recipe)
    assert code == 0, error  # imports everything, as root if need be
    for path in [model, *model.iterdir(), texts, *texts.iterdir(), recipe]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    read_only = readable_by_all / "read-only"
    read_only.mkdir(mode=0o555)
    before = listing(readable_by_all)
    with as_nobody():
        for output in (read_only / "out", read_only / "deep" / "out"):
            code, printed, error = invoke("run", recipe, "--output", output)
            assert code == 1
            assert "Permission denied" in error
            assert str(read_only) in error
            assert "Traceback" not in error + printed
    assert listing(readable_by_all) == before


def test_output_below_a_file(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    code, _, error = invoke("run", write_recipe(), "--output", tmp_path / "file" / "out")
    assert code == 1
    assert f"{tmp_path / 'file'} is a file" in error
    assert (tmp_path / "file").read_text() == "precious"


def test_clocks_that_jump_change_nothing(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(COARSE, QUANTIZE, model={"path": str(model)})
    code, _, error = invoke("run", recipe)
    assert code == 0, error
    expected = hashes(tmp_path / "out")
    generator = random.Random(5)
    monkeypatch.setattr(time, "time", lambda: generator.uniform(0, 2e10))
    with monkeypatch.context() as patched:
        patched.setattr("ercsvd_deploy.pipelines.stages.export.write_export", _interrupt)
        assert invoke("run", recipe, "--force")[0] == 130
    for moment in (0, 4_000_000_000):  # 1970 and 2096
        for path in [*model.iterdir(), *(tmp_path / ".out.work").rglob("*")]:
            os.utime(path, (moment, moment))
    shutil.rmtree(tmp_path / "out")
    code, output, _ = invoke("run", recipe, "--json")
    assert code == 0
    report = json.loads(output)
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert all("are used" in note for note in report["resumed"]), report["resumed"]
    assert report["resumed"]
    assert hashes(tmp_path / "out") == expected


def _interrupt(*_arguments: object, **_options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"PATH": {}}', '{"PATH": {"identity": [0, 0, 0, 0]}}']
)
def test_damaged_memory_of_hashes_is_taken_again(
    content: str,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    llama: Path,
) -> None:
    work = tmp_path / ".out.work"
    work.mkdir()
    for name in ("config.json", WEIGHTS_FILE):
        (work / "model-files.json").write_text(content.replace("PATH", str(llama / name)))
    code, _, error = invoke("run", write_recipe(factorize()))
    assert code == 0, error


def test_without_the_compress_extra_one_line_says_so() -> None:
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from ercsvd_deploy.pipelines.cli.entry_point import main\nmain()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 1
    assert found.stderr == "error: typer is not installed: pip install 'ercsvd-deploy[compress]'\n"
