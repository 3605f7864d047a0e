"""Names of LLaVA's tensors: every layout leads to transformers' modules, and these to the hub's layout."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageTextToText

from ercsvd_deploy.format.llava_names import from_original, to_module
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model, load_config
from tests.conftest import ModelDirectory
from tests.hub_names import to_checkpoint
from tests.importing.original_llava import original_name
from tests.tiny_models import VISION_FAMILIES, WEIGHTS_FILE

# One tensor of each part: transformers' module, the hub's checkpoint, the authors' checkpoint.
SAME = [
    (
        "model.language_model.layers.3.self_attn.q_proj.weight",
        "language_model.model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
    ),
    (
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.embed_tokens.weight",
    ),
    ("model.language_model.norm.weight", "language_model.model.norm.weight", "model.norm.weight"),
    ("lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"),
    (
        "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
    ),
    (
        "model.multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.mm_projector.0.weight",
    ),
    (
        "model.multi_modal_projector.linear_2.bias",
        "multi_modal_projector.linear_2.bias",
        "model.mm_projector.2.bias",
    ),
    ("model.image_newline", "image_newline", "model.image_newline"),
]


@pytest.fixture(params=VISION_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(tiny_model: ModelDirectory, family: str) -> nn.Module:
    """Return the family's model on the meta device."""
    return build_meta_model(load_config(str(tiny_model(family))))


@pytest.mark.parametrize(("module", "hub", "original"), SAME)
def test_parts_are_called_what_the_layouts_call_them(module: str, hub: str, original: str) -> None:
    assert to_checkpoint(module) == hub
    assert to_module(hub) == module
    assert to_module(module) == module
    assert from_original(original) == module
    assert original_name(hub) == original


@pytest.mark.parametrize(
    ("mixed", "module"),
    [
        ("model.language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("vision_tower.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
    ],
)
def test_mixed_layouts_are_read(mixed: str, module: str) -> None:
    assert to_module(mixed) == module


@pytest.mark.parametrize("translate", [to_module, to_checkpoint, from_original])
def test_names_of_no_known_part_stay(translate: Callable[[str], str]) -> None:
    assert translate("qformer.layers.0.weight") == "qformer.layers.0.weight"


def test_every_module_survives_the_way_through_each_layout(model: nn.Module) -> None:
    names = list(model.state_dict())
    assert len(names) > 50
    hub = [to_checkpoint(name) for name in names]
    assert [to_module(name) for name in hub] == names
    original = [original_name(name) for name in hub]
    assert len(set(original)) == len(set(hub)) == len(names)
    assert [from_original(name) for name in original] == names


def test_linears_are_translated_like_their_tensors(model: nn.Module) -> None:
    """A checkpoint's description names modules, its files tensors."""
    architecture = describe(model, model.config)
    linears = [linear.name for linear in (*architecture.linears, *architecture.vision_linears)]
    assert linears
    for name in linears:
        assert to_checkpoint(f"{name}.weight") == f"{to_checkpoint(name)}.weight"
        assert to_module(to_checkpoint(name)) == name


def test_transformers_reads_what_is_written(tiny_model: ModelDirectory, family: str) -> None:
    """The pico models are on disk under the names that `to_checkpoint` gives."""
    _, found = AutoModelForImageTextToText.from_pretrained(tiny_model(family), output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_what_transformers_writes_is_read(
    tiny_model: ModelDirectory, family: str, model: nn.Module, tmp_path: Path
) -> None:
    AutoModelForImageTextToText.from_pretrained(tiny_model(family)).save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        written = list(file.keys())
    assert {to_module(name) for name in written} == set(model.state_dict())


def test_vllm_takes_the_hubs_names_for_its_own(model: nn.Module, family: str) -> None:
    """What vLLM renames is transformers' layout, into ours; read from its source, which is slow to import."""
    renamed = vllm_prefixes(family)
    for name in model.state_dict():
        hub = to_checkpoint(name)
        assert not hub.startswith(tuple(renamed))
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), None)
        assert prefix is not None, name
        translated = renamed[prefix] + name.removeprefix(prefix)
        # Its own tower has the level that transformers 5 left out.
        assert translated == hub.replace("vision_tower.vision_model.", "vision_tower.")


def vllm_prefixes(family: str) -> dict[str, str]:
    """Return the prefixes that vLLM's class for the family renames on loading."""
    package = find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "model_executor" / "models" / f"{family}.py"
    [mapper] = [
        node.value
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "hf_to_vllm_mapper"
    ]
    assert isinstance(mapper, ast.Call)
    [prefixes] = [keyword.value for keyword in mapper.keywords if keyword.arg == "orig_to_new_prefix"]
    found: dict[str, str] = ast.literal_eval(prefixes)
    return found
