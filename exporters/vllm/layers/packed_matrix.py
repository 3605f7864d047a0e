"""One integer matrix of a linear layer for vLLM's kernels.

It has the interface of a plain one (`plain_matrix`): `finalize` passes the loaded integers to the kernel that
vLLM chooses, or returns a plain matrix of the same numbers if there is no kernel.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ercsvd_deploy.exporters.vllm.compatibility import (
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    choose_mp_linear_kernel,
    kernel_config,
    padded_shape,
)
from ercsvd_deploy.exporters.vllm.kernels.padding import is_smaller_plain
from ercsvd_deploy.exporters.vllm.layers.plain_matrix import PlainMatrix, copy_rows, refuse_stock_loading
from ercsvd_deploy.format.integer_words import dequantize, pack_rows, unpack_rows
from ercsvd_deploy.format.schema import (
    WEIGHT,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_ZERO_POINT,
    WORD_BITS,
    WeightQuantization,
    values_in_whole_words,
)

if TYPE_CHECKING:
    from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord

_TRIAL_OUTPUTS = 256  # outputs of a kernel that its trial compares with those of the dequantized matrix
_TOLERANCE = 0.05  # relative to their norm: kernels that round activations to 8 bits are off by about 0.01
_ROUNDING = 1e-3
_ROWS_AT_ONCE = 4096  # rows dequantized at once, to 32 bits a value


class PackedMatrix(nn.Module):
    """An integer matrix [rows, columns], multiplied by the mixed-precision kernel that vLLM chooses.

    Where vLLM has no kernel for it, or one that does not work in this build, `finalize` returns a
    `PlainMatrix` of the same numbers instead, unless kernels are required. It does so in any case
    where the kernel's padding takes as much memory as plain values.

    Args:
        name: name of the matrix in the checkpoint, for error messages.
        shape: [rows, columns] on this rank; rows that are never loaded stay zero.
        full_shape: [rows, columns] over all tensor-parallel ranks.
        quantization: how the checkpoint stores it.
        dtype: dtype of the activations and the scales.
        record: the record of the model's kernels.

    Raises:
        ValueError: this rank's columns are not whole groups, or a kernel is required and there is none; the
            message gives vLLM's reasons.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        full_shape: tuple[int, int],
        quantization: WeightQuantization,
        dtype: torch.dtype,
        record: KernelRecord,
    ) -> None:
        super().__init__()
        rows, columns = shape
        self._name, self._shape, self._full_shape = name, shape, full_shape
        self._quantization, self._dtype, self._record = quantization, dtype, record
        per_word = Fraction(WORD_BITS, quantization.bits)  # in the form of vLLM's own scheme
        self._per_word = per_word if per_word.denominator > 1 else int(per_word)
        problem = cut_group(columns, quantization)
        if problem:
            raise ValueError(self._describe(problem))
        self._reason, self._kernel = self._choose_kernel()
        self._is_smaller_plain = False
        if self._kernel is None:
            record.require(self._describe(self._reason))
        else:
            padded = padded_shape(type(self._kernel).__name__, shape, quantization.group_size)
            self._is_smaller_plain = is_smaller_plain(shape, padded, quantization)
        # attributes of a layer that kernels read, as vLLM's own WNA16 scheme sets them
        self.input_size = self.input_size_per_partition = columns
        self.output_size = self.output_size_per_partition = rows
        self.output_partition_sizes = self.logical_widths = [rows]
        self.params_dtype = self.orig_dtype = dtype
        self.has_bias = False
        self.register_parameter("bias", None)  # some kernels repack the layer's bias
        self.weight_packed = PackedvLLMParameter(
            data=torch.zeros(rows, columns * quantization.bits // WORD_BITS, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=self._per_word,
            weight_loader=refuse_stock_loading,
        )
        self.weight_scale = GroupQuantScaleParameter(
            data=torch.zeros(rows, quantization.num_groups(columns), dtype=dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=refuse_stock_loading,
        )
        # Stored zero points share a word along the rows, and stacked shards need not start at a whole word:
        # they are kept one to a word until `finalize`.
        self._zero_points = (
            None if quantization.sym else torch.zeros_like(self.weight_scale, dtype=torch.int32)
        )

    is_plain_tensor = False

    def load(self, leaf: str, tensor: torch.Tensor, rows: slice, columns: slice, first_row: int) -> None:
        """Copy [rows, columns] of the full matrix, stored as leaf `leaf`, to the rows from `first_row` on."""
        size = self._quantization.group_size
        groups = slice(None) if size == -1 else slice(columns.start // size, columns.stop // size)
        if leaf == WEIGHT_PACKED:
            bits = self._quantization.bits
            words = slice(columns.start * bits // WORD_BITS, columns.stop * bits // WORD_BITS)
            copy_rows(self.weight_packed, tensor[rows, words], first_row)
        elif leaf == WEIGHT_SCALE:
            copy_rows(self.weight_scale, tensor[rows, groups], first_row)
        elif leaf == WEIGHT_ZERO_POINT and self._zero_points is not None:
            unpacked = unpack_rows(tensor, self._quantization.bits, rows.stop)
            copy_rows(self._zero_points, unpacked[rows, groups], first_row)

    def finalize(self) -> Matrix:
        """Convert the loaded tensors into the kernel's layout; return the matrix to multiply from now on.

        Raises:
            KernelError: the kernel does not work in this build, and kernels are required.
        """
        if self.weight_packed.is_meta:  # vLLM builds layers that it will not run on the meta device
            return self
        if self._is_smaller_plain:
            return self._dequantized()
        if self._kernel is not None:
            kind = (type(self._kernel), self._shape, self._full_shape, self._quantization, self._dtype)
            if not self._record.was_tried(kind):
                loaded = self._copy_loaded()
                self._record.record_trial(kind, self._try_kernel(*loaded))
                if self._record.failure(kind) is not None:
                    self.weight_packed, self.weight_scale, self._zero_points = loaded
            elif self._record.failure(kind) is None:
                self._convert_for_kernel()
            self._reason = self._record.failure(kind)
        if self._reason is None:
            self._record.served_by_kernel()
            return self
        self._record.require(self._describe(self._reason))
        extra_bytes = self._dtype.itemsize * math.prod(self._shape)
        extra_bytes -= self.weight_packed.nbytes + self.weight_scale.nbytes
        self._record.served_plain(self._reason, str(self._dtype).removeprefix("torch."), extra_bytes)
        return self._dequantized()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] times the transposed matrix: [..., rows]."""
        assert self._kernel is not None
        product: torch.Tensor = self._kernel.apply_weights(self, x, None)
        return product

    def _choose_kernel(self) -> tuple[str | None, Any]:
        """Return (None, kernel), or (the reason why there is none, None)."""
        if self._dtype == torch.float32:  # not every kernel says so itself
            return (
                "integer kernels need 16-bit activations: start vLLM with --dtype float16 or bfloat16",
                None,
            )
        quantization = self._quantization
        try:
            config = kernel_config(
                self._shape,
                self._full_shape,
                bits=quantization.bits,
                group_size=quantization.group_size,
                sym=quantization.sym,
                act_dtype=self._dtype,
            )
            kernel = choose_mp_linear_kernel(config)(
                config,
                w_q_param_name=WEIGHT_PACKED,
                w_s_param_name=WEIGHT_SCALE,
                w_zp_param_name=WEIGHT_ZERO_POINT,
            )
        except Exception as error:  # noqa: BLE001 - kernels of other platforms and releases fail in their own ways
            return f"vLLM has no kernel for {_label(quantization)} here:\n{error}", None
        return None, kernel

    def _convert_for_kernel(self) -> None:
        if self._zero_points is not None:
            self.weight_zero_point = PackedvLLMParameter(
                data=pack_rows(self._zero_points, self._quantization.bits),
                input_dim=1,
                output_dim=0,
                packed_dim=0,
                packed_factor=self._per_word,
                weight_loader=refuse_stock_loading,
            )
            self._zero_points = None
        self._kernel.process_weights_after_loading(self)

    @torch.no_grad()
    def _try_kernel(
        self, words: torch.Tensor, scale: torch.Tensor, zero_points: torch.Tensor | None
    ) -> str | None:
        """Convert the tensors for the kernel and multiply one row; return why it failed, or None."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, self._shape[1], generator=generator).to(words.device, self._dtype)
        name = type(self._kernel).__name__
        try:
            self._convert_for_kernel()
            product = self._kernel.apply_weights(self, x, None)[..., :_TRIAL_OUTPUTS].float()
        except torch.OutOfMemoryError:
            raise  # a plain matrix takes even more
        except Exception as error:  # noqa: BLE001 - whatever another package's kernel raises
            return f"vLLM's {name} does not work here: {type(error).__name__}: {error}"
        rows = slice(0, _TRIAL_OUTPUTS)
        offsets = None if zero_points is None else zero_points[rows]
        matrix = dequantize(words[rows], scale[rows], offsets, self._quantization.bits, self._shape[1])
        expected = x.float() @ matrix.float().t()
        deviation, size = (product - expected).norm(), expected.norm()
        # damaged or absent tensors (load format dummy) have no finite product, and cannot be compared
        if size.isfinite() and not deviation <= _TOLERANCE * size + _ROUNDING:
            label = _label(self._quantization)
            return f"vLLM's {name} multiplies {label} wrongly here: off by {deviation / size:.1%}"
        return None

    def _copy_loaded(self) -> tuple[Any, Any, Any]:
        """Return copies of the loaded tensors; kernels change or delete the originals."""
        zero_points = None if self._zero_points is None else self._zero_points.clone()
        return _copy_parameter(self.weight_packed), _copy_parameter(self.weight_scale), zero_points

    def _dequantized(self) -> PlainMatrix:
        rows, columns = self._shape
        words, scale = self.weight_packed.data, self.weight_scale.data
        with words.device:
            plain = PlainMatrix(rows, columns, self._dtype)
        for start in range(0, rows, _ROWS_AT_ONCE):
            block = slice(start, start + _ROWS_AT_ONCE)
            offsets = None if self._zero_points is None else self._zero_points[block]
            matrix = dequantize(words[block], scale[block], offsets, self._quantization.bits, columns)
            plain.load(WEIGHT, matrix, slice(None), slice(None), start)
        plain.finalize()
        return plain

    def _describe(self, reason: str | None) -> str:
        return (
            f"{self._name}: cannot serve {list(self._shape)} (of {list(self._full_shape)} over all ranks) "
            f"with {_label(self._quantization)}: {reason}"
        )


Matrix = PlainMatrix | PackedMatrix


def cut_group(columns: int, quantization: WeightQuantization) -> str | None:
    """Return an error message if a rank's columns cut a scale group or a packed word, otherwise None."""
    multiple = values_in_whole_words(quantization.bits)
    size = quantization.group_size
    if (size != -1 and columns % size) or columns % multiple:
        return (
            f"{columns} columns on a rank are not whole groups of {size if size != -1 else multiple}: "
            "serve with a smaller tensor_parallel_size or quantize with a smaller group_size"
        )
    return None


def _label(quantization: WeightQuantization) -> str:
    groups = "one group a row" if quantization.group_size == -1 else f"groups of {quantization.group_size}"
    return f"int{quantization.bits} in {groups}" + ("" if quantization.sym else " with zero points")


def _copy_parameter(parameter: Any) -> Any:
    """Return a copy of one of vLLM's parameters, its dimensions' roles included."""
    copy = torch.Tensor._make_subclass(type(parameter), parameter.data.clone(), parameter.requires_grad)
    copy.__dict__.update(parameter.__dict__)
    return copy
