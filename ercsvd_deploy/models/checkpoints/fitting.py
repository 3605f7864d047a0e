"""Find a model's tensors in a checkpoint, and refuse one that is another model than its config says.

Some of what a library would leave out in silence changes the model: another output layer of a tied one, or a
bias that the config switches off. Rotary frequencies, or layers behind the last, do not.
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
_MOST_TOLD = 5
_MOST_COMPARED = 2**22  # elements of a surplus tensor that is read to see whether it is zero


def fit_store(
    model: nn.Module, store: TensorStore, translate: Callable[[str], str] = str
) -> tuple[TensorStore, tuple[str, ...]]:
    """Compare names, shapes and dtypes of a model's tensors with a store's before anything is loaded.

    Args:
        model: Built from the config, without weights.
        store: The checkpoint, under its own names.
        translate: Turns a name of a layout that the family is known for into the model's.

    Returns:
        The model's tensors under the model's names, without a tied output layer; and the names of what the
        model has no use for.

    Raises:
        CheckpointError: tensors are missing, of another shape, quantized, or contradict the config.
    """
    expected = model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', 'model')}."
    named = dict(match_names(store.names(), frozenset(expected), base_prefix=prefix, translate=translate))
    store, named = unstack_experts(model, store, named)
    tied = _tied_names(model)
    output, embedding = _output_and_embedding(model)
    if output in tied and output in named and embedding not in named:
        named[embedding] = named.pop(output)  # the two are one tensor, saved under either name
    if _is_tied_somewhere(model.config) and output in named and embedding in named:
        _check_same(store, named[output], named[embedding])
    present = RenamedStore(store, named)
    problems = [
        *_wrong_shapes(model, expected, present, tied),
        *_ignored(model, expected, present),
    ]
    if problems:
        raise CheckpointError(f"weights and config.json disagree: {_first(problems)}")
    kept = expected.keys() - tied
    surplus = tuple(sorted(named[name] for name in named.keys() - kept))
    return RenamedStore(store, {name: named[name] for name in kept}), surplus


def _tied_names(model: nn.Module) -> frozenset[str]:
    """Return the name of the output layer's weight, if the config says that it is the embedding."""
    output = _output_and_embedding(model)[0]
    is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return frozenset({output} if is_tied and output is not None else ())


def _is_tied_somewhere(config: Any) -> bool:
    """Whether the config of the model or of its language model says so: of the two vLLM reads the second.

    What a language model's class says where config.json says nothing does not count: some classes of
    transformers tie by default, although the models that they are parts of are not tied (Qwen3-VL's mixture).
    """
    text_config = config.get_text_config()
    is_default = text_config is not config and getattr(type(text_config), "tie_word_embeddings", False)
    parts = (config,) if is_default else (config, text_config)
    return any(getattr(each, "tie_word_embeddings", False) for each in parts)


def _output_and_embedding(model: nn.Module) -> tuple[str | None, str]:
    output = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names.get(id(output)), names[id(embedding)]


def _check_same(store: TensorStore, output: str, embedding: str) -> None:
    """Refuse another output layer than the embedding.

    Raises:
        CheckpointError: the two differ.
    """
    same = store.info(output).shape == store.info(embedding).shape
    if same:
        tensors = store.read([output, embedding])
        same = torch.equal(tensors[output], tensors[embedding].to(tensors[output].dtype))
    if not same:
        raise CheckpointError(
            f"config.json says tie_word_embeddings: true, but {output} is stored and is not {embedding}: set "
            "tie_word_embeddings to false if that is the output layer, or remove the tensor if it is not"
        )


def _wrong_shapes(
    model: nn.Module, expected: Mapping[str, torch.Tensor], store: TensorStore, tied: frozenset[str]
) -> list[str]:
    """Return what is missing, of another shape or quantized; a vocabulary of another size first."""
    stored = store.names()
    output, embedding = _output_and_embedding(model)
    vocabulary, others, missing = [], [], []
    for name, tensor in expected.items():
        if name in tied:
            continue
        if name not in stored:
            missing.append(name)
            continue
        info, shape = store.info(name), tuple(tensor.shape)
        if name in (output, embedding) and info.shape[1:] == shape[1:] and info.shape != shape:
            vocabulary.append(
                f"vocab_size is {shape[0]}, but {name} has {info.shape[0]} rows: set vocab_size to "
                f"{info.shape[0]}"
            )
        elif info.shape != shape:
            others.append(f"{name} has shape {list(info.shape)}, the config asks for {list(shape)}")
        elif tensor.is_floating_point() and info.dtype not in _FLOATS:
            remedy = (
                "set model.dtype"
                if info.dtype == "F64"
                else "such weights are quantized already: start from the original ones"
            )
            others.append(f"{name} is stored as {info.dtype}; only {', '.join(_FLOATS)} will do: {remedy}")
    absent = [f"{name} is missing" for name in missing]
    if missing == [output]:
        absent = [f"{output} is missing: set tie_word_embeddings to true if it is the embedding"]
    elif 2 * len(missing) > len(expected):
        other_names = enumerate_names(stored - expected.keys(), most=3)
        absent[:0] = [f"the checkpoint has other names, such as {other_names}"] if other_names else []
    return vocabulary + absent + others


def _ignored(model: nn.Module, expected: Mapping[str, torch.Tensor], store: TensorStore) -> Iterator[str]:
    """Yield stored tensors of a Linear, norm or embedding of the model that has no place for them."""
    modules = dict(model.named_modules())
    for name in sorted(store.names() - expected.keys()):
        owner, _, leaf = name.rpartition(".")
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        module = modules[owner]
        is_leaf = not any(module.children()) and any(True for _ in module.parameters(recurse=False))
        if not owner or not is_leaf or leaf in dict(module.named_buffers(recurse=False)):
            continue
        small = math.prod(store.info(name).shape) <= _MOST_COMPARED
        if leaf == "bias" and small and not bool(store.read([name])[name].any()):
            continue  # some tools store biases of zero
        yield f"{name} is stored, but the model that config.json describes has no such tensor"


def _first(problems: list[str]) -> str:
    rest = len(problems) - _MOST_TOLD
    return "; ".join(problems[:_MOST_TOLD]) + (f"; and {rest} more" if rest > 0 else "")
