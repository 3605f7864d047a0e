"""Names and shapes of a compressed checkpoint on disk, for every reader and writer.

A compressed checkpoint is an ordinary Hugging Face directory. Its `config.json` carries

    "quantization_config": {
      "quant_method": "ercsvd", "format_version": 1, "written_by": "ercsvd-deploy 0.1.0",
      "modules": {
        "model.layers.6.mlp.up_proj": {"layout": "low_rank", "shape": [768, 256], "rank": 96},
        "model.layers.0.mlp.up_proj": {"layout": "dense", "shape": [768, 256],
                                       "weight": {"bits": 4, "group_size": 64, "sym": true}},
        "model.layers.7.mlp.up_proj": {"layout": "pivoted", "shape": [768, 256], "rank": 128,
                                       "pivot_blocks": 8},
        "model.layers.8.mlp.up_proj": {"layout": "corrected", "shape": [768, 256], "rank": 32,
                                       "weight": {"bits": 3, "group_size": 64, "sym": true}}
      }
    }

and names every Linear whose tensors differ from the original model's, and the input embedding if it does: a
matrix [tokens, hidden] of the layout dense, symmetric. Where config.json ties the output layer to it
(`tie_word_embeddings`), that has no tensors: it multiplies the embedding's. All other tensors are stored as
the original model stores them. For a module `m` the tensors are

    layout     tensors (factor_a is [rank, in], factor_b is [out, rank]: y = B (A x))
    low_rank   m.factor_a.<leaf>, m.factor_b.<leaf>, m.weight (the guard, empty), m.bias unchanged
    dense      m.<leaf>, m.weight (the guard, empty), m.bias unchanged
    pivoted    m.pivot_rows.<leaf> [rank, in], m.other_rows.<leaf> [out - rank, rank], m.row_order,
               m.weight (the guard, empty), m.bias unchanged: h = pivot_rows x, o = other_rows h, and
               output i is element row_order[i] (int32 [out]) of cat(h, o). See `linalg.pivoting`.
    corrected  m.<leaf> of integers, m.factor_a.<leaf>, m.factor_b.<leaf>, m.weight (the guard, empty),
               m.bias unchanged: y = Q x + B (A x). See `quantization.correction`.

where `<leaf>` is `weight` for a plain matrix, and for one of integers `weight_packed`, `weight_scale`,
`weight_shape` and, asymmetric, `weight_zero_point`: compressed-tensors' `pack-quantized` names, and at 2, 4
and 8 bits its tensors (`format.integer_words` says how words are filled).

The guard `m.weight` has shape [0]. A loader that does not know this format would otherwise find no
`m.weight`, warn, and fill it with random numbers; with the guard it stops on a size mismatch.

No torch here: vLLM's front end and editors' tools read this module too.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ercsvd_deploy import __version__
from ercsvd_deploy.format.storage import (
    FACTOR_A,
    FACTOR_B,
    FACTOR_PARTS,
    GUARD,
    GUARD_SHAPE,
    OTHER_ROWS,
    PIVOT_ROWS,
    ROW_ORDER,
    WEIGHT,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    WORD_BITS,
    Bits,
    CheckpointFormatError,
    Layout,
    LowRankLayout,
    Storage,
    WeightQuantization,
    values_in_whole_words,
)

__all__ = [
    "FACTOR_A",
    "FACTOR_B",
    "FACTOR_PARTS",
    "FORMAT_VERSION",
    "GUARD",
    "GUARD_SHAPE",
    "OTHER_ROWS",
    "PIVOT_ROWS",
    "QUANT_METHOD",
    "ROW_ORDER",
    "WEIGHT",
    "WEIGHT_PACKED",
    "WEIGHT_SCALE",
    "WEIGHT_SHAPE",
    "WEIGHT_ZERO_POINT",
    "WORD_BITS",
    "Bits",
    "CheckpointConfig",
    "CheckpointFormatError",
    "Layout",
    "LowRankLayout",
    "Storage",
    "WeightQuantization",
    "values_in_whole_words",
]

QUANT_METHOD: Literal["ercsvd"] = "ercsvd"
FORMAT_VERSION = 1


class CheckpointConfig(BaseModel):
    """The `quantization_config` of a compressed checkpoint's config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["ercsvd"] = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    # not "producer": vLLM takes that key for ModelOpt's, an object, and fails on a string
    written_by: str = f"ercsvd-deploy {__version__}"
    modules: dict[str, Storage] = Field(
        description="Checkpoint tensor-name prefix of every altered Linear or embedding -> how it is stored."
    )
    require_kernels: bool = Field(
        default=False,
        description="Refuse integer matrices that no kernel multiplies; else they become plain ones.",
    )

    @classmethod
    def read(cls, quantization_config: Any) -> CheckpointConfig:
        """Parse the `quantization_config` of a config.json.

        Raises:
            CheckpointFormatError: another method, another format version, or an invalid description.
        """
        if not isinstance(quantization_config, dict):
            raise CheckpointFormatError(
                f"quantization_config is a {type(quantization_config).__name__}, not an object"
            )
        method = quantization_config.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointFormatError(f"quant_method is {method!r}, not {QUANT_METHOD!r}")
        version = quantization_config.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointFormatError(
                f"checkpoint format_version is {version!r}, "
                f"ercsvd-deploy {__version__} reads {FORMAT_VERSION}: install "
                f"the release that wrote it ({quantization_config.get('written_by', 'unknown')}) "
                "or compress the model again"
            )
        try:
            return cls.model_validate(quantization_config)
        except ValidationError as error:
            first_error = error.errors()[0]
            where = ".".join(str(part) for part in first_error["loc"])
            raise CheckpointFormatError(f"quantization_config.{where}: {first_error['msg']}") from error

    def write(self) -> dict[str, Any]:
        """Return the JSON object of the description; the inverse of `read`."""
        values = self.model_dump(mode="json", exclude_none=True)
        if not self.require_kernels:  # a default is not written: earlier releases do not know the key
            del values["require_kernels"]
        return values
