"""Codecs: what a float tensor looks like on a wire that is too slow for it as it lies in memory.

codec       bytes per value   error of a value x at most
raw         as in memory      0
bf16        2                 |x| / 255
int8        1 + 4 / 2048      m / 253      m: the largest |value| of x's block of 2048
int8_mixed  1 + 4 / 2048, 2   m / 253      m: without outlier columns, whose values are in bf16
int4        1/2 + 2 / 32      m / 13.9     m: of x's block of 32; the last is filled up

plus 2^-110 (blocks smaller than that are sent as zeros) and, for float16 and bfloat16 tensors, the rounding of the
result, which has the tensor's dtype.  `Codec.bound` is this table as a function.  A tensor goes raw, so exactly, when
encoding wouldn't make it smaller and when a value isn't finite (or is beyond float32's range): a NaN stays where it is,
for whoever looks for it, and masks keep their -inf.  Integers and booleans are always raw.

int8: blockwise, a scale for each block (Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv
2110.02861, whose block size it is; SWARM, arXiv 2301.11913, sends activations and gradients so), with evenly spaced
levels.  int8_mixed: LLM.int8(), arXiv 2208.07339.  int4: blocks of 32, as in GGML's Q4_0; what a message lost is
added to the next of its name (link_codec.py).  The kernels are numba's: one core, and without Python's lock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import torch

from nesa_ray.planning.compiled import compiled

TINY = 2.0**-110
Payload: TypeAlias = np.ndarray  # uint8, flat
_Floats: TypeAlias = np.ndarray  # float32, flat
_Bounds: TypeAlias = np.ndarray  # float64, flat
_INFINITE = 0x7F800000  # the bits of float32's infinity: those of what is finite are less, without the sign
_LARGE_HALF = 65280.0  # a float16 beyond it is rounded to one that float16 doesn't have, in bfloat16
_ROUNDS_TO_INFINITE = 0x7F7F8000  # to bfloat16
_HALF = 16  # of int4's block; a constant, so that LLVM knows how long the loops over it are


class Codec(ABC):
    """One way of encoding; stateless.  `feedback`: made for gradients whose losses are carried on (link_codec.py)."""

    name: str
    feedback = False

    @abstractmethod
    def n_bytes(self, values: int) -> int:
        """Bytes of the payload of so many values (without outliers)."""

    @abstractmethod
    def _encode(self, x: _Floats, columns: int) -> Payload | None: ...

    @abstractmethod
    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None: ...

    @abstractmethod
    def _bound(self, x: _Floats, columns: int) -> _Bounds: ...

    def encode(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Payload | None:
        """The payload, one buffer, of a tensor of any shape, layout and device; None: it goes raw.

        dtype  that the receiver decodes to and that raw would be sent in, where that isn't the tensor's own
        """
        dtype = dtype or tensor.dtype
        values, raw_bytes = tensor.numel(), tensor.numel() * dtype.itemsize
        if not dtype.is_floating_point or self.n_bytes(values) >= raw_bytes:
            return None
        if dtype is torch.float16 and bool((tensor.abs() > _LARGE_HALF).any()):
            return None
        payload = self._encode(_floats(tensor), _columns(tensor))
        return None if payload is None or payload.nbytes >= raw_bytes else payload

    def decode(self, payload: Payload, tensor: torch.Tensor) -> None:
        """Writes the values into `tensor`, contiguous, on the CPU, of the shape and dtype that were encoded.

        Raises ValueError when the payload has another size than theirs.
        """
        out: torch.Tensor = tensor if tensor.dtype is torch.float32 else torch.empty(tensor.shape)
        self._decode(payload, out.reshape(-1).numpy(), _columns(tensor))
        if out is not tensor:
            tensor.copy_(out)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest error of each value after encoding and decoding, float64 of the tensor's shape."""
        if self.encode(tensor) is None:
            return torch.zeros(tensor.shape, dtype=torch.float64)
        x = _floats(tensor)
        bound = torch.from_numpy(self._bound(x, _columns(tensor))) + TINY
        if tensor.element_size() == 2:
            kind = torch.finfo(tensor.dtype)
            largest = torch.from_numpy(np.abs(x)).double() + bound
            bound += kind.eps / 2 * (largest + kind.smallest_normal)
        return bound.reshape(tensor.shape)


