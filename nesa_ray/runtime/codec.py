"""Codecs: what a float tensor looks like on a wire that is too slow for it as it lies in memory.

codec       bytes per value   error of a value x at most
raw         as in memory      0
bf16        2                 |x| / 255
int8        1 + 4 / 2048      m / 253      m: the largest |value| of x's block of 2048
int8_mixed  1 + 4 / 2048, 2   m / 253      m: without outlier columns, whose values are in bf16
int4        0.47 at most      a / 4.5      a: the mean |value| of x's block of 2048; m / 253 where that is more
planes      some 1 or 2       0            integers and booleans, which the others send raw

plus 2^-110 (blocks smaller than that are sent as zeros) and, for float16 and bfloat16 tensors, the rounding of the
result, which has the tensor's dtype.  `Codec.bound` is this table as a function.  A tensor goes raw, so exactly, when
encoding wouldn't make it smaller and when a value isn't finite (or is beyond float32's range): a NaN stays where it is,
for whoever looks for it, and masks keep their -inf.

int8: blockwise, a scale for each block (Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv
2110.02861, whose block size it is; SWARM, arXiv 2301.11913, sends activations and gradients so), with evenly spaced
levels.  int8_mixed: LLM.int8(), arXiv 2208.07339.  int4: even steps and an entropy code, which is within a quarter of a
bit of what any code of that error needs (Gish and Pierce, Asymptotically efficient quantizing, IEEE Transactions on
Information Theory, 1968), here zstd's Huffman code; what a message lost is added to the next of its name
(link_codec.py).  The kernels are numba's: one core, and without Python's lock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch

from nesa_ray.planning.compiled import compiled
from nesa_ray.runtime.message import PLANES, raw_payload

TINY = 2.0**-110
Payload: TypeAlias = np.ndarray  # uint8, flat
_Floats: TypeAlias = np.ndarray  # float32, flat
_Bounds: TypeAlias = np.ndarray  # float64, flat
_INFINITE = 0x7F800000  # the bits of float32's infinity: those of what is finite are less, without the sign
_LARGE_HALF = 65280.0  # a float16 beyond it is rounded to one that float16 doesn't have, in bfloat16
_ROUNDS_TO_INFINITE = 0x7F7F8000  # to bfloat16
_STEP = 0.44  # of int4: at most so much of the mean magnitude
_ZSTD = pa.Codec("zstd", compression_level=1)  # higher levels look for repetitions longer, and code noise worse


class Codec(ABC):
    """One way of encoding; stateless.  `feedback`: made for gradients whose losses are carried on (link_codec.py)."""

    name: str
    feedback = False

    @abstractmethod
    def encode(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Payload | None:
        """The payload, one buffer, of a tensor of any shape, layout and device; None: it goes raw.

        dtype  that the receiver decodes to and that raw would be sent in, where that isn't the tensor's own
        """

    @abstractmethod
    def decode(self, payload: Payload, tensor: torch.Tensor) -> None:
        """Writes the values into `tensor`, contiguous, on the CPU, of the shape and dtype that were encoded.

        Raises ValueError when the payload isn't one of that.
        """

    @abstractmethod
    def bound(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest error of each value after encoding and decoding, float64 of the tensor's shape."""


