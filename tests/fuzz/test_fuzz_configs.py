"""Fuzz: config.json of a model, and recipes, as far as `ercsvd plan` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.load import Recipe, check_files, load_recipe
from tests.conftest import ModelDirectory
from tests.fuzz.strategies import FuzzLog, as_json, cases, damaged_bytes, damaged_values
from tests.peak_memory import growth
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow  # whole runs

TEXT = Path(__file__).parents[2] / "examples" / "text" / "in_domain.txt"
MOST_GROWTH = 2**30  # bytes: what a plan of an absurd model may not reach


@pytest.fixture(scope="module", autouse=True)
def memory_stays_small() -> Iterator[None]:
    with growth() as grown:
        yield
        assert grown() < MOST_GROWTH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of a config alone, which each case overwrites."""
    return tmp_path_factory.mktemp("fuzz-model")


@pytest.fixture(scope="module")
def configs(tiny_model: ModelDirectory) -> dict[str, Any]:
    directories = {family: tiny_model(family) for family in ("llama", "qwen2", "opt", "llava")}
    return {name: json.loads((path / "config.json").read_text()) for name, path in directories.items()}


def recipe_for(model: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "calibration": {"dataset": {"text": str(TEXT)}, "num_samples": 32, "sequence_length": 64, "seed": 3},
        "stages": [
            {"factorize": {"method": "erc_svd", "compression_ratio": 0.2, "rank_multiple": "auto"}},
            {
                "quantize": {
                    "bits": 4,
                    "group_size": 32,
                    "ignore": ["q_proj"],
                    "overrides": {"v_proj": {"bits": 8}},
                }
            },
        ],
        "evaluation": {"perplexity": {"held_out": str(TEXT)}, "sequence_length": 64},
        "serving": {"tensor_parallel_sizes": [1, 2]},
        "export": {"path": "out", "max_shard_size": "2GB"},
    }


def plan_config(config: Any, model: Path, fuzz_log: FuzzLog) -> None:
    (model / "config.json").write_bytes(config if isinstance(config, bytes) else as_json(config))
    raw = recipe_for(model)
    raw["stages"] = [{"quantize": {"bits": 4, "group_size": 32}}]
    recipe = Recipe.model_validate(raw)
    plan = fuzz_log.attempt("config.json", lambda: make_plan(recipe))
    if plan is not None:
        assert plan.num_bytes > 0
        json.dumps(plan.as_json(), allow_nan=False)


@cases(400)
@given(data=st.data())
def test_damaged_configs(
    data: st.DataObject, configs: dict[str, Any], model: Path, fuzz_log: FuzzLog
) -> None:
    family = data.draw(st.sampled_from(["llama", "llama", "qwen2", "opt"]))
    plan_config(data.draw(damaged_values(configs[family])), model, fuzz_log)


@cases(150)
@given(data=st.data())
def test_damaged_vision_configs(
    data: st.DataObject, configs: dict[str, Any], model: Path, fuzz_log: FuzzLog
) -> None:
    config = json.loads(json.dumps(configs["llava"]))
    part = data.draw(st.sampled_from(["text_config", "vision_config", None]))
    if part is None:
        config = data.draw(damaged_values(config))
    else:
        config[part] = data.draw(damaged_values(config[part]))
    plan_config(config, model, fuzz_log)


SIZES = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
]
SIZES += ["head_dim", "vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels"]


@cases(150)
@given(
    family=st.sampled_from(["llama", "qwen2", "opt", "llava"]),
    part=st.sampled_from(["text_config", "vision_config"]),
    sizes=st.dictionaries(
        st.sampled_from(SIZES),
        st.integers(-1, 300) | st.sampled_from([2**20, 10**9, 10**12, 2**63]),
        min_size=1,
    ),
)
@example(family="llava", part="vision_config", sizes={"hidden_size": 10**9})
@example(family="qwen2", part="text_config", sizes={"num_hidden_layers": 10**9})
@example(family="llava", part="vision_config", sizes={"image_size": 10**9, "patch_size": 1})
def test_absurd_sizes(
    family: str, part: str, sizes: dict[str, int], configs: dict[str, Any], model: Path, fuzz_log: FuzzLog
) -> None:
    config = json.loads(json.dumps(configs[family]))
    config.get(part, config).update(sizes)
    plan_config(config, model, fuzz_log)


@cases(100)
@given(data=st.data())
def test_damaged_config_files(
    data: st.DataObject, configs: dict[str, Any], model: Path, fuzz_log: FuzzLog
) -> None:
    plan_config(data.draw(damaged_bytes(as_json(configs["llama"]))), model, fuzz_log)


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("fuzz-whole") / "m", "llama", num_layers=3)


@cases(250)
@given(data=st.data())
def test_damaged_recipes(
    data: st.DataObject, whole_model: Path, tmp_path_factory: pytest.TempPathFactory, fuzz_log: FuzzLog
) -> None:
    raw = recipe_for(whole_model)
    section = data.draw(st.sampled_from([None, "stages", "stages", "serving", "calibration"]))
    if section is None:
        raw = data.draw(damaged_values(raw))
    else:
        raw[section] = data.draw(damaged_values(raw[section]))
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(as_json(raw))  # JSON is YAML

    def plan() -> Any:
        recipe = load_recipe(path)
        check_files(recipe)
        return make_plan(recipe)

    fuzz_log.attempt("recipe", plan)


@cases(300)
@given(data=st.data())
def test_damaged_recipe_files(
    data: st.DataObject, whole_model: Path, tmp_path_factory: pytest.TempPathFactory, fuzz_log: FuzzLog
) -> None:
    whole = yaml.safe_dump(recipe_for(whole_model)).encode()
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(data.draw(damaged_bytes(whole)))
    fuzz_log.attempt("recipe file", lambda: load_recipe(path), named=str(path))
