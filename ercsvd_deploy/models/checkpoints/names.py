"""Names of a vision-language model's tensors in checkpoints, by transformers' own tables.

Checkpoints keep the names of the release that wrote them (`visual.blocks`, `language_model.model.layers`);
transformers 5 has moved most modules since. Its tables translate old and new names into those of its modules;
their inverse, applied to every tensor of the model, gives the names of the hub, which vLLM reads as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.format.llava_names import to_module
from ercsvd_deploy.models.experts.routed import stacks_experts

if TYPE_CHECKING:
    from torch import nn


def module_names(model: nn.Module) -> Callable[[str], str]:
    """Return a function that turns a stored name of any layout into the name of the model's tensor."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _split(_transforms(model))
    has_new_layout = any(name == "model" for name, _ in model.named_children())  # not in Llama 4

    def module_name(stored: str) -> str:
        # some releases wrote a mixture of two layouts, which the tables translate only in part
        new_name = to_module(stored) if has_new_layout else stored
        return str(rename_source_key(new_name, renamings, converters)[0])

    return module_name


def stored_prefixes(model: nn.Module) -> dict[str, str]:
    """Return module -> its name in checkpoints on the hub, for modules with another name there.

    A name that `module_names` does not translate back is not used: the tensor keeps the model's name.
    """
    from transformers.core_model_loading import rename_source_key

    inverse = [transform.reverse_transform() for transform in reversed(_transforms(model))]
    renamings, converters = _split(inverse)
    module_name = module_names(model)
    stored_names: dict[str, str] = {}
    for name in model.state_dict():
        renamed = str(rename_source_key(name, renamings, converters, reverse=True)[0])
        stored_names[name] = renamed if module_name(renamed) == name else name
    return _shortest_prefixes(stored_names)


def stored_name(name: str, prefixes: Mapping[str, str]) -> str:
    """Return a module's or tensor's name in checkpoints by `stored_prefixes`; the longest prefix decides."""
    modules = [module for module in prefixes if f"{name}.".startswith(f"{module}.")]
    if not modules:
        return name
    module = max(modules, key=len)
    return prefixes[module] + name.removeprefix(module)


def _shortest_prefixes(stored_names: Mapping[str, str]) -> dict[str, str]:
    """Return few and short prefixes that give all stored names.

    A prefix is lengthened until it gives the right names for all tensors that begin with it.
    """
    prefixes: dict[str, str] = {}
    for name, renamed in stored_names.items():
        if stored_name(name, prefixes) == renamed:
            continue
        parts, renamed_parts = name.split("."), renamed.split(".")
        shared = _length_of_common_end(parts, renamed_parts)
        for num_kept in range(shared, -1, -1):
            module = ".".join(parts[: len(parts) - num_kept])
            candidate = {module: ".".join(renamed_parts[: len(renamed_parts) - num_kept])}
            is_right = all(
                stored_name(tensor, candidate) == stored
                for tensor, stored in stored_names.items()
                if f"{tensor}.".startswith(f"{module}.")
            )
            if module and candidate[module] and is_right:
                prefixes |= candidate
                break
    return prefixes


def _length_of_common_end(names: Iterable[str], other_names: Iterable[str]) -> int:
    length = 0
    for left, right in zip(reversed(list(names)), reversed(list(other_names)), strict=False):
        if left != right:
            break
        length += 1
    return length


def _transforms(model: nn.Module) -> list[Any]:
    """Return transformers' renamings of a model's tensors, in the order of application.

    Those that stack matrices of routed experts are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if not stacks_experts(transform)]


def _split(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Return renamings and converters, the arguments of `rename_source_key`."""
    from transformers.core_model_loading import WeightConverter

    transforms = list(transforms)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    return renamings, converters
