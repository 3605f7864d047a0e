"""Session fixtures: pico models and compressed checkpoints, written once, shared read-only by all tests."""

from __future__ import annotations

import os
import signal

# Before anything imports transformers or datasets: these are read at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The matrices here are tiny: more threads only wait for each other, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.tiny_models import compress_at_random, materialise, save_tiny_model

if TYPE_CHECKING:
    from tests.fuzz.strategies import FuzzLog
    from tests.recipe_runs import RecipeWriter

_TEXT = Path(__file__).parents[1] / "examples" / "text"
_FACTORIZE = {"method": "svd_llm", "compression_ratio": 0.3, "num_search_samples": 4}
ModelDirectory = Callable[[str], Path]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out GPU tests where there is no GPU, and those of all families or a real model unless asked for.

    They are deselected, and the summary line counts them.
    """
    left_out = [] if torch.cuda.is_available() else ["gpu"]
    left_out += [name for name in ("real", "families") if name not in config.getoption("markexpr")]
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def _only_vllm_tests_ask_vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ercsvd plan` find no vLLM: asking it for kernels costs its import, ten seconds of a core."""
    if request.node.get_closest_marker("vllm") is None:
        monkeypatch.setattr("ercsvd_deploy.exporters.vllm.kernels.choice.find_spec", lambda _name: None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelDirectory:
    """Return family -> directory of a random float32 model (see FAMILIES and VISION_FAMILIES)."""
    return cache(lambda family: save_tiny_model(tmp_path_factory.mktemp(f"{family}-dense"), family))


@pytest.fixture(scope="session")
def low_rank_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelDirectory) -> ModelDirectory:
    """Return family -> directory of `tiny_model(family)` with some Linears low-rank, all in float32."""
    return _compressed(tmp_path_factory, tiny_model, "low-rank", None)


@pytest.fixture(scope="session")
def mixed_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelDirectory) -> ModelDirectory:
    """Return family -> directory with Linears dense or low-rank, float32 or int4, mixed in fused layers."""
    return _compressed(tmp_path_factory, tiny_model, "mixed", {"bits": 4, "group_size": 32, "sym": True})


@pytest.fixture(scope="session")
def materialised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Return compressed directory -> directory of the dense model it stands for."""
    return cache(
        lambda directory: materialise(directory, tmp_path_factory.mktemp(f"{directory.name}-materialised"))
    )


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a random llama of four layers."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", num_layers=4)


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """Let what a test starts heed SIGINT and SIGHUP.

    Processes in a shell's background inherit the one as ignored, those behind `nohup` the other.
    """
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, hang_up)


@pytest.fixture
def write_recipe(tmp_path: Path, llama: Path) -> RecipeWriter:
    """Return a writer of recipes for `llama`: stages and sections -> recipe file."""
    return _recipe_writer(tmp_path, llama)


@pytest.fixture(scope="session")
def finished_export(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Return an export of `llama` with all layers factorized, to be copied before it is changed."""
    from ercsvd_deploy.pipelines.flow import run_recipe
    from ercsvd_deploy.recipe.load import load_recipe

    stage = {"factorize": _FACTORIZE | {"method": "erc_svd", "num_compressed_layers": "all"}}
    write = _recipe_writer(tmp_path_factory.mktemp("finished"), llama)
    return run_recipe(load_recipe(write(stage)))[1]


def _recipe_writer(directory: Path, model: Path) -> RecipeWriter:
    import yaml

    def write(*stages: dict[str, Any], **sections: Any) -> Path:
        recipe = {
            "model": {"path": str(model)},
            "calibration": {
                "dataset": {"text": str(_TEXT / "calibration.txt")},
                "num_samples": 12,
                "sequence_length": 48,
            },
            "stages": list(stages) or [{"factorize": _FACTORIZE | {"method": "erc_svd"}}],
            "evaluation": {"perplexity": {"held_out": str(_TEXT / "in_domain.txt")}, "max_sequences": 4},
            "export": {"path": str(directory / "out")},
        }
        path = directory / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | sections))
        return path

    return write


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pictures of noise and conversations about them."""
    import numpy as np
    from PIL import Image

    from tests.tiny_vision import IMAGE_SIZE

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    lines = []
    for index in range(12):
        width, height = (IMAGE_SIZE * (1 + index % 2), IMAGE_SIZE)
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        turns = [
            {"from": "human", "value": f"<image>\nWhat is picture {index}?"},
            {"from": "gpt", "value": f"noise {index}"},
        ]
        lines.append(json.dumps({"image": f"{index}.png", "conversations": turns}))
    (folder / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def write_picture_recipe(tmp_path: Path, tiny_model: ModelDirectory, pictures: Path) -> RecipeWriter:
    """Return a writer of recipes for `llava` or another `model`, calibrated on pictures too."""
    import yaml

    def write(*stages: dict[str, Any], model: Path | None = None, **sections: Any) -> Path:
        dataset = {"conversations": str(pictures / "conversations.jsonl")}
        recipe = {
            "model": {"path": str(model or tiny_model("llava"))},
            "calibration": {
                "dataset": {"text": str(_TEXT / "calibration.txt")},
                "num_samples": 16,
                "sequence_length": 120,
            },
            "vision": {"calibration": dataset, "share": 0.75},
            "stages": list(stages)
            or [{"factorize": _FACTORIZE | {"num_compressed_layers": "all", "rank_multiple": 8}}],
            "evaluation": {"visual_questions": {"noise": {"dataset": dataset}}},
            "export": {"path": str(tmp_path / "out")},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | sections))
        return path

    return write


@pytest.fixture(scope="session")
def fuzz_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzLog]:
    """Count cases and distinct errors of the fuzz tests; they end in `fuzz.json` below pytest's basetemp."""
    # here: environments of other vLLM releases have neither hypothesis nor the libraries of the pipelines
    from tests.fuzz.strategies import FuzzLog

    log = FuzzLog()
    yield log
    summary = json.dumps(log.summary(), indent=2)
    (tmp_path_factory.getbasetemp() / "fuzz.json").write_text(summary + "\n", encoding="utf-8")


def _compressed(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: ModelDirectory,
    kind: str,
    quantization: Mapping[str, Any] | None,
) -> ModelDirectory:
    @cache
    def write(family: str) -> Path:
        directory = tmp_path_factory.mktemp(f"{family}-{kind}")
        compress_at_random(tiny_model(family), directory, quantization=quantization)
        return directory

    return write
