"""Random pico models of every supported family, and randomly compressed checkpoints of them.

Nothing here knows the method: `compress_at_random` writes the on-disk format straight from its description
(`format.schema`), so that readers are tested against the format rather than against our own writer.
`materialise` undoes it naively and gives the dense model that a reader's logits must equal.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, repeat
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors.pack_quantized import (
    PackedQuantizationCompressor,
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ercsvd_deploy.format.schema import (
    FACTOR_A,
    FACTOR_B,
    GUARD,
    GUARD_SHAPE,
    OTHER_ROWS,
    PIVOT_ROWS,
    ROW_ORDER,
    CheckpointConfig,
    Storage,
    WeightQuantization,
)
from tests import tiny_vision
from tests.vllm.kernel_contract.integer_layouts import pack_first, pack_last, unpack_last

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
VISION_FAMILIES = ("llava", "llava_next")

HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 256
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 32
VOCAB_SIZE = 256
MAX_POSITIONS = 256

WEIGHTS_FILE = "model.safetensors"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "opt": (OPTConfig, OPTForCausalLM),
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
# bytes 253..255 never occur in UTF-8: their places in the 256-entry vocabulary go to the special tokens
_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

_DECODER_LINEAR = re.compile(
    r"^(?P<module>(?!.*vision).*\blayers\.(?P<layer>\d+)\..*\b"
    r"(?P<leaf>q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2))\.weight$"
)
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2")
_FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# The first layer shows every kind of matrix, mixed inside its fused layers: leaf -> (low-rank, quantized).
# Those of the projector stand here too, where they are compressed at all.
_FIRST_LAYER = {
    "q_proj": (True, True),
    "k_proj": (False, True),
    "v_proj": (True, False),
    "gate_proj": (False, False),
    "up_proj": (True, True),
    "linear_1": (True, False),
    "linear_2": (True, False),
}
_SOME_CORRECTED = ("k_proj", "up_proj", "o_proj")


def save_tiny_model(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    **config_overrides: Any,
) -> Path:
    """Write a random pico model with tokenizer, generation config and chat template; return `directory`.

    Linear weights have unit gain, norms and biases are random too: logits spread over a few units and no
    parameter can be dropped unnoticed.

    Args:
        directory: where to write.
        family: one of `FAMILIES` or `VISION_FAMILIES`.
        seed: of every weight.
        dtype: of every weight.
        num_layers: of the language model.
        **config_overrides: keys of the language model's config.
    """
    config_class, model_class = _CLASSES[family]
    if reads_images := family in VISION_FAMILIES:
        text = _config_arguments("llama", num_layers) | {"vocab_size": VOCAB_SIZE + 1} | config_overrides
        arguments = tiny_vision.config_arguments(family, LlamaConfig(**text))
    else:
        arguments = _config_arguments(family, num_layers) | config_overrides
    model = model_class(config_class(**arguments))
    randomise(model, torch.Generator().manual_seed(seed))
    model.to(dtype)
    model.config.dtype = dtype
    generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if reads_images:
        tiny_vision.save_in_hub_layout(model, generation_config, directory / WEIGHTS_FILE)
        tiny_vision.make_processor(family, make_tokenizer()).save_pretrained(directory)
    else:
        model.generation_config = generation_config
        model.save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
    return directory


def compress_at_random(
    source: Path,
    target: Path,
    *,
    seed: int = 0,
    quantization: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    include_vision: bool = False,
    pivoted_layers: frozenset[str] = frozenset({"1"}),
    corrected: Literal["some", "all"] | None = None,
    vocabulary: Mapping[str, Mapping[str, Any]] | None = None,
) -> CheckpointConfig:
    """Write `source`, its decoder Linears randomly dense, low-rank or pivoted, plain or integer, to `target`.

    Ranks are unequal multiples of 32 (or of the group size). The first layer mixes all kinds inside its fused
    layers; elsewhere every matrix is drawn on its own.

    Args:
        source: a directory that `save_tiny_model` wrote.
        target: the directory to write.
        seed: of every choice.
        quantization: keys of `WeightQuantization`, or several which the Linears have in turn; None leaves
            every matrix in floating point.
        include_vision: treat the Linears of projector and vision tower too, as far as the tower is run; they
            stay in floating point.
        pivoted_layers: in these, Linears that would be low-rank are pivoted, all but value projections.
        corrected: which Linears of the first layer are integers with a low-rank correction: "some" leaves
            others beside them in fused layers.
        vocabulary: name of the embedding or the output layer -> keys of `WeightQuantization`.
    """
    generator = torch.Generator().manual_seed(seed)
    in_turn = [quantization] if isinstance(quantization, Mapping) else quantization
    kinds: Iterator[WeightQuantization | None] = repeat(None)
    if in_turn is not None:
        kinds = cycle([WeightQuantization(**kind) for kind in in_turn])
    tensors = load_file(source / WEIGHTS_FILE)
    linears = [(match, next(kinds)) for name in sorted(tensors) if (match := _DECODER_LINEAR.match(name))]
    if include_vision:
        linears += [(match, None) for match in tiny_vision.match_linears(source, tensors)]
    descriptions = {}
    free_ranks: dict[tuple[str, str], list[int]] = {}
    for match, storage in linears:
        weight = tensors[match[0]]
        out_features, in_features = weight.shape
        group = next((",".join(group) for group in _FUSED_GROUPS if match["leaf"] in group), match["leaf"])
        block = match["module"].removesuffix(match["leaf"])
        ranks = free_ranks.setdefault((block, group), _shuffled_ranks(storage, generator))
        descriptions[match["module"]] = _describe(
            match, (out_features, in_features), ranks, storage, generator, pivoted_layers
        )
        if match["layer"] == "0" and (
            corrected == "all" or (corrected == "some" and match["leaf"] in _SOME_CORRECTED)
        ):
            assert storage is not None
            descriptions[match["module"]] = _describe_corrected(match["leaf"], weight.shape, storage)
    for name, integers in (vocabulary or {}).items():
        num_tokens, hidden_size = tensors[f"{name}.weight"].shape
        descriptions[name] = Storage.dense((num_tokens, hidden_size), WeightQuantization(**integers))
    config = CheckpointConfig(
        modules={name: described for name, described in descriptions.items() if described.is_altered}
    )
    for name, described in config.modules.items():
        weight = tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in store_linear(weight, described).items()}
    _write_like(source, target, tensors, config)
    return config


def materialise(compressed: Path, target: Path) -> Path:
    """Write the dense model that a compressed checkpoint stands for, integers dequantized."""
    raw_config = json.loads((compressed / "config.json").read_text())
    config = CheckpointConfig.read(raw_config["quantization_config"])
    tensors = load_file(compressed / WEIGHTS_FILE)
    for name, described in config.modules.items():
        stored = {leaf: tensors.pop(f"{name}.{leaf}") for leaf in described.tensor_shapes}
        tensors[f"{name}.weight"] = restore_linear(stored, described)
    _write_like(compressed, target, tensors, None)
    return target


def _config_arguments(family: str, num_layers: int) -> dict[str, Any]:
    shared = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "opt":
        return shared | {"ffn_dim": INTERMEDIATE_SIZE, "word_embed_proj_dim": HIDDEN_SIZE}
    grouped = {
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_key_value_heads": NUM_KV_HEADS,
        "tie_word_embeddings": False,
    }
    # Qwen2 has no head_dim: it follows from hidden size and heads, and is the same 32
    return shared | grouped | ({} if family == "qwen2" else {"head_dim": HEAD_DIM})


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give every parameter of a model random values, see `save_tiny_model`."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif name.endswith("A_log"):
            parameter.copy_(noise - 3)  # else the states of a linear attention last for a token or two
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.1 * noise)
        elif "embed" in name:
            parameter.copy_(0.3 * noise)  # tied heads (OPT) keep logits of a few units
        else:
            gain = 2.0 if name.startswith("lm_head") else 1.0
            parameter.copy_(noise * gain / parameter.shape[1] ** 0.5)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, and three special tokens."""
    # the byte-level alphabet writes bytes 0xFD..0xFF as the characters of the same code
    impossible = {chr(code) for code in range(0xFD, 0x100)}
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - impossible)
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",  # else Qwen2's tokenizer class adds a 257th token for it
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def _draw(generator: torch.Generator) -> bool:
    return bool(torch.randint(2, (), generator=generator))


