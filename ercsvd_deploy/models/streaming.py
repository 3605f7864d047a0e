"""Run a decoder one layer at a time: weights come from disk, activations wait in memory.

A model of any size passes through in the memory of one layer and the activations. The model is built
on the meta device. Its own forward, with every decoder layer replaced by a recorder, turns token ids
into the first layer's input and tells which keyword arguments (masks, rotary embeddings) each layer
is called with; the same forward, fed with the last layer's output, gives the logits. What lies
outside the layers is therefore the model's own code, whatever the architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ercsvd_deploy.data.samples import Batch, Sample, make_batches
from ercsvd_deploy.format.store_views import RenamedStore
from ercsvd_deploy.format.tensor_store import CheckpointError, TensorStore, torch_dtype
from ercsvd_deploy.linalg.symmetric import add_symmetric_product
from ercsvd_deploy.models.families import (
    Architecture,
    LayerLinears,
    build_meta_model,
    compressed_config,
    describe,
    tie_weights,
)
from ercsvd_deploy.models.modules import replace_linears

MAX_TOKENS_PER_BATCH = 8192
MAX_LOGITS_AT_ONCE = 2**28
_FLOATS = ("F32", "F16", "BF16")

_OnCall = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class _EmbeddingDone(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Every layer has been reached; the rest of the forward pass is not needed."""


class _InputsReached(Exception):  # noqa: N818 - not an error: it ends a layer's pass early
    """The wanted inputs are there; the rest of the layer is not needed."""


class _RecordingLayer(nn.Module):
    """Stands in for a decoder layer: notes how it is called and passes its input on."""

    def __init__(self, layer: nn.Module, on_call: _OnCall) -> None:
        super().__init__()
        # Models ask their layers for plain attributes (attention_type) to choose a mask.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_on_call", on_call)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not args, "decoder layers are called with keyword arguments"
        on_call: _OnCall = object.__getattribute__(self, "_on_call")
        return on_call(hidden_states, kwargs)


@dataclass
class InputStatistics:
    """What was seen of the inputs that some Linears share, or of gradients; accumulated in float32."""

    gram: torch.Tensor  # sum of x x^T over tokens, [in, in]
    absolute_sum: torch.Tensor  # sum of |x| over tokens, [in]
    num_tokens: float = 0  # tokens seen, each counted by its weight

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> InputStatistics:
        """Start with nothing seen."""
        return cls(
            torch.zeros(in_features, in_features, device=device), torch.zeros(in_features, device=device)
        )

    def add(self, inputs: torch.Tensor, token_weights: torch.Tensor | None = None) -> None:
        """Take in activations [..., in], each token counted once or by `token_weights` [...]."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if token_weights is None:
            add_symmetric_product(self.gram, rows.T, rows)
            self.absolute_sum += rows.abs().sum(0)
            self.num_tokens += len(rows)
            return
        weights = token_weights.reshape(-1, 1).to(rows)
        add_symmetric_product(self.gram, (weights * rows).T, rows)
        self.absolute_sum += (weights * rows.abs()).sum(0)
        self.num_tokens += float(weights.sum())

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean |x| per input feature, [in]."""
        return self.absolute_sum / (self.num_tokens or 1)

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Return what was seen of both."""
        return InputStatistics(
            self.gram + other.gram,
            self.absolute_sum + other.absolute_sum,
            self.num_tokens + other.num_tokens,
        )


@dataclass(frozen=True)
class PairedStatistics:
    """What was seen of the inputs x of a Linear in the original model beside x' in another; in float32."""

    original: torch.Tensor  # sum of x x^T over tokens, [in, in]
    gram: torch.Tensor  # sum of x' x'^T
    cross_moment: torch.Tensor  # sum of x x'^T

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> PairedStatistics:
        """Start with nothing seen."""
        return cls(*(torch.zeros(in_features, in_features, device=device) for _ in range(3)))

    def add(self, original: torch.Tensor, other: torch.Tensor, token_weights: torch.Tensor | None) -> None:
        """Take in both activations [..., in] of the same tokens, weighted as in `InputStatistics.add`."""
        rows, others = (each.detach().flatten(0, -2).float() for each in (original, other))
        weighted, weighted_others = rows, others
        if token_weights is not None:
            weights = token_weights.reshape(-1, 1).to(rows)
            weighted, weighted_others = weights * rows, weights * others
        add_symmetric_product(self.original, weighted.T, rows)
        add_symmetric_product(self.gram, weighted_others.T, others)
        self.cross_moment.addmm_(weighted.T, others)