class FloatCodec(Codec):
    """Of floats, as float32."""

    @abstractmethod
    def n_bytes(self, values: int) -> int:
        """Bytes of the payload of so many values (without outliers), at most."""

    @abstractmethod
    def _encode(self, x: _Floats, columns: int) -> Payload | None: ...

    @abstractmethod
    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None: ...

    @abstractmethod
    def _bound(self, x: _Floats, columns: int) -> _Bounds: ...

    def encode(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Payload | None:
        """See Codec."""
        dtype = dtype or tensor.dtype
        values, raw_bytes = tensor.numel(), tensor.numel() * dtype.itemsize
        if not dtype.is_floating_point or self.n_bytes(values) >= raw_bytes:
            return None
        if dtype is torch.float16 and bool((tensor.abs() > _LARGE_HALF).any()):
            return None
        payload = self._encode(_floats(tensor), _columns(tensor))
        return None if payload is None or payload.nbytes >= raw_bytes else payload

    def decode(self, payload: Payload, tensor: torch.Tensor) -> None:
        """See Codec."""
        out: torch.Tensor = tensor if tensor.dtype is torch.float32 else torch.empty(tensor.shape)
        self._decode(payload, out.reshape(-1).numpy(), _columns(tensor))
        if out is not tensor:
            tensor.copy_(out)

    def bound(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Codec."""
        if self.encode(tensor) is None:
            return torch.zeros(tensor.shape, dtype=torch.float64)
        x = _floats(tensor)
        bound = torch.from_numpy(self._bound(x, _columns(tensor))) + TINY
        if tensor.element_size() == 2:
            kind = torch.finfo(tensor.dtype)
            largest = torch.from_numpy(np.abs(x)).double() + bound
            bound += kind.eps / 2 * (largest + kind.smallest_normal)
        return bound.reshape(tensor.shape)


class Bf16(FloatCodec):
    """Rounded to the nearest bfloat16."""

    name = "bf16"

    def n_bytes(self, values: int) -> int:
        """See FloatCodec."""
        return 2 * values

    def _encode(self, x: _Floats, columns: int) -> Payload | None:
        return _bf16(x)

    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None:
        _expect(payload, self.n_bytes(len(out)))
        _from_bf16(payload.view(np.uint16), out.view(np.uint32))

    def _bound(self, x: _Floats, columns: int) -> _Bounds:
        return np.abs(x).astype(np.float64) / 255


class Int8(FloatCodec):
    """Scales (float32, a block's largest magnitude / its levels, 127), then a signed byte for each value."""

    name = "int8"
    block = 2048

    def n_bytes(self, values: int) -> int:
        """See FloatCodec."""
        return 4 * _blocks(values, self.block) + values

    def _levels(self, x: _Floats, absmax: _Floats) -> _Floats | np.float32:
        """How many steps each block's largest magnitude has."""
        return np.float32(127)

    def _encode(self, x: _Floats, columns: int) -> Payload | None:
        absmax = _absmax(x, self.block)
        if absmax is None:
            return None
        payload: np.ndarray = np.empty(self.n_bytes(len(x)), np.uint8)
        scales, values = np.split(payload, [4 * len(absmax)])
        _quantize(x, absmax, self._levels(x, absmax), scales, values)
        return payload

    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None:
        _expect(payload, self.n_bytes(len(out)))
        scales, values = np.split(payload, [4 * _blocks(len(out), self.block)])
        _from_int8(values.view(np.int8), scales.view(np.float32), self.block, out)

    def _bound(self, x: _Floats, columns: int) -> _Bounds:
        absmax = _absmax(x, self.block)
        assert absmax is not None
        return _spread(absmax / (1.993 * self._levels(x, absmax)), self.block, len(x))


class Int8Mixed(FloatCodec):
    """Outlier columns (features: places in the last dimension) in bfloat16, the rest as int8 does it.

    LLM.int8() takes features beyond 6.0, about six standard deviations of a layer's input.  Here a column is an outlier
    when its largest magnitude is more than twice that of the median column, which for normal values is about the same
    and doesn't depend on the scale.  Payload: how many (int32), which (int32), scales, outliers, bytes.
    """

    name = "int8_mixed"
    block = Int8.block

    def n_bytes(self, values: int) -> int:
        """See FloatCodec."""
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
        _quantize(rest, absmax, np.float32(127), scales, values)
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


class Int4(Int8):
    """As Int8 with fewer levels, and entropy-coded: some 4 bits a value.

    A step is the block's largest magnitude over a whole number, at most 127, such that it is at most 0.44 of the mean
    magnitude.  Of all distributions of that mean the Laplace distribution has the largest entropy, log2(2e / 0.44) =
    3.63 bits, so the payload is about as small whatever the values are, and outliers, which change the mean little,
    cost the others nothing until the 127 is reached.
    """

    name = "int4"
    feedback = True

    def _levels(self, x: _Floats, absmax: _Floats) -> _Floats:
        sums: np.ndarray = np.empty(len(absmax), np.float64)
        _sums(x, self.block, sums)
        values: np.ndarray = np.full(len(absmax), self.block)
        values[-1:] = len(x) - self.block * (len(absmax) - 1)
        with np.errstate(divide="ignore", invalid="ignore"):  # of zeros
            return np.clip(np.nan_to_num(np.ceil(absmax * values / (_STEP * sums))), 1, 127).astype(np.float32)

    def _encode(self, x: _Floats, columns: int) -> Payload | None:
        plain = super()._encode(x, columns)
        if plain is None:
            return None
        scales, values = np.split(plain, [plain.nbytes - len(x)])
        return np.concatenate([scales, _pressed(values)])  # apart: each other byte would lengthen the values' codes

    def _decode(self, payload: Payload, out: _Floats, columns: int) -> None:
        scales, pressed = np.split(payload, [self.n_bytes(len(out)) - len(out)])
        super()._decode(np.concatenate([scales, _unpressed(pressed, len(out))]), out, columns)


class Planes(Codec):
    """Integers and booleans exactly: all first bytes, all second bytes, …, entropy-coded; most are zeros."""

    name = PLANES

    def encode(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Payload | None:
        """See Codec."""
        if tensor.is_floating_point() or tensor.is_complex() or not tensor.numel():
            return None
        flat = np.frombuffer(raw_payload(tensor), np.uint8)
        payload = _pressed(np.ascontiguousarray(flat.reshape(-1, tensor.element_size()).T))
        return payload if payload.nbytes < flat.nbytes else None

    def decode(self, payload: Payload, tensor: torch.Tensor) -> None:
        """See Codec."""
        planes = _unpressed(payload, tensor.nbytes).reshape(tensor.element_size(), -1)
        tensor.reshape(-1).view(torch.uint8).numpy().reshape(-1, tensor.element_size())[:] = planes.T

    def bound(self, tensor: torch.Tensor) -> torch.Tensor:
        """See Codec."""
        return torch.zeros(tensor.shape, dtype=torch.float64)


# By name, in the order of message.CODEC_NAMES.
FLOAT_CODECS: dict[str, FloatCodec] = {c.name: c for c in (Bf16(), Int8(), Int8Mixed(), Int4())}
CODECS: dict[str, Codec] = {**FLOAT_CODECS, Planes.name: Planes()}


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


def _quantize(x: _Floats, absmax: _Floats, levels: _Floats | np.float32, scales: Payload, values: Payload) -> None:
    """In steps of a block's largest magnitude over its levels."""
    scale: np.ndarray = scales.view(np.float32)
    np.divide(absmax, levels, out=scale)
    with np.errstate(over="ignore"):  # rounded up it would decode to more than the block has, perhaps to infinity
        np.copyto(scale, np.nextafter(scale, np.float32(0)), where=scale * levels > absmax)
    scale[absmax < TINY] = 0
    _quantize_int8(x, scale, Int8.block, values.view(np.int8))


def _pressed(plain: Payload) -> Payload:
    return np.frombuffer(_ZSTD.compress(plain), np.uint8)


def _unpressed(payload: Payload, n_bytes: int) -> Payload:
    try:
        plain = np.frombuffer(_ZSTD.decompress(payload, n_bytes), np.uint8)
    except OSError as e:
        raise ValueError(f"the payload has {payload.nbytes} bytes, which aren't {n_bytes} entropy-coded: {e}") from None
    _expect(plain, n_bytes)
    return plain


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
def _sums(x: Any, block: int, out: Any) -> None:
    for b in range(len(out)):
        part = x[b * block : (b + 1) * block]
        total = 0.0
        for i in range(len(part)):
            total += abs(np.float64(part[i]))
        out[b] = total