def _shuffled_ranks(quantization: WeightQuantization | None, generator: torch.Generator) -> list[int]:
    multiple = max(32, quantization.group_size) if quantization else 32
    ranks = [rank for rank in (32, 64, 96, 128) if rank % multiple == 0]
    return [ranks[index] for index in torch.randperm(min(3, len(ranks)), generator=generator).tolist()]


def _describe(
    match: re.Match[str],
    shape: tuple[int, int],
    free_ranks: list[int],
    quantization: WeightQuantization | None,
    generator: torch.Generator,
    pivoted_layers: frozenset[str],
) -> Storage:
    drawn = [_draw(generator) for _ in range(3)]
    is_low_rank, first_is_quantized, second_is_quantized = drawn
    if match["layer"] in {"0", ""} and match["leaf"] in _FIRST_LAYER:
        is_low_rank, first_is_quantized = _FIRST_LAYER[match["leaf"]]
        second_is_quantized = first_is_quantized
    possible = [rank for rank in free_ranks if rank <= min(shape)]
    if not is_low_rank or not possible:
        return Storage(layout="dense", shape=shape, weight=quantization if first_is_quantized else None)
    free_ranks.remove(possible[0])  # the other shards of a fused layer get other ranks
    first = quantization if first_is_quantized else None
    second = quantization if second_is_quantized else None
    if match["layer"] in pivoted_layers and match["leaf"] != "v_proj" and possible[0] < shape[0]:
        return Storage(
            layout="pivoted",
            shape=shape,
            rank=possible[0],
            pivot_blocks=1 if match["leaf"] in _ROW_PARALLEL else 4,
            pivot_rows=first,
            other_rows=second,
        )
    return Storage(layout="low_rank", shape=shape, rank=possible[0], factor_a=first, factor_b=second)


