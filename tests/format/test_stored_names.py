"""By what names a checkpoint holds a model: wrappers, missing prefixes, and what is not one."""

from __future__ import annotations

import pytest

from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.format.llava_names import to_module
from ercsvd_deploy.format.stored_names import match_names

MODEL = frozenset(
    {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
)


def matched(stored: dict[str, str], surplus: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what the matching says of these stored names, each of which stands for a name of the model."""
    named = match_names([*stored.values(), *surplus], MODEL, base_prefix="model.")
    return {name: named[name] for name in named if name in MODEL}


def stored_as(change: dict[str, str] | None = None, prefix: str = "") -> dict[str, str]:
    """Return model's name -> stored name, with parts of names replaced and a prefix in front."""
    names = {}
    for name in MODEL:
        stored = name
        for old, new in (change or {}).items():
            stored = stored.replace(old, new)
        names[name] = prefix + stored
    return names


@pytest.mark.parametrize(
    "stored",
    [
        stored_as(),
        stored_as(prefix="_orig_mod."),
        stored_as(prefix="module."),
        stored_as(prefix="module._orig_mod."),
        stored_as(prefix="model."),
        stored_as(prefix="base_model.model."),
        stored_as(prefix="_forward_module.module."),
        stored_as({"layers.0.": "layers.0._orig_mod.", "layers.1.": "layers.1._orig_mod."}),
        stored_as({"layers.0.": "layers.0._orig_mod."}),
        stored_as({".self_attn.": ".self_attn._fsdp_wrapped_module._checkpoint_wrapped_module."}),
        stored_as({"model.": ""}),
        stored_as({"model.": ""}, prefix="module."),
        stored_as({"model.": "model._orig_mod."}),
    ],
    ids=lambda stored: stored["model.layers.0.self_attn.q_proj.weight"],
)
def test_wrappers_and_prefixes(stored: dict[str, str]) -> None:
    assert matched(stored) == stored


def test_a_tied_model_without_prefix_and_output_layer() -> None:
    stored = stored_as({"model.": ""})
    del stored["lm_head.weight"]
    assert matched(stored) == stored


def test_surplus_tensors_do_not_hide_a_wrapper() -> None:
    stored = stored_as(prefix="_orig_mod.")
    assert matched(stored, ("_orig_mod.model.rotary_emb.inv_freq", "_orig_mod.score.weight")) == stored


def test_an_adapter_is_not_a_wrapper() -> None:
    stored = stored_as({"q_proj.": "q_proj.base_layer."})
    adapter = [f"model.layers.{layer}.self_attn.q_proj.lora_A.default.weight" for layer in range(2)]
    assert "model.layers.0.self_attn.q_proj.weight" not in matched(stored, tuple(adapter))
    assert matched(stored) == stored  # merged, but not unwrapped


def test_two_models_in_one_checkpoint_are_not_one() -> None:
    both = {**stored_as(prefix="policy.")}
    named = match_names(
        [*both.values(), *stored_as(prefix="reference.").values()], MODEL, base_prefix="model."
    )
    assert MODEL.isdisjoint(named)


def test_the_model_itself_goes_before_a_copy_of_it() -> None:
    plain = stored_as()
    copies = tuple(stored_as(prefix="ema.").values())
    assert matched(plain, copies) == plain


def test_one_missing_tensor_does_not_change_the_reading() -> None:
    stored = stored_as(prefix="_orig_mod.")
    del stored["model.norm.weight"]
    assert matched(stored) == stored


def test_layouts_of_llava_behind_a_wrapper() -> None:
    expected = frozenset({"model.language_model.norm.weight", "lm_head.weight", "model.image_newline"})
    stored = [
        "module.language_model.model.norm.weight",
        "module.language_model.lm_head.weight",
        "module.image_newline",
    ]
    named = match_names(stored, expected, base_prefix="model.", translate=to_module)
    assert dict(named) == {
        "model.language_model.norm.weight": stored[0],
        "lm_head.weight": stored[1],
        "model.image_newline": stored[2],
    }


def test_one_tensor_under_two_names() -> None:
    stored = ["lm_head.weight", "language_model.lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight under two names"):
        match_names(stored, frozenset({"lm_head.weight"}), base_prefix="model.", translate=to_module)
