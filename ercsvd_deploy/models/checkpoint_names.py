"""By what names checkpoints hold the tensors of a vision-language model, from transformers' own tables.

Checkpoints keep the names of the release that wrote them (`visual.blocks`, `language_model.model.layers`);
transformers 5 has moved most modules since. Its tables turn either into the names of its modules; their
inverse, applied to every tensor of the model, gives the names that the hub has, which vLLM reads as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.format.llava_names import to_module
from ercsvd_deploy.models.experts import puts_together

if TYPE_CHECKING:
    from torch import nn


def module_names(model: nn.Module) -> Callable[[str], str]:
    """Return the function from a stored name, in any layout, to the name of the model's tensor."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _split(_transforms(model))
    was_moved = any(name == "model" for name, _ in model.named_children())  # unlike Llama 4's parts

    def module_name(stored: str) -> str:
        # some releases wrote a mixture of two layouts, which the tables leave half translated
        read = to_module(stored) if was_moved else stored
        return str(rename_source_key(read, renamings, converters)[0])

    return module_name


def stored_prefixes(model: nn.Module) -> dict[str, str]:
    """Return module -> what checkpoints on the hub call it, for the modules that they call otherwise.

    A name that `module_names` does not turn back is not taken: the tensor is stored under the model's.
    """
    from transformers.core_model_loading import rename_source_key

    inverse = [transform.reverse_transform() for transform in reversed(_transforms(model))]
    renamings, converters = _split(inverse)
    module_name = module_names(model)
    stored: dict[str, str] = {}
    for name in model.state_dict():
        renamed = str(rename_source_key(name, renamings, converters, reverse=True)[0])
        stored[name] = renamed if module_name(renamed) == name else name
    return _shortest_prefixes(stored)


def stored_name(name: str, prefixes: Mapping[str, str]) -> str:
    """Return what checkpoints call a module or tensor, by `stored_prefixes`: the longest prefix decides."""
    fitting = [module for module in prefixes if f"{name}.".startswith(f"{module}.")]
    if not fitting:
        return name
    module = max(fitting, key=len)
    return prefixes[module] + name.removeprefix(module)


def _shortest_prefixes(stored: Mapping[str, str]) -> dict[str, str]:
    """Return as few and short prefixes as give every stored name.

    A prefix is lengthened until it is that of no tensor that is called otherwise.
    """
    prefixes: dict[str, str] = {}
    for name, renamed in stored.items():
        if stored_name(name, prefixes) == renamed:
            continue
        parts, renamed_parts = name.split("."), renamed.split(".")
        shared = _length_of_common_end(parts, renamed_parts)
        for kept in range(shared, -1, -1):
            module = ".".join(parts[: len(parts) - kept])
            candidate = {module: ".".join(renamed_parts[: len(renamed_parts) - kept])}
            below = {each: to for each, to in stored.items() if f"{each}.".startswith(f"{module}.")}
            if (
                module
                and candidate[module]
                and all(stored_name(each, candidate) == to for each, to in below.items())
            ):
                prefixes |= candidate
                break
    return prefixes


def _length_of_common_end(one: Iterable[str], other: Iterable[str]) -> int:
    length = 0
    for left, right in zip(reversed(list(one)), reversed(list(other)), strict=False):
        if left != right:
            break
        length += 1
    return length


def _transforms(model: nn.Module) -> list[Any]:
    """Return transformers' renamings of a model's tensors, in the order in which it applies them.

    Matrices of routed experts keep the names by which they are apart (`experts`).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if not puts_together(transform)]


def _split(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Return renamings and converters, as `rename_source_key` wants them."""
    from transformers.core_model_loading import WeightConverter

    transforms = list(transforms)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    return [each for each in transforms if not isinstance(each, WeightConverter)], converters