def _describe_corrected(leaf: str, shape: torch.Size, quantization: WeightQuantization) -> Storage:
    """Return integers with a correction: the ranks and the factors of a fused layer's projections differ."""
    bits = {"q_proj": 8, "k_proj": 4, "v_proj": 8, "gate_proj": 4, "o_proj": 4, "down_proj": 8}.get(leaf)
    factor = None if bits is None else WeightQuantization(bits=bits, group_size=32)
    rank = 32 if leaf in ("k_proj", "gate_proj") else 64
    return Storage.corrected((shape[0], shape[1]), quantization, rank, factor, factor)


def store_linear(weight: torch.Tensor, described: Storage) -> dict[str, torch.Tensor]:
    """Return an altered module's tensors by relative name; `restore_linear` inverts it up to truncation."""
    stored = {GUARD: torch.empty(GUARD_SHAPE, dtype=weight.dtype)}
    matrices = {"": weight}
    if described.layout == "corrected":
        assert described.weight is not None
        residual = weight.double() - _unpack(_pack(weight, described.weight), described.weight).double()
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        matrices[FACTOR_A] = (s[: described.rank, None] * vh[: described.rank]).to(weight.dtype)
        matrices[FACTOR_B] = u[:, : described.rank].to(weight.dtype)
    if described.layout == "pivoted":
        assert described.pivot_blocks is not None
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        product = (u[:, : described.rank] * s[: described.rank]) @ vh[: described.rank]
        pivots = _pivots(u[:, : described.rank], described.pivot_blocks)
        others = [row for row in range(len(weight)) if row not in pivots]
        order = pivots + others
        stored[ROW_ORDER] = torch.tensor([order.index(row) for row in range(len(weight))], dtype=torch.int32)
        combinations = torch.linalg.lstsq(product[pivots].T, product[others].T).solution.T
        matrices = {
            PIVOT_ROWS: product[pivots].to(weight.dtype),
            OTHER_ROWS: combinations.to(weight.dtype),
        }
    if described.layout == "low_rank":
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        root = s[: described.rank].sqrt()
        matrices = {
            FACTOR_A: (root[:, None] * vh[: described.rank]).to(weight.dtype),
            FACTOR_B: (u[:, : described.rank] * root).to(weight.dtype),
        }
    for part, (_, quantization) in described.parts.items():
        matrix = matrices[part].contiguous()
        leaves = _pack(matrix, quantization) if quantization else {"weight": matrix}
        stored |= {f"{part}.{leaf}" if part else leaf: tensor for leaf, tensor in leaves.items()}
    return stored