@dataclass
class LayerwiseModel:
    """A decoder whose layers are loaded one at a time.

    Attributes:
        config: The transformers config; if it describes a compressed checkpoint, so must `store`.
        store: The weights, under the names of transformers' modules. Tensors that the model does not have (a
            stored copy of a tied output layer, say) are hidden, and listed in `surplus_tensors`.
        device: Where layers run.
        dtype: In which precision they run, whatever they are stored in.
    """

    config: Any
    store: TensorStore
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    model: nn.Module = field(init=False)
    surplus_tensors: tuple[str, ...] = field(init=False)
    architecture: Architecture = field(init=False)
    _layers: list[nn.Module] = field(init=False)
    _layer_arguments: dict[torch.Size, list[dict[str, Any]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Build the meta model.

        Raises:
            ArchitectureError: unsupported architecture.
            CheckpointError: the store lacks tensors of the model, or has them in another shape.
        """
        config = copy.deepcopy(self.config)
        compressed = compressed_config(config)
        if compressed is not None:
            del config.quantization_config
        config.use_cache = False
        self.model = build_meta_model(config, trust_remote_code=self.trust_remote_code)
        self.architecture = describe(self.model, config)
        if compressed is not None:
            replace_linears(self.model, compressed)
        wanted = self._check_store()
        self.surplus_tensors = tuple(sorted(self.store.names() - wanted))
        self.store = RenamedStore(self.store, {name: name for name in wanted})
        stack = self.model.get_submodule(self.architecture.layers_prefix)
        assert isinstance(stack, nn.ModuleList)
        self._layers = list(stack)

    def _check_store(self) -> frozenset[str]:
        """Compare names and shapes with the store's before anything is loaded; return the model's names."""
        stored = self.store.names()
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        is_tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        tied = {
            f"{name}.weight" for name, module in self.model.named_modules() if is_tied and module is output
        }
        problems = []
        for name, tensor in self.model.state_dict().items():
            if name not in stored:
                if name not in tied:
                    problems.append(f"{name} is missing")
            elif self.store.info(name).shape != tuple(tensor.shape):
                problems.append(
                    f"{name} has shape {list(self.store.info(name).shape)}, "
                    f"the config asks for {list(tensor.shape)}"
                )
            elif tensor.is_floating_point() and self.store.info(name).dtype not in _FLOATS:
                problems.append(
                    f"{name} is stored as {self.store.info(name).dtype}; only {', '.join(_FLOATS)} will do"
                )
        if problems:
            listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else "")
            raise CheckpointError(f"weights and config.json disagree: {listed}")
        return frozenset(self.model.state_dict()) - tied

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the precision a tensor is stored in."""
        return torch_dtype(self.store.info(name).dtype)

    def batches(self, samples: Sequence[Sample]) -> list[Batch]:
        """Put samples into batches that fit comfortably through one layer."""
        return make_batches(samples, MAX_TOKENS_PER_BATCH)

    @torch.no_grad()
    def embed(
        self, batches: Sequence[Batch], *, observe: Mapping[str, InputStatistics] | None = None
    ) -> list[torch.Tensor]:
        """Return the first layer's input [rows, tokens, hidden] for every batch, image features in place.

        Args:
            batches: Sequences with or without pictures.
            observe: Module's name, of what stands before the layers (a vision tower's Linear, say) ->
                statistics of its input to accumulate.
        """
        hidden: list[torch.Tensor] = []
        with self._outside_layers(with_head=False), _observing(self.model, observe or {}, None):
            for batch in batches:
                calls: list[dict[str, Any]] = []

                def record(
                    states: torch.Tensor, kwargs: dict[str, Any], calls: list[dict[str, Any]] = calls
                ) -> torch.Tensor:
                    if not calls:
                        hidden.append(states)
                    calls.append(kwargs)
                    if len(calls) == len(self._layers):
                        raise _EmbeddingDone
                    return states

                with self._layers_replaced(record), suppress(_EmbeddingDone):
                    self.model(**batch.model_inputs(self.device, self.dtype), use_cache=False)
                # Without padding the arguments depend on the batch's shape alone.
                self._layer_arguments.setdefault(batch.tokens.shape, calls)
        return hidden

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load decoder layer `index`; it is forgotten when the context ends.

        Raises:
            CheckpointError: a weight is not finite.
        """
        module = copy.deepcopy(self._layers[index])
        self._load(module, f"{self.architecture.layers_prefix}.{index}.")
        yield module

    def run_layer(self, module: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output [batch, tokens, hidden] of a loaded layer."""
        arguments = self._layer_arguments[hidden.shape[:2]][index]
        output = module(hidden, **arguments)
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def input_statistics(self, layer: LayerLinears) -> dict[str, InputStatistics]:
        """Return empty statistics for `advance` to fill: one for each group of Linears with a shared input.

        The key is the name of the group's first Linear within the layer.
        """
        return {
            layer.local_name(group[0]): InputStatistics.zeros(group[0].in_features, self.device)
            for group in layer.groups
        }

    @torch.no_grad()
    def advance(
        self,
        index: int,
        hidden: list[torch.Tensor],
        *,
        observe: Mapping[str, InputStatistics] | None = None,
        token_weights: Sequence[torch.Tensor | None] | None = None,
        module: nn.Module | None = None,
        batches: range | None = None,
    ) -> None:
        """Replace every batch's activations by the output of layer `index`.

        Args:
            index: The decoder layer.
            hidden: Activations of every batch, replaced one by one so that both never exist in full.
            observe: Linear's name within the layer -> statistics of its input to accumulate.
            token_weights: How much each token of every batch counts in them; None: all count one.
            module: The layer, if it is loaded already.
            batches: Positions of the batches to do this with; None: all.
        """
        if module is None:
            with self.layer(index) as loaded:
                self.advance(
                    index,
                    hidden,
                    observe=observe,
                    token_weights=token_weights,
                    module=loaded,
                    batches=batches,
                )
            return
        for position in range(len(hidden)) if batches is None else batches:
            weights = token_weights[position] if token_weights is not None else None
            with _observing(module, observe or {}, weights):
                hidden[position] = self.run_layer(module, index, hidden[position])

    @torch.no_grad()
    def linear_inputs(self, module: nn.Module, index: int, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """Return the inputs [batch, tokens, in] of the submodule `name` of a loaded layer.

        The layer runs no further than to that submodule.

        Args:
            module: The layer.
            index: Its index.
            hidden: The layer's inputs of one batch.
            name: Of a Linear within the layer.
        """
        found: list[torch.Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _InputsReached

        handle = module.get_submodule(name).register_forward_pre_hook(stop)
        try:
            with suppress(_InputsReached):
                self.run_layer(module, index, hidden)
        finally:
            handle.remove()
        return found[0]

    def retreat(
        self,
        index: int,
        module: nn.Module,
        hidden: Sequence[torch.Tensor],
        gradients: list[torch.Tensor],
        *,
        observe: Mapping[str, InputStatistics],
        token_weights: Sequence[torch.Tensor | None],
    ) -> None:
        """Replace gradients of a loss by the outputs of layer `index` by those by its inputs.

        Args:
            index: The decoder layer.
            module: That layer, loaded.
            hidden: The layer's inputs of every batch.
            gradients: By its outputs, in the same order; replaced one by one.
            observe: Linear's name within the layer -> statistics of gradients by its output to accumulate.
            token_weights: How much each token of every batch counts in them.
        """
        module.requires_grad_(False)
        for position, states in enumerate(hidden):
            inputs = states.detach().requires_grad_()
            with torch.enable_grad(), _observing_gradients(module, observe, token_weights[position]):
                outputs = self.run_layer(module, index, inputs)
                [gradients[position]] = torch.autograd.grad(outputs, inputs, gradients[position])

    def sampled_loss_gradients(
        self, batches: Sequence[Batch], hidden: Sequence[torch.Tensor], seed: int
    ) -> list[torch.Tensor]:
        """Return gradients [rows, tokens, hidden] of a loss by the last layer's outputs.

        The loss is the negative log-likelihood, summed over all positions, of next tokens that are drawn from
        the model's own predictions: the expected outer product of its gradients is the Fisher information.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        found = [torch.empty_like(states) for states in hidden]
        with self._outside_layers(with_head=True):
            for position, batch in enumerate(batches):
                for part in self._parts(batch):
                    last = hidden[position][part].detach().requires_grad_()
                    with torch.enable_grad():
                        logits = self._head(batch.tokens[part], last).flatten(0, 1)
                        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                        loss = functional.cross_entropy(logits, drawn[:, 0], reduction="sum")
                        [found[position][part]] = torch.autograd.grad(loss, last)
        return found

    def _parts(self, batch: Batch) -> Iterator[slice]:
        """Yield slices of a batch's rows whose logits fit comfortably into memory."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        size = max(1, MAX_LOGITS_AT_ONCE // (vocabulary * batch.tokens.shape[1]))
        for start in range(0, len(batch.rows), size):
            yield slice(start, start + size)

    @torch.no_grad()
    def logits(
        self, batches: Sequence[Batch], hidden: Sequence[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield where each sample stood, its token ids [tokens] and logits [tokens, vocabulary].

        They are computed a few rows at a time, so that large vocabularies do not fill the memory.
        """
        with self._outside_layers(with_head=True):
            for batch, states in zip(batches, hidden, strict=True):
                for part in self._parts(batch):
                    logits = self._head(batch.tokens[part], states[part])
                    yield from zip(batch.rows[part], batch.tokens[part], logits, strict=True)

    def _head(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Run the model's forward with the last layer's output [rows, tokens, hidden] put in place.

        Pictures are not needed for that: what stands before the layers is thrown away.
        """
        calls = 0

        def replay(passed: torch.Tensor, _kwargs: dict[str, Any]) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return last if calls == len(self._layers) else passed

        with self._layers_replaced(replay):
            logits: torch.Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits.float()

    @contextmanager
    def _layers_replaced(self, on_call: _OnCall) -> Iterator[None]:
        stack = self.model.get_submodule(self.architecture.layers_prefix)
        assert isinstance(stack, nn.ModuleList)
        for index, layer in enumerate(self._layers):
            stack[index] = _RecordingLayer(layer, on_call)
        try:
            yield
        finally:
            for index, layer in enumerate(self._layers):
                stack[index] = layer

    @contextmanager
    def _outside_layers(self, *, with_head: bool) -> Iterator[None]:
        """Load everything but the decoder layers (and the output layer, unless wanted) for a while."""
        prefix = f"{self.architecture.layers_prefix}."
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        outside = [
            (name, module)
            for name, module in self.model.named_modules()
            if not f"{name}.".startswith(prefix) and (with_head or module is not head)
        ]
        saved = [(module, dict(module._parameters), dict(module._buffers)) for _, module in outside]
        try:
            for name, module in outside:
                # A tied output layer has no tensor of its own in the store.
                own = [n for n in module._parameters if f"{name}.{n}".lstrip(".") in self.store.names()]
                if own or module is not head:
                    self._load(module, f"{name}." if name else "", recurse=False)
            if with_head:
                tie_weights(self.model)
            yield
        finally:
            for module, parameters, buffers in saved:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def _load(self, module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
        """Give `module` its tensors from the store, in the compute precision, on the device."""
        wanted = module.state_dict() if recurse else _own_state(module)
        stored = self.store.read(prefix + name for name in wanted)
        tensors = {}
        for name in wanted:
            tensor = stored.pop(prefix + name)
            if tensor.is_floating_point():
                tensor = tensor.to(self.device, self.dtype)
                if not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"{prefix}{name} holds NaN or infinite values")
            tensors[name] = tensor.to(self.device)
        if recurse:
            module.load_state_dict(tensors, assign=True)
        else:
            for name, tensor in tensors.items():
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
                else:
                    module._buffers[name] = tensor
        for parameter in module.parameters(recurse=recurse):
            parameter.requires_grad_(False)
        for name, buffer in module.named_buffers(recurse=recurse):
            if name not in wanted:
                module.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer.to(
                    self.device
                )


@contextmanager
def _observing(
    module: nn.Module, observe: Mapping[str, InputStatistics], token_weights: torch.Tensor | None
) -> Iterator[None]:
    """Let the named submodules' inputs be added to the statistics while the context lasts."""
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, statistics=statistics: statistics.add(inputs[0], token_weights)
        )
        for name, statistics in observe.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _observing_gradients(
    module: nn.Module, observe: Mapping[str, InputStatistics], token_weights: torch.Tensor | None
) -> Iterator[None]:
    """Let gradients by the named submodules' outputs be added to the statistics while the context lasts."""

    def on_output(statistics: InputStatistics, output: torch.Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: statistics.add(gradient, token_weights)
        )

    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, statistics=statistics: on_output(statistics, output)
        )
        for name, statistics in observe.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of `module` itself that a checkpoint holds."""
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    buffers = {
        name: value
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    }
    return parameters | buffers
