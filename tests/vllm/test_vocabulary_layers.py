"""Single embeddings and output layers of vLLM, rank by rank, against the matrices that they stand for."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ercsvd_deploy.exporters.vllm.kernels.record import KernelError
from ercsvd_deploy.exporters.vllm.layers import rows
from ercsvd_deploy.exporters.vllm.plugin import register
from ercsvd_deploy.exporters.vllm.vocabulary_support import PLAIN_EMBEDDINGS, PLAIN_OUTPUT_LAYERS
from ercsvd_deploy.format.schema import CheckpointConfig, CheckpointFormatError, Storage, WeightQuantization
from tests.tiny_models import restore_linear, store_linear
from tests.vllm.in_process import vllm_in_process  # noqa: F401 - a fixture of this module

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_in_process")]

TOKENS, HIDDEN = 282, 64  # vLLM makes 320 tokens of them
EMBEDDING, OUTPUT_LAYER = "model.embed_tokens", "lm_head"


class Served:
    """An embedding and an output layer of integers on one tensor-parallel rank.

    Args:
        bits: of the integers of each; those left out are plain.
        dtype: of the activations.
        patch: the test's monkeypatch.
        rank: (tensor-parallel rank, size), which the layers are told.
        is_tied: whether the output layer multiplies the embedding's matrix.
        config: further keys of the description.
        lacks: leaf of the embedding that the checkpoint lacks.
    """

    def __init__(
        self,
        bits: dict[str, int],
        dtype: torch.dtype,
        patch: pytest.MonkeyPatch,
        rank: tuple[int, int] = (0, 1),
        *,
        is_tied: bool = False,
        config: dict[str, Any] | None = None,
        lacks: str | None = None,
    ) -> None:
        from vllm.model_executor.layers import vocab_parallel_embedding as layers
        from vllm.model_executor.layers.quantization import get_quantization_config

        register()
        patch.setattr(layers, "get_tensor_model_parallel_rank", lambda: rank[0])
        patch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: rank[1])
        generator = torch.Generator().manual_seed(3)
        modules, self.dense, self.tensors = {}, {}, {}
        for name in (EMBEDDING, OUTPUT_LAYER):
            weight = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
            self.dense[name], self.tensors[name] = weight, {"weight": weight}
            if name in bits:
                storage = Storage.dense((TOKENS, HIDDEN), WeightQuantization(bits=bits[name], group_size=32))
                modules[name], self.tensors[name] = storage, store_linear(weight, storage)
                self.dense[name] = restore_linear(self.tensors[name], storage)
        description = CheckpointConfig(modules=modules).write() | (config or {})
        quantization = get_quantization_config("ercsvd").from_config(description)
        shared = {"params_dtype": dtype, "quant_config": quantization}
        # as Llama's model: the embedding is not told its name
        self.embedding = layers.VocabParallelEmbedding(TOKENS, HIDDEN, **shared)
        self.output_layer = layers.ParallelLMHead(TOKENS, HIDDEN, prefix=OUTPUT_LAYER, **shared)
        if is_tied:
            self.output_layer = self.output_layer.tie_weights(self.embedding)
            self.dense[OUTPUT_LAYER] = self.dense[EMBEDDING]
        owned = [(self.embedding, EMBEDDING)] + ([] if is_tied else [(self.output_layer, OUTPUT_LAYER)])
        for layer, name in owned:
            parameters = dict(layer.named_parameters())
            for leaf, tensor in self.tensors[name].items():
                if (name, leaf) == (EMBEDDING, lacks):
                    continue
                parameters[leaf].weight_loader(parameters[leaf], tensor)
        self.finalize()

    def finalize(self) -> None:
        for layer in (self.embedding, self.output_layer):
            layer.quant_method.process_weights_after_loading(layer)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output_layer.quant_method.apply(self.output_layer, x)
        return logits

    def own_rows(self, name: str) -> torch.Tensor:
        indices = self.embedding.shard_indices
        return self.dense[name][indices.org_vocab_start_index : indices.org_vocab_end_index]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_every_rank(bits: int, is_tied: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float16
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(4)).to(dtype)
    own = {EMBEDDING: bits} if is_tied else {EMBEDDING: bits, OUTPUT_LAYER: bits}
    for rank in range(size):
        served = Served(own, dtype, monkeypatch, (rank, size), is_tied=is_tied)
        matrix = served.own_rows(EMBEDDING)
        ids = torch.tensor([[0, 7, len(matrix) - 1], [3, 3, 100]])
        torch.testing.assert_close(
            served.embedding.quant_method.embedding(served.embedding, ids), matrix[ids], rtol=0, atol=0
        )
        head = served.own_rows(OUTPUT_LAYER)
        logits = served.logits(x)
        assert logits.shape == (5, 320 // size)
        torch.testing.assert_close(logits[:, : len(head)], x @ head.T, rtol=2e-3, atol=2e-2)
        assert not logits[:, len(head) :].any()


@pytest.mark.parametrize("size", [1, 2])
def test_tied_integers_stay_packed_where_there_is_a_gpu(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 48)

    class Gpu:
        @staticmethod
        def is_cpu() -> bool:
            return False

    monkeypatch.setattr(rows, "current_platform", Gpu)
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(4))
    served = Served({EMBEDDING: 6}, torch.float32, monkeypatch, (size - 1, size), is_tied=True)
    matrix = served.own_rows(EMBEDDING)
    torch.testing.assert_close(served.logits(x)[..., : len(matrix)], x @ matrix.T, rtol=1e-5, atol=1e-4)
    tensors = [*served.embedding.parameters(), *served.output_layer.parameters()]
    assert not [
        tensor
        for tensor in tensors
        if tensor.numel() and tensor.dtype == torch.float32 and tensor.shape[-1] == HIDDEN
    ]


def test_plain_output_layer_beside_an_embedding_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served({EMBEDDING: 8}, torch.float32, monkeypatch)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        served.logits(x)[:, :TOKENS], x @ served.dense[OUTPUT_LAYER].T, rtol=1e-5, atol=1e-4
    )


def test_required_kernels_refuse_a_tied_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="whose rows are looked up as well"):
        Served({EMBEDDING: 4}, torch.float16, monkeypatch, is_tied=True, config={"require_kernels": True})


def test_missing_tensors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointFormatError, match=r"missing: model\.embed_tokens\.weight_scale \[282, 2\]"):
        Served({EMBEDDING: 8}, torch.float32, monkeypatch, lacks="weight_scale")


def test_models_that_build_them_plain_are_those_of_vllms_sources() -> None:
    from vllm.model_executor import models

    folder = Path(models.__file__).parent
    architectures = _architectures(ast.parse((folder / "registry.py").read_text()))
    found: dict[str, set[str]] = {"VocabParallelEmbedding": set(), "ParallelLMHead": set()}
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        file = folder / f"{architectures.get(architecture)}.py"
        if file.is_file():
            for layer in _plain_layers(ast.parse(file.read_text())):
                found[layer].add(model_type)
    assert found["VocabParallelEmbedding"] >= PLAIN_EMBEDDINGS
    assert found["ParallelLMHead"] >= PLAIN_OUTPUT_LAYERS
    from ercsvd_deploy.models.description.tested_families import _ELSEWHERE, read_results

    tested = {name.partition("-")[0] for name in read_results()} | _ELSEWHERE
    assert found["VocabParallelEmbedding"] & tested <= PLAIN_EMBEDDINGS
    assert found["ParallelLMHead"] & tested <= PLAIN_OUTPUT_LAYERS


def _architectures(registry: ast.Module) -> dict[str, str]:
    """Return architecture -> module, from vLLM's tables of models."""
    found: dict[str, str] = {}
    for table in (node for node in ast.walk(registry) if isinstance(node, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                module = value.elts[0]
                if isinstance(module, ast.Constant):
                    found.setdefault(str(key.value), str(module.value))
    return found


def _plain_layers(module: ast.Module) -> set[str]:
    """Return the layers with a row for every token that a model builds without the quantization config."""
    return {
        node.func.id
        for node in ast.walk(module)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("VocabParallelEmbedding", "ParallelLMHead")
        and "quant_config" not in {keyword.arg for keyword in node.keywords}
    }