def _pivots(basis: torch.Tensor, num_blocks: int) -> list[int]:
    """Return rows [rank] of a basis [out, rank], equally many of each block, that are far from dependent."""
    block, quota = len(basis) // num_blocks, basis.shape[1] // num_blocks
    pivots: list[int] = []
    remaining = basis.clone()
    for _ in range(basis.shape[1]):
        taken = [sum(row // block == index for row in pivots) for index in range(num_blocks)]
        allowed = [row for row in range(len(basis)) if row not in pivots and taken[row // block] < quota]
        pivots.append(max(allowed, key=lambda row: float(remaining[row].norm())))
        direction = remaining[pivots[-1]] / remaining[pivots[-1]].norm()
        remaining = remaining - torch.outer(remaining @ direction, direction)
    return sorted(pivots)


def restore_linear(stored: Mapping[str, torch.Tensor], described: Storage) -> torch.Tensor:
    """Return the weight [out, in] that an altered module's tensors stand for."""
    matrices = {}
    for part, (_, quantization) in described.parts.items():
        prefix = f"{part}." if part else ""
        leaves = {
            leaf.removeprefix(prefix): tensor for leaf, tensor in stored.items() if leaf.startswith(prefix)
        }
        matrices[part] = _unpack(leaves, quantization) if quantization else leaves["weight"]
    if described.layout == "dense":
        return matrices[""]
    if described.layout == "pivoted":
        pivots = matrices[PIVOT_ROWS].double()
        rows = torch.cat([pivots, matrices[OTHER_ROWS].double() @ pivots])
        return rows[stored[ROW_ORDER].long()].to(matrices[PIVOT_ROWS].dtype)
    product = matrices[FACTOR_B].double() @ matrices[FACTOR_A].double()
    if described.layout == "corrected":
        product += matrices[""].double()
    return product.to(matrices[FACTOR_B].dtype)


def _scheme(quantization: WeightQuantization) -> QuantizationScheme:
    per_row = quantization.group_size == -1
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=quantization.bits,
            symmetric=quantization.sym,
            strategy="channel" if per_row else "group",
            group_size=None if per_row else quantization.group_size,
        ),
    )


def _pack(matrix: torch.Tensor, quantization: WeightQuantization) -> dict[str, torch.Tensor]:
    """Round to nearest with compressed-tensors and pack; the inverse of `_unpack` up to rounding."""
    scheme = _scheme(quantization)
    grouped = matrix.view(len(matrix), quantization.num_groups(matrix.shape[1]), -1)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    state = {
        "weight": matrix,
        "weight_scale": scale.to(matrix.dtype),
        "weight_zero_point": zero_point.to(torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, scheme)
    leaves = {leaf: tensor.contiguous() for leaf, tensor in packed.items()}
    if 32 % quantization.bits:  # that library leaves gaps in the words
        half = 2 ** (quantization.bits - 1)
        values = unpack_from_int32(leaves["weight_packed"], quantization.bits, matrix.shape)
        leaves["weight_packed"] = pack_last(values.int() + half, quantization.bits)
        if not quantization.sym:
            leaves["weight_zero_point"] = pack_first(zero_point.int() + half, quantization.bits)
    return leaves


def _unpack(leaves: Mapping[str, torch.Tensor], quantization: WeightQuantization) -> torch.Tensor:
    state = {leaf: tensor for leaf, tensor in leaves.items() if leaf != GUARD}
    if 32 % quantization.bits:
        half = 2 ** (quantization.bits - 1)
        values = unpack_last(state["weight_packed"], quantization.bits) - half
        state["weight_packed"] = pack_to_int32(values.to(torch.int8), quantization.bits)
        if not quantization.sym:
            rows = len(values)
            words = torch.nn.functional.pad(state["weight_zero_point"].T, (0, quantization.bits))
            whole = words[:, : words.shape[1] // quantization.bits * quantization.bits].contiguous()
            zeros = (unpack_last(whole, quantization.bits)[:, :rows].T - half).to(torch.int8)
            state["weight_zero_point"] = pack_to_int32(zeros, quantization.bits, packed_dim=0)
    weight: torch.Tensor = PackedQuantizationCompressor.decompress(state, _scheme(quantization))["weight"]
    return weight


def _write_like(
    source: Path, target: Path, tensors: Mapping[str, torch.Tensor], config: CheckpointConfig | None
) -> None:
    """Write `tensors` beside copies of everything else in `source`, with `config` as quantization_config."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_dir():
            shutil.copytree(file, target / file.name)
        elif file.name not in (WEIGHTS_FILE, "config.json"):
            shutil.copy(file, target / file.name)
    raw_config = json.loads((source / "config.json").read_text())
    raw_config.pop("quantization_config", None)
    if config is not None:
        raw_config["quantization_config"] = config.write()
    (target / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")
    save_file(dict(tensors), target / WEIGHTS_FILE, metadata={"format": "pt"})
