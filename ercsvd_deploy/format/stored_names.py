"""Find out by what names a checkpoint holds a model's tensors.

Training wraps models, and a wrapper leaves its name in those of the tensors: `_orig_mod.` (torch.compile),
`module.` (data parallelism), `_fsdp_wrapped_module.` within each layer. Others save a part of a model without
the prefix that the whole one has: `layers.0...` for `model.layers.0...`. None of these is listed here: names
are read without the segments that the model does not have, if that is how the model is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from ercsvd_deploy.format.tensor_store import CheckpointError

_MOST_SHARED_SEGMENTS = 3
Naming = dict[str, str]  # stored name -> name of the model


def match_names(
    stored: Iterable[str],
    expected: frozenset[str],
    *,
    base_prefix: str,
    translate: Callable[[str], str] = lambda name: name,
) -> Mapping[str, str]:
    """Return model's name -> stored name of every stored tensor, by the reading that finds most of the model.

    Names that no reading explains are returned as they are read; they are surplus.

    Args:
        stored: Names in the checkpoint.
        expected: Names of the model's tensors.
        base_prefix: Of the part of the model that is saved alone at times: `model.`.
        translate: Turns a name of a layout that the family is known for into the model's.

    Raises:
        CheckpointError: two stored tensors are one of the model.
    """
    names = sorted(stored)
    best: Naming | None = None
    most = -1
    parts = frozenset(name.partition(".")[0] for name in expected)
    for reading in _readings(names, expected):
        for prefix in ("", base_prefix):
            naming = {name: _prefixed(translate(read), prefix, parts) for name, read in reading.items()}
            num_found = len(expected.intersection(naming.values()))
            if num_found > most and (best is None or _is_unique(naming)):
                best, most = naming, num_found
        if most == len(expected):
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
    """Yield stored name -> name without wrappers: as stored, then with ever more taken away."""
    yield {name: name for name in names}
    bare = _without_wrappers(names, {segment for name in expected for segment in name.split(".")})
    yield bare
    for _ in range(_MOST_SHARED_SEGMENTS):
        first = {name.partition(".")[0] for name in bare.values()}
        if len(first) != 1:
            return
        bare = {name: read.partition(".")[2] for name, read in bare.items()}
        if not all(bare.values()):
            return
        yield bare


def _without_wrappers(names: list[str], known: set[str]) -> Naming:
    """Return stored name -> name without segments that the model does not have and that stand alone.

    A wrapper is the only child of what it wraps. `base_layer` of an adapter is not: it has `lora_A` beside
    it, and without that the model would be another one.
    """
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts):
            children.setdefault(".".join(parts[:position]), set()).add(part)

    def read(name: str) -> str:
        parts = name.split(".")
        kept = [
            part
            for position, part in enumerate(parts)
            if part in known or position == len(parts) - 1 or len(children[".".join(parts[:position])]) > 1
        ]
        return ".".join(kept)

    return {name: read(name) for name in names}


def _prefixed(name: str, prefix: str, parts: frozenset[str]) -> str:
    """Return a name with the prefix in front, unless it begins with a part of the whole model."""
    return name if name.partition(".")[0] in parts else prefix + name


def _is_unique(naming: Naming) -> bool:
    return len(set(naming.values())) == len(naming)
