"""Match the tensor names of a checkpoint with those of its model.

Training wrappers add their names to those of the tensors: `_orig_mod.` (torch.compile), `module.` (data
parallelism), `_fsdp_wrapped_module.` within each layer. Other checkpoints hold a part of a model without the
prefix of the whole: `layers.0...` for `model.layers.0...`. No such name is listed here: segments that the
model does not have are left out if more of its tensors are then found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from ercsvd_deploy.format.files.tensor_store import CheckpointError

_MOST_SHARED_SEGMENTS = 3
Naming = dict[str, str]  # stored name -> name of the model


def match_names(
    stored: Iterable[str],
    expected: frozenset[str],
    *,
    base_prefix: str,
    translate: Callable[[str], str] = lambda name: name,
) -> Mapping[str, str]:
    """Return model's name -> stored name of every stored tensor, by the reading that finds most tensors.

    Names that the model does not have are kept as they are; the caller treats them as surplus.

    Args:
        stored: Names in the checkpoint.
        expected: Names of the model's tensors.
        base_prefix: Prefix of the part of the model that some checkpoints hold alone: `model.`.
        translate: Translates a name in one of the family's checkpoint layouts into the model's name.

    Raises:
        CheckpointError: two stored tensors have the same name in the model.
    """
    names = sorted(stored)
    best: Naming | None = None
    most_found = -1
    top_level_names = frozenset(name.partition(".")[0] for name in expected)
    for reading in _readings(names, expected):
        for prefix in ("", base_prefix):
            naming = {
                name: _prefixed(translate(bare_name), prefix, top_level_names)
                for name, bare_name in reading.items()
            }
            num_found = len(expected.intersection(naming.values()))
            if num_found > most_found and (best is None or _is_unique(naming)):
                best, most_found = naming, num_found
        if most_found == len(expected):
            break
    assert best is not None, "the first reading is always taken"
    inverse: dict[str, str] = {}
    for name, model_name in best.items():
        if model_name in inverse:
            raise CheckpointError(
                f"the checkpoint holds {model_name} under two names: {inverse[model_name]} and {name}"
            )
        inverse[model_name] = name
    return inverse


def _readings(names: list[str], expected: frozenset[str]) -> Iterator[Naming]:
    """Yield readings, stored name -> name: as stored, without wrappers, then with fewer leading segments."""
    yield {name: name for name in names}
    bare = _without_wrappers(names, {segment for name in expected for segment in name.split(".")})
    yield bare
    for _ in range(_MOST_SHARED_SEGMENTS):
        first_segments = {name.partition(".")[0] for name in bare.values()}
        if len(first_segments) != 1:
            return
        bare = {name: bare_name.partition(".")[2] for name, bare_name in bare.items()}
        if not all(bare.values()):
            return
        yield bare


def _without_wrappers(names: list[str], model_segments: set[str]) -> Naming:
    """Return stored name -> name without wrappers: only children whose segment the model does not have.

    The `base_layer` of an adapter is not a wrapper: it has a sibling `lora_A`, without which the model would
    be a different one.
    """
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts):
            children.setdefault(".".join(parts[:position]), set()).add(part)

    def read(name: str) -> str:
        parts = name.split(".")
        significant_parts = [
            part
            for position, part in enumerate(parts)
            if part in model_segments
            or position == len(parts) - 1
            or len(children[".".join(parts[:position])]) > 1
        ]
        return ".".join(significant_parts)

    return {name: read(name) for name in names}


def _prefixed(name: str, prefix: str, top_level_names: frozenset[str]) -> str:
    """Return a name with the prefix in front, unless it begins with a top-level name of the model."""
    return name if name.partition(".")[0] in top_level_names else prefix + name


def _is_unique(naming: Naming) -> bool:
    return len(set(naming.values())) == len(naming)
