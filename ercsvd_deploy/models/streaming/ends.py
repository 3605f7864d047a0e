"""Everything in a decoder but its layers: what the model computes before the first and after the last.

The model is built on the meta device. Its own forward pass, with every decoder layer replaced by a recorder,
turns token ids into the first layer's input and records the keyword arguments (masks, rotary embeddings) of
each layer; the same pass, given the last layer's output, computes the logits. Everything outside
the layers is therefore the code of the model itself, whatever the architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ercsvd_deploy.data.samples import Batch, Sample, make_batches
from ercsvd_deploy.format.files.tensor_store import TensorStore, torch_dtype
from ercsvd_deploy.linalg.side_by_side import is_small
from ercsvd_deploy.models.checkpoints.fitting import fit_store
from ercsvd_deploy.models.checkpoints.loading import load_tensors, own_state
from ercsvd_deploy.models.compressed.replacement import replace_linears
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.models.description.families import describe, module_tensors
from ercsvd_deploy.models.description.meta import build_meta_model, compressed_config, tie_weights
from ercsvd_deploy.models.experts.routed import separate_experts
from ercsvd_deploy.models.streaming.layer_calls import CallRecorder, LayerCalls
from ercsvd_deploy.models.streaming.recording import EmbeddingDone, OnCall, capture_input, layers_replaced
from ercsvd_deploy.models.streaming.statistics import (
    InputStatistics,
    TokenWeight,
    observing,
)

MAX_TOKENS_PER_BATCH = 8192
_MAX_TOKENS_SIDE_BY_SIDE = 2048  # enough batches for all cores, each small enough for a core's cache
MAX_LOGITS_AT_ONCE = 2**28


def passes_side_by_side(architecture: Architecture, device: torch.device) -> bool:
    """Whether batches pass through a layer in parallel, each on one core, see `side_by_side`."""
    linears = architecture.linears
    return is_small((max(linear.out_features, linear.in_features) for linear in linears), device)


def max_tokens_per_batch(architecture: Architecture, device: torch.device) -> int:
    """Return the maximum number of tokens in a batch; a single longer sequence may exceed it."""
    return _MAX_TOKENS_SIDE_BY_SIDE if passes_side_by_side(architecture, device) else MAX_TOKENS_PER_BATCH


@dataclass
class ModelEnds:
    """The modules of a decoder outside its layers, loaded only while they are used.

    Attributes:
        config: The transformers config; of a compressed checkpoint if `store` holds one.
        store: The weights, under the names of transformers' modules. Tensors that the model does not have (a
            stored copy of a tied output layer, for example) are hidden and listed in `surplus_tensors`.
        device: The device that the model runs on.
        dtype: Precision of the computation; stored weights are converted to it.
        token_weight: Weighting of tokens in input statistics, see `InputStatistics`.
        described: The architecture, if a model of the same config has been described already.
    """

    config: Any
    store: TensorStore
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    token_weight: TokenWeight = "uniform"
    described: Architecture | None = None
    model: nn.Module = field(init=False)
    surplus_tensors: tuple[str, ...] = field(init=False)
    architecture: Architecture = field(init=False)
    _layers: list[nn.Module] = field(init=False)
    _calls: LayerCalls = field(init=False, default_factory=LayerCalls)

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
        self.architecture = self.described or describe(self.model, config)
        separate_experts(self.model)
        if compressed is not None:
            replace_linears(self.model, compressed)
        self.store, self.surplus_tensors = fit_store(
            self.model, self.store, module_tensors(self.model, config)
        )
        self._layers = list(self._stack)

    @property
    def token_weight_elsewhere(self) -> TokenWeight:
        """Weighting of tokens where no sensitivity is measured: at all but the layers' own Linears."""
        return "unit_norm" if self.token_weight == "sensitivity" else self.token_weight

    @property
    def _stack(self) -> nn.ModuleList:
        stack = self.model.get_submodule(self.architecture.layers_prefix)
        assert isinstance(stack, nn.ModuleList)
        return stack

    def surplus_warnings(self) -> list[str]:
        """Return warnings about stored tensors that the model does not have and the export leaves out."""
        surplus = self.surplus_tensors
        if not surplus:
            return []
        listed = ", ".join(surplus[:3]) + (f" and {len(surplus) - 3} more" if surplus[3:] else "")
        return [f"stored tensors that the model does not use are left out of the export: {listed}"]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    @property
    def is_small(self) -> bool:
        """Whether batches and Linears are processed in parallel, each on one core, see `side_by_side`."""
        return passes_side_by_side(self.architecture, self.device)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the precision a tensor is stored in."""
        return torch_dtype(self.store.info(name).dtype)

    def batches(self, samples: Sequence[Sample]) -> list[Batch]:
        """Return the samples in batches of at most `max_tokens_per_batch` tokens."""
        return make_batches(samples, max_tokens_per_batch(self.architecture, self.device))

    @torch.no_grad()
    def embed(
        self, batches: Sequence[Batch], *, observe: Mapping[str, InputStatistics] | None = None
    ) -> list[torch.Tensor]:
        """Return the first layer's input [rows, tokens, hidden] for every batch, image features in place.

        Args:
            batches: Sequences with or without pictures.
            observe: Input statistics to accumulate, by the name of a module that runs before the layers, such
                as a Linear of the vision tower.
        """
        hidden: list[torch.Tensor] = []
        with self._outside_layers(with_head=False), observing(self.model, observe or {}, None):
            for batch in batches:
                recorder = CallRecorder(len(self._layers))
                with self._layers_replaced(recorder), suppress(EmbeddingDone):
                    self.model(**self._model_inputs(batch), use_cache=False)
                hidden.append(recorder.first_input)
                self._calls.record(batch, recorder.calls)
        return hidden

    def _model_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward pass; token types only if the model takes them."""
        parameters = signature(self.model.forward).parameters
        inputs = batch.model_inputs(self.device, self.dtype)
        ignored = batch.token_types.keys() - parameters
        return {name: value for name, value in inputs.items() if name not in ignored}

    def forget_inputs(self) -> None:
        """Free the layers' arguments that `embed` recorded: masks and rotary embeddings on the device.

        Nothing else stays on the device between passes; the next `embed` records them again.
        """
        self._calls.clear()

    def sampled_loss_gradients(
        self, batches: Sequence[Batch], hidden: Sequence[torch.Tensor], seed: int
    ) -> list[torch.Tensor]:
        """Return gradients [rows, tokens, hidden] of a loss with respect to the last layer's outputs.

        The loss is the negative log-likelihood, summed over all positions, of next tokens that are drawn from
        the model's own predictions: the expected outer product of its gradients is the Fisher information.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        gradients = [torch.empty_like(states) for states in hidden]
        with self._outside_layers(with_head=True):
            for position, batch in enumerate(batches):
                for row_slice in self._row_slices(batch):
                    last_states = hidden[position][row_slice].detach().requires_grad_()
                    with torch.enable_grad():
                        logits = self._head(batch.tokens[row_slice], last_states).flatten(0, 1)
                        tokens = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                        loss = functional.cross_entropy(logits, tokens[:, 0], reduction="sum")
                        [gradients[position][row_slice]] = torch.autograd.grad(loss, last_states)
        return gradients

    def with_head(self) -> AbstractContextManager[None]:
        """Load all modules outside the layers while the context lasts."""
        return self._outside_layers(with_head=True)

    def divergence_from(
        self,
        original: ModelEnds,
        batch: Batch,
        last_states: torch.Tensor,
        original_states: torch.Tensor,
    ) -> float:
        """Return how far predictions are from another model's; both are loaded `with_head`.

        Args:
            original: The other model, p.
            batch: The sequences.
            last_states: The last layer's outputs of this model, q, [rows, tokens, hidden]. If they require
                gradients, those of the result are added to them.
            original_states: Those of the other one.

        Returns:
            KL(p || q) in nats, its mean over the batch's tokens, weighted if they have weights.
        """
        weights = torch.ones(batch.tokens.shape) if batch.token_weights is None else batch.token_weights
        shares = weights.to(self.device, torch.float32)
        shares = shares / shares.sum().clamp(min=torch.finfo(torch.float32).tiny)
        total = 0.0
        for row_slice in self._row_slices(batch):
            tokens = batch.tokens[row_slice]
            with torch.no_grad():
                expected = original._head(tokens, original_states[row_slice]).log_softmax(-1)
            with torch.set_grad_enabled(last_states.requires_grad):
                found = self._head(tokens, last_states[row_slice]).log_softmax(-1)
                divergence = functional.kl_div(found, expected, reduction="none", log_target=True)
                loss = (shares[row_slice] * divergence.sum(-1)).sum()
                if last_states.requires_grad:
                    loss.backward(inputs=[last_states])  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _row_slices(self, batch: Batch) -> Iterator[slice]:
        """Yield slices of a batch's rows whose logits fit into memory."""
        size = max(1, MAX_LOGITS_AT_ONCE // (self.architecture.vocab_size * batch.tokens.shape[1]))
        for start in range(0, len(batch.rows), size):
            yield slice(start, start + size)

    @torch.no_grad()
    def logits(
        self, batches: Sequence[Batch], hidden: Sequence[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the position of each sample, its token ids [tokens] and logits [tokens, vocabulary].

        Logits are computed a few rows at a time: those of large vocabularies would fill the memory.
        """
        with self._outside_layers(with_head=True):
            for batch, states in zip(batches, hidden, strict=True):
                for row_slice in self._row_slices(batch):
                    logits = self._head(batch.tokens[row_slice], states[row_slice])
                    yield from zip(batch.rows[row_slice], batch.tokens[row_slice], logits, strict=True)

    @torch.no_grad()
    def output_layer_inputs(
        self, batches: Sequence[Batch], hidden: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Yield the output layer's input [rows, tokens, hidden] for the last layer's output of every batch.

        The output layer is not loaded: the forward pass stops there.
        """
        output_layer = self.architecture.vocabulary.output_layer
        assert output_layer is not None, "a plan refuses to quantize what is no Linear"
        with self._outside_layers(with_head=False):
            for batch, states in zip(batches, hidden, strict=True):
                run = partial(self._head, batch.tokens, states)
                yield capture_input(self.model, output_layer.name, run)

    def _head(self, tokens: torch.Tensor, last_states: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [rows, tokens, vocabulary] of the last layer's output `last_states`.

        The model's own forward pass computes them. It runs without pictures: the results of the modules
        before the layers are not used.
        """
        num_calls = 0

        def replay(states: torch.Tensor, _kwargs: dict[str, Any]) -> torch.Tensor:
            nonlocal num_calls
            num_calls += 1
            return last_states if num_calls == len(self._layers) else states

        with self._layers_replaced(replay):
            logits: torch.Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return logits.float()

    def _layers_replaced(self, on_call: OnCall) -> AbstractContextManager[None]:
        """Replace the decoder layers by calls of `on_call` while the context lasts."""
        num_returned = self.architecture.num_layer_outputs
        return layers_replaced(self._stack, self._layers, on_call, num_returned=num_returned)

    @contextmanager
    def _outside_layers(self, *, with_head: bool) -> Iterator[None]:
        """Load all modules outside the layers while the context lasts; the output layer only `with_head`."""
        layers_prefix = f"{self.architecture.layers_prefix}."
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        outside_modules = [
            (name, module)
            for name, module in self.model.named_modules()
            if not f"{name}.".startswith(layers_prefix) and (with_head or module is not head)
        ]
        saved = [(module, dict(module._parameters), dict(module._buffers)) for _, module in outside_modules]
        try:
            for name, module in outside_modules:
                # A tied output layer has no tensor of its own in the store.
                stored_names = {
                    f"{name}.{leaf}".lstrip(".") for leaf in own_state(module)
                } & self.store.names()
                if stored_names or module is not head:
                    prefix = f"{name}." if name else ""
                    load_tensors(module, prefix, self.store, self.device, self.dtype, recurse=False)
            if with_head:
                tie_weights(self.model)
            yield
        finally:
            for module, parameters, buffers in saved:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
