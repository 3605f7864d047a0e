"""Session fixtures: pico models and compressed checkpoints, written once, shared read-only by all tests."""

from __future__ import annotations

import gc
import os
import signal

# Before anything imports transformers or datasets: these are read at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The matrices here are tiny: more threads only wait for each other, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.gpus import found_gpus, hidden_gpus
from tests.recipe_runs import FACTORIZE, RecipeWriter, recipe_writer
from tests.tiny_models import compress_at_random, materialise, save_tiny_model

if TYPE_CHECKING:
    from tests.fuzz.strategies import FuzzLog

_TEXT = Path(__file__).parents[1] / "examples" / "text"
_EXCERPT = 60_000  # characters, many times what the runs here read; all of a text takes a tokenizer longer
# Hundreds of thousands of objects of imported libraries are searched for garbage otherwise, again and again.
gc.set_threshold(10_000)
# Workers side by side keep to a core each, and so does what they start: those that share cores wait.
ALL_CORES = os.sched_getaffinity(0)
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.sched_setaffinity(0, {sorted(ALL_CORES)[int(worker.removeprefix("gw")) % len(ALL_CORES)]})
ModelDirectory = Callable[[str], Path]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out GPU tests where there is no GPU, and those of all families or a real model unless asked for.

    They are deselected, and the summary line counts them. Files with engines and with whole runs come
    first: what takes minutes must not begin when all other workers have ended.
    """
    left_out = [] if torch.cuda.is_available() else ["gpu"]
    left_out += [name for name in ("real", "families") if name not in config.getoption("markexpr")]
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    slow, engines = (
        {item.path for item in items if item.get_closest_marker(name)} for name in ("slow", "vllm")
    )
    files = list(dict.fromkeys(item.path for item in items))
    # Files with engines in turn with others: two engines at once wait for each other's cores.
    turns = zip_longest(
        [file for file in files if file in engines], [file for file in files if file in slow - engines]
    )
    begun = [file for turn in turns for file in turn if file is not None]
    places = {
        file: place for place, file in enumerate([*begun, *(file for file in files if file not in begun)])
    }
    items.sort(key=lambda item: places[item.path])


@pytest.fixture(autouse=True, scope="session")
def _runs_are_on_the_cpu() -> Iterator[None]:
    """Let runs and the processes that they start find no GPU: what tests expect was computed on CPUs.

    Tests marked `gpu` do find it, and so do those in `tests/vllm`, whose engines run there.
    """
    with hidden_gpus():
        yield


@pytest.fixture(autouse=True)
def _tests_of_a_gpu_find_it(request: pytest.FixtureRequest) -> Iterator[None]:
    """See `_runs_are_on_the_cpu`."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    with found_gpus():
        yield