class Bf16(Codec):
    """Rounded to the nearest bfloat16."""

    name = "bf16"

    def n_bytes(self, values: int) -> int:
        """See Codec."""
        return 2 * values

    def _encode(self, x: _Floats, columns: int) -> Payload | None:
        return _bf16(x)

    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None:
        _expect(payload, self.n_bytes(len(out)))
        _from_bf16(payload.view(np.uint16), out.view(np.uint32))

    def _bound(self, x: _Floats, columns: int) -> _Bounds:
        return np.abs(x).astype(np.float64) / 255


class Int8(Codec):
    """Scales (float32, a block's largest magnitude / 127), then a signed byte for each value."""

    name = "int8"
    block = 2048

    def n_bytes(self, values: int) -> int:
        """See Codec."""
        return 4 * _blocks(values, self.block) + values

    def _encode(self, x: _Floats, columns: int) -> Payload | None:
        absmax = _absmax(x, self.block)
        if absmax is None:
            return None
        payload: np.ndarray = np.empty(self.n_bytes(len(x)), np.uint8)
        scales, values = np.split(payload, [4 * len(absmax)])
        _to_int8(x, absmax, scales, values)
        return payload

    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None:
        _expect(payload, self.n_bytes(len(out)))
        scales, values = np.split(payload, [4 * _blocks(len(out), self.block)])
        _from_int8(values.view(np.int8), scales.view(np.float32), self.block, out)

    def _bound(self, x: _Floats, columns: int) -> _Bounds:
        return _spread(_absmax(x, self.block), self.block, len(x)) / 253


