"""Find a model's tensors in a checkpoint, and refuse a checkpoint that contradicts its config.

Libraries ignore surplus tensors in silence. Some of these would change the model: a separate output layer of
a tied model, or a bias that the config switches off. Others would not: rotary frequencies, or layers after
the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ercsvd_deploy.format.files.store_views import RenamedStore
from ercsvd_deploy.format.files.tensor_store import CheckpointError, TensorStore, enumerate_names
from ercsvd_deploy.format.stored_names import match_names
from ercsvd_deploy.models.experts.stacked import unstack_experts

_FLOATS = ("F32", "F16", "BF16")
_MAX_LISTED = 5
_MAX_COMPARED = 2**22  # larger surplus tensors are not read to see whether they are zero; elements


def fit_store(
    model: nn.Module, store: TensorStore, translate: Callable[[str], str] = str
) -> tuple[TensorStore, tuple[str, ...]]:
    """Compare names, shapes and dtypes of a model's tensors with a store's before anything is loaded.

    Args:
        model: The model of the config, without weights.
        store: The checkpoint under its own names.
        translate: Turns a stored name of the family's layout into the model's name.

    Returns:
        The model's tensors under the model's names, without a tied output layer; and the stored names of
        surplus tensors.

    Raises:
        CheckpointError: tensors are missing, have another shape, are quantized, or contradict the config.
    """
    expected = model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', 'model')}."
    stored_names = dict(
        match_names(store.names(), frozenset(expected), base_prefix=prefix, translate=translate)
    )
    store, stored_names = unstack_experts(model, store, stored_names)
    tied = _tied_names(model)
    output, embedding = _output_and_embedding(model)
    if output in tied and output in stored_names and embedding not in stored_names:
        stored_names[embedding] = stored_names.pop(output)  # the two are one tensor, saved under either name
    if _is_tied_somewhere(model.config) and output in stored_names and embedding in stored_names:
        _check_same(store, stored_names[output], stored_names[embedding])
    present = RenamedStore(store, stored_names)
    problems = [
        *_wrong_shapes(model, expected, present, tied),
        *_ignored(model, expected, present),
    ]
    if problems:
        raise CheckpointError(f"weights and config.json disagree: {_first(problems)}")
    needed = expected.keys() - tied
    surplus = tuple(sorted(stored_names[name] for name in stored_names.keys() - needed))
    return RenamedStore(store, {name: stored_names[name] for name in needed}), surplus


def _tied_names(model: nn.Module) -> frozenset[str]:
    """Return the name of the output layer's weight if the config ties it to the embedding."""
    output = _output_and_embedding(model)[0]
    is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return frozenset({output} if is_tied and output is not None else ())


def _is_tied_somewhere(config: Any) -> bool:
    """Whether the config of the model or of its language model, which vLLM reads, ties the output layer.

    The default of a language model's config class is ignored: some classes of transformers tie by default,
    although the vision-language models that contain them are not tied (Qwen3-VL's mixture).
    """
    text_config = config.get_text_config()
    is_default = text_config is not config and getattr(type(text_config), "tie_word_embeddings", False)
    configs = (config,) if is_default else (config, text_config)
    return any(getattr(tied_config, "tie_word_embeddings", False) for tied_config in configs)


def _output_and_embedding(model: nn.Module) -> tuple[str | None, str]:
    output = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names.get(id(output)), names[id(embedding)]


def _check_same(store: TensorStore, output: str, embedding: str) -> None:
    """Refuse an output layer that differs from the embedding.

    Raises:
        CheckpointError: the two differ.
    """
    is_same = store.info(output).shape == store.info(embedding).shape
    if is_same:
        tensors = store.read([output, embedding])
        is_same = torch.equal(tensors[output], tensors[embedding].to(tensors[output].dtype))
    if not is_same:
        raise CheckpointError(
            f"config.json says tie_word_embeddings: true, but {output} is stored and is not {embedding}: set "
            "tie_word_embeddings to false if that is the output layer, or remove the tensor if it is not"
        )


def _wrong_shapes(
    model: nn.Module, expected: Mapping[str, torch.Tensor], store: TensorStore, tied: frozenset[str]
) -> list[str]:
    """Return messages about missing, wrongly shaped or quantized tensors; a wrong vocabulary size first."""
    stored = store.names()
    output, embedding = _output_and_embedding(model)
    vocabulary_problems, other_problems, missing = [], [], []
    for name, tensor in expected.items():
        if name in tied:
            continue
        if name not in stored:
            missing.append(name)
            continue
        info, shape = store.info(name), tuple(tensor.shape)
        if name in (output, embedding) and info.shape[1:] == shape[1:] and info.shape != shape:
            vocabulary_problems.append(
                f"vocab_size is {shape[0]}, but {name} has {info.shape[0]} rows: set vocab_size to "
                f"{info.shape[0]}"
            )
        elif info.shape != shape:
            other_problems.append(f"{name} has shape {list(info.shape)}, the config asks for {list(shape)}")
        elif tensor.is_floating_point() and info.dtype not in _FLOATS:
            remedy = (
                "set model.dtype"
                if info.dtype == "F64"
                else "such weights are quantized already: start from the original ones"
            )
            supported = ", ".join(_FLOATS)
            other_problems.append(f"{name} is stored as {info.dtype}; only {supported} will do: {remedy}")
    missing_problems = [f"{name} is missing" for name in missing]
    if missing == [output]:
        missing_problems = [f"{output} is missing: set tie_word_embeddings to true if it is the embedding"]
    elif 2 * len(missing) > len(expected):
        other_names = enumerate_names(stored - expected.keys(), most=3)
        if other_names:
            missing_problems.insert(0, f"the checkpoint has other names, such as {other_names}")
    return vocabulary_problems + missing_problems + other_problems


def _ignored(model: nn.Module, expected: Mapping[str, torch.Tensor], store: TensorStore) -> Iterator[str]:
    """Yield messages about surplus tensors of a Linear, norm or embedding that the model has."""
    modules = dict(model.named_modules())
    for name in sorted(store.names() - expected.keys()):
        owner, _, leaf = name.rpartition(".")
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        module = modules[owner]
        is_leaf = not any(module.children()) and any(True for _ in module.parameters(recurse=False))
        if not owner or not is_leaf or leaf in dict(module.named_buffers(recurse=False)):
            continue
        is_small = math.prod(store.info(name).shape) <= _MAX_COMPARED
        if leaf == "bias" and is_small and not bool(store.read([name])[name].any()):
            continue  # some tools store biases of zero
        yield f"{name} is stored, but the model that config.json describes has no such tensor"


def _first(problems: list[str]) -> str:
    rest = len(problems) - _MAX_LISTED
    return "; ".join(problems[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