@pytest.fixture(autouse=True)
def _only_vllm_tests_ask_vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ercsvd plan` find no vLLM: asking it for kernels costs its import, ten seconds of a core."""
    if request.node.get_closest_marker("vllm") is None:
        monkeypatch.setattr("ercsvd_deploy.exporters.vllm.kernels.choice.find_spec", lambda _name: None)


@pytest.fixture(autouse=True)
def _runs_fork_their_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run's engines be forks of a process that has imported vLLM, which takes ten seconds of a core."""
    if request.node.get_closest_marker("vllm") is None:
        return
    from tests.vllm.engines import run_in_fork

    def run(command: Sequence[str], variables: Mapping[str, str], output: int, timeout: float) -> int | None:
        module, *arguments = command[command.index("-m") + 1 :]
        log = Path(f"/proc/{os.getpid()}/fd/{output}")
        try:
            return run_in_fork(module, *arguments, log=log, variables=variables, timeout=timeout)
        except subprocess.TimeoutExpired:
            return None

    monkeypatch.setattr("ercsvd_deploy.exporters.vllm.engines.process._run", run)


@pytest.fixture(autouse=True)
def _only_tests_of_pages_draw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reports have no pictures: drawing those of a run takes as long as its decompositions."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("ercsvd_deploy.pipelines.reporting.html.plots.draw_plots", lambda _report: [])


@pytest.fixture(autouse=True, scope="session")
def _disks_need_not_settle() -> Iterator[None]:
    """Do not wait for disks: no test cuts the power, and a run writes a hundred files."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _file: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _texts_are_tokenized_once() -> Iterator[None]:
    """Remember the tokens of long texts: most runs here read the same ones, which takes half a second."""
    from ercsvd_deploy.data import texts

    tokenized = texts.tokenize
    remembered: dict[tuple[str, str, bool], list[int]] = {}

    def tokenize(text: str, tokenizer: Any, *, add_special_tokens: bool = True) -> list[int]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or len(text) < _EXCERPT:
            return tokenized(text, tokenizer, add_special_tokens=add_special_tokens)
        key = (text, backend.to_str(), add_special_tokens)
        if key not in remembered:
            remembered[key] = tokenized(text, tokenizer, add_special_tokens=add_special_tokens)
        return remembered[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(texts, "tokenize", tokenize)
        yield


@pytest.fixture(autouse=True, scope="session")
def _models_are_described_once() -> Iterator[None]:
    """Remember the descriptions of models by their configs: most runs here compress one of a few.

    Finding a tiny model's Linears takes a third of a second, once for a plan and once for an export.
    """
    from ercsvd_deploy.models.description.families import describe
    from ercsvd_deploy.models.description.meta import read_architecture

    remembered: dict[tuple[type, str], Any] = {}

    def remember(config: Any, find: Callable[[], Any]) -> Any:
        key = type(config), config.to_json_string(use_diff=False)
        if key not in remembered:
            remembered[key] = find()
        return remembered[key]

    def read_once(config: Any, *, trust_remote_code: bool = False) -> Any:
        if trust_remote_code:  # the code may have changed
            return read_architecture(config, trust_remote_code=True)
        return remember(config, lambda: read_architecture(config))

    def describe_once(model: torch.nn.Module, config: Any) -> Any:
        if type(model).__module__.startswith("transformers."):
            return remember(config, lambda: describe(model, config))
        return describe(model, config)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ercsvd_deploy.pipelines.planning.plan.read_architecture", read_once)
        patched.setattr("ercsvd_deploy.models.streaming.ends.describe", describe_once)
        yield


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


@pytest.fixture(scope="session")
def excerpts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the beginnings of two of the example texts, under their names."""
    folder = tmp_path_factory.mktemp("excerpts")
    for name in ("calibration.txt", "in_domain.txt"):
        (folder / name).write_text((_TEXT / name).read_text()[:_EXCERPT])
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, llama: Path, excerpts: Path) -> RecipeWriter:
    """Return a writer of recipes for `llama`: stages and sections -> recipe file."""
    return recipe_writer(tmp_path, llama, excerpts)


@pytest.fixture(scope="session")
def finished_export(tmp_path_factory: pytest.TempPathFactory, llama: Path, excerpts: Path) -> Path:
    """Return an export of `llama` with all layers factorized, to be copied before it is changed."""
    from ercsvd_deploy.pipelines.flow import run_recipe
    from ercsvd_deploy.recipe.load import load_recipe

    stage = {"factorize": FACTORIZE | {"method": "erc_svd", "num_compressed_layers": "all"}}
    write = recipe_writer(tmp_path_factory.mktemp("finished"), llama, excerpts)
    return run_recipe(load_recipe(write(stage)))[1]


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
def write_picture_recipe(
    tmp_path: Path, tiny_model: ModelDirectory, pictures: Path, excerpts: Path
) -> RecipeWriter:
    """Return a writer of recipes for `llava` or another `model`, calibrated on pictures too."""
    import yaml

    def write(*stages: dict[str, Any], model: Path | None = None, **sections: Any) -> Path:
        dataset = {"conversations": str(pictures / "conversations.jsonl")}
        recipe = {
            "model": {"path": str(model or tiny_model("llava"))},
            "calibration": {
                "dataset": {"text": str(excerpts / "calibration.txt")},
                "num_samples": 16,
                "sequence_length": 120,
            },
            "vision": {"calibration": dataset, "share": 0.75},
            "stages": list(stages)
            or [{"factorize": FACTORIZE | {"num_compressed_layers": "all", "rank_multiple": 8}}],
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