class Int8Mixed(Codec):
    """Outlier columns (features: places in the last dimension) in bfloat16, the rest as int8 does it.

    LLM.int8() takes features beyond 6.0, about six standard deviations of a layer's input.  Here a column is an outlier
    when its largest magnitude is more than twice that of the median column, which for normal values is about the same
    and doesn't depend on the scale.  Payload: how many (int32), which (int32), scales, outliers, bytes.
    """

    name = "int8_mixed"
    block = Int8.block

    def n_bytes(self, values: int) -> int:
        """See Codec."""
        return 4 + 4 * _blocks(values, self.block) + values

    def _encode(self, x: _Floats, columns: int) -> Payload | None:
        outliers = _outlier_columns(x, columns)
        rest, kept = _without(x, columns, outliers)
        absmax, exact = _absmax(rest, self.block), _bf16(kept)
        if absmax is None or exact is None:
            return None
        payload: np.ndarray = np.empty(self.n_bytes(len(x)) + outliers.nbytes + exact.nbytes, np.uint8)
        head, scales, middle, values = self._parts(payload, len(x), columns, len(outliers))
        head.view(np.int32)[:] = [len(outliers), *outliers]
        middle[:] = exact
        _to_int8(rest, absmax, scales, values)
        return payload

    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None:
        count = int(payload[:4].view(np.int32)[0])
        _expect(payload, self.n_bytes(len(out)) + count * (4 + 2 * (len(out) // columns)))
        head, scales, middle, values = self._parts(payload, len(out), columns, count)
        _from_int8(values.view(np.int8), scales.view(np.float32), self.block, out)
        if count:
            kept: np.ndarray = np.empty(len(middle) // 2, np.float32)
            _from_bf16(middle.view(np.uint16), kept.view(np.uint32))
            out.reshape(-1, columns)[:, head.view(np.int32)[1:]] = kept.reshape(-1, count)

    def _parts(self, payload: Payload, values: int, columns: int, outliers: int) -> list[Payload]:
        sizes = [4 + 4 * outliers, 4 * _blocks(values, self.block), 2 * outliers * (values // columns)]
        return np.split(payload, np.cumsum(sizes))

    def _bound(self, x: _Floats, columns: int) -> _Bounds:
        outliers = _outlier_columns(x, columns)
        rest, kept = _without(x, columns, outliers)
        bound = _spread(_absmax(rest, self.block), self.block, len(x)) / 253
        bound.reshape(-1, columns)[:, outliers] = np.abs(kept).reshape(len(x) // columns, len(outliers)) / 255
        return bound


class Int4(Codec):
    """Scales (bfloat16, a block's largest magnitude / 7), then 16 bytes a block: a value of each of its halves in each.

    The last block is filled up with zeros.
    """

    name = "int4"
    feedback = True
    block = 2 * _HALF

    def n_bytes(self, values: int) -> int:
        """See Codec."""
        return (2 + _HALF) * _blocks(values, self.block)

    def _encode(self, x: _Floats, columns: int) -> Payload | None:
        absmax = _absmax(x, self.block)
        if absmax is None:
            return None
        payload: np.ndarray = np.empty(self.n_bytes(len(x)), np.uint8)
        scales, values = np.split(payload, [2 * len(absmax)])
        bits = np.where(absmax < TINY, 0, absmax / np.float32(7)).astype(np.float32).view(np.uint32)
        # Towards zero: no decoded magnitude is beyond the block's, which itself is less than 7.06 steps.
        scales.view(np.uint16)[:] = bits >> 16
        steps, whole = _widened(scales), len(x) // self.block
        _to_int4(x, steps[:whole], values)
        if whole < len(steps):
            _to_int4(_filled(x[whole * self.block :], self.block), steps[whole:], values[whole * _HALF :])
        return payload

    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None:
        _expect(payload, self.n_bytes(len(out)))
        scales, values = np.split(payload, [2 * _blocks(len(out), self.block)])
        steps, whole = _widened(scales), len(out) // self.block
        _from_int4(values, steps[:whole], out)
        if whole < len(steps):
            last = _filled(out[:0], self.block)
            _from_int4(values[whole * _HALF :], steps[whole:], last)
            out[whole * self.block :] = last[: len(out) - whole * self.block]

    def _bound(self, x: _Floats, columns: int) -> _Bounds:
        return _spread(_absmax(x, self.block), self.block, len(x)) / 13.9


# By name, in the order of message.CODEC_NAMES.
CODECS: dict[str, Codec] = {c.name: c for c in (Bf16(), Int8(), Int8Mixed(), Int4())}


def _floats(tensor: torch.Tensor) -> _Floats:
    """Flat, contiguous, on the CPU; of a float32 tensor that is so already, its own memory."""
    flat: _Floats = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy()
    return flat


def _columns(tensor: torch.Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() else 1


def _blocks(values: int, block: int) -> int:
    return -(-values // block)


def _expect(payload: Payload, n_bytes: int) -> None:
    if payload.nbytes != n_bytes:
        raise ValueError(f"the payload has {payload.nbytes} bytes, needs {n_bytes}")


def _filled(x: _Floats, values: int) -> _Floats:
    """With zeros behind it."""
    filled: np.ndarray = np.zeros(values, np.float32)
    filled[: len(x)] = x
    return filled


def _absmax(x: _Floats, block: int) -> _Floats | None:
    """The largest magnitude of each block; None when not all are finite."""
    bits: np.ndarray = np.empty(_blocks(len(x), block), np.int32)
    _absmax_bits(x.view(np.int32), block, bits)
    return None if bits.max() >= _INFINITE else bits.view(np.float32)


def _spread(absmax: _Floats | None, block: int, values: int) -> _Bounds:
    assert absmax is not None
    return np.repeat(absmax.astype(np.float64), block)[:values]


def _bf16(x: _Floats) -> Payload | None:
    most: np.ndarray = np.zeros(1, np.int32)
    _absmax_bits(x.view(np.int32), max(1, len(x)), most)
    if most[0] >= _ROUNDS_TO_INFINITE:
        return None
    out: np.ndarray = np.empty(len(x), np.uint16)
    _to_bf16(x.view(np.uint32), out)
    return out.view(np.uint8)


def _widened(scales: Payload) -> _Floats:
    """bfloat16 as float32."""
    return (scales.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_int8(x: _Floats, absmax: _Floats, scales: Payload, values: Payload) -> None:
    scale: np.ndarray = scales.view(np.float32)
    np.divide(absmax, np.float32(127), out=scale)
    with np.errstate(over="ignore"):  # rounded up it would decode to more than the block has, perhaps to infinity
        np.copyto(scale, np.nextafter(scale, np.float32(0)), where=scale * np.float32(127) > absmax)
    scale[absmax < TINY] = 0
    _quantize_int8(x, scale, Int8.block, values.view(np.int8))


def _outlier_columns(x: _Floats, columns: int) -> np.ndarray:
    bits: np.ndarray = np.zeros(columns, np.int32)
    _column_absmax_bits(x.view(np.int32).reshape(-1, columns), bits)
    most: np.ndarray = bits.view(np.float32)
    if bits.max() >= _INFINITE:
        return np.empty(0, np.int32)
    median = np.partition(most, columns // 2)[columns // 2]
    return np.flatnonzero(most.astype(np.float64) > 2.0 * float(median)).astype(np.int32)


def _without(x: _Floats, columns: int, outliers: np.ndarray) -> tuple[_Floats, _Floats]:
    """The values with zeros in the outliers' columns, and the outliers, row by row."""
    if not len(outliers):
        return x, x[:0]
    rest = x.copy()
    rest.reshape(-1, columns)[:, outliers] = 0
    return rest, x.reshape(-1, columns)[:, outliers].reshape(-1)


# The loops run over slices from zero, as LLVM vectorizes them, and compare magnitudes as integers, which it reorders.


@compiled
def _absmax_bits(bits: Any, block: int, out: Any) -> None:
    for b in range(len(out)):
        part = bits[b * block : (b + 1) * block]
        most = np.int32(0)
        for i in range(len(part)):
            magnitude = part[i] & np.int32(0x7FFFFFFF)
            most = magnitude if magnitude > most else most
        out[b] = most


@compiled
def _column_absmax_bits(bits: Any, out: Any) -> None:
    for r in range(len(bits)):
        row = bits[r]
        for i in range(len(out)):
            magnitude = row[i] & np.int32(0x7FFFFFFF)
            out[i] = magnitude if magnitude > out[i] else out[i]


@compiled
def _to_bf16(bits: Any, out: Any) -> None:
    for i in range(len(bits)):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled
def _from_bf16(halves: Any, out: Any) -> None:
    for i in range(len(halves)):
        out[i] = np.uint32(halves[i]) << np.uint32(16)


@compiled
def _quantize_int8(x: Any, scale: Any, block: int, out: Any) -> None:
    for b in range(len(scale)):
        inverse = np.float32(1) / scale[b] if scale[b] > 0 else np.float32(0)
        part, to = x[b * block : (b + 1) * block], out[b * block : (b + 1) * block]
        for i in range(len(part)):
            to[i] = np.int8(np.int32(np.rint(part[i] * inverse)))


@compiled
def _from_int8(values: Any, scale: Any, block: int, out: Any) -> None:
    for b in range(len(scale)):
        part, to, step = values[b * block : (b + 1) * block], out[b * block : (b + 1) * block], scale[b]
        for i in range(len(part)):
            to[i] = np.float32(part[i]) * step


@compiled
def _to_int4(x: Any, scale: Any, out: Any) -> None:
    for b in range(len(scale)):
        inverse = np.float32(1) / scale[b] if scale[b] > 0 else np.float32(0)
        part, to = x[2 * b * _HALF : 2 * (b + 1) * _HALF], out[b * _HALF : (b + 1) * _HALF]
        for i in range(_HALF):
            low, high = np.int32(np.rint(part[i] * inverse)), np.int32(np.rint(part[i + _HALF] * inverse))
            to[i] = np.uint8((low + np.int32(8)) | ((high + np.int32(8)) << np.int32(4)))


@compiled
def _from_int4(values: Any, scale: Any, out: Any) -> None:
    for b in range(len(scale)):
        part, to, step = values[b * _HALF : (b + 1) * _HALF], out[2 * b * _HALF : 2 * (b + 1) * _HALF], scale[b]
        for i in range(_HALF):
            to[i] = np.float32(np.int32(part[i] & np.uint8(15)) - np.int32(8)) * step
            to[i + _HALF] = np.float32(np.int32(part[i] >> np.uint8(4)) - np.int32(8)) * step
