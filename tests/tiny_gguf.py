"""GGUF files written byte by byte, from the format's description, and its quantisations undone by plain loops.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the structs of ggml-common.h for the blocks.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Name -> (number in the file, values in a block, bytes of a block).
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
ALIGNMENT = 32


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Type and value of a metadata entry."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    items = [_value(item) for item in value]
    return (
        struct.pack("<I", 9)
        + items[0][:4]
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], str, bytes]], version: int = 3
) -> bytes:
    """A whole file. tensors: name -> (shape, outermost first; type; bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    out += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        out += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", TYPES[kind][0], len(data))
        data += raw + bytes(-len(raw) % ALIGNMENT)
    return out + bytes(-len(out) % ALIGNMENT) + data


def write_gguf(path: Path, metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """A file whose tensors are float32."""
    tensors = {
        name: (array.shape, "F32", np.ascontiguousarray(array, "<f4").tobytes())
        for name, array in arrays.items()
    }
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


def random_blocks(kind: str, blocks: int, seed: int) -> bytes:
    """Blocks of any bits, but scales (float16, where the struct has them) that are small and finite."""
    rng = np.random.default_rng(seed)
    _, _, size = TYPES[kind]
    scales = {
        "Q4_0": (0,),
        "Q4_1": (0, 2),
        "Q5_0": (0,),
        "Q5_1": (0, 2),
        "Q8_0": (0,),
        "Q4_K": (0, 2),
        "Q6_K": (208,),
    }
    raw = rng.integers(0, 256, (blocks, size), np.uint8)
    for place in scales.get(kind, ()):
        raw[:, place : place + 2] = rng.normal(0, 0.1, blocks).astype("<f2").view(np.uint8).reshape(blocks, 2)
    if kind in ("F32", "F16", "BF16"):
        values = rng.normal(0, 1, blocks).astype("<f4")
        raw = (
            values.view("<u4") >> 16 if kind == "BF16" else values.astype("<f2") if kind == "F16" else values
        )
        raw = raw.astype("<u2") if kind == "BF16" else raw
    return raw.tobytes()


def undo(kind: str, raw: bytes) -> list[float]:
    """The values of the blocks, one after the other, in Python's floats."""
    _, _, size = TYPES[kind]
    one = {
        "F32": lambda b: list(struct.unpack("<f", b)),
        "F16": lambda b: list(struct.unpack("<e", b)),
        "BF16": lambda b: list(struct.unpack("<f", b"\0\0" + b)),
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q4_K": _q4_k,
        "Q6_K": _q6_k,
    }[kind]
    return [value for start in range(0, len(raw), size) for value in one(raw[start : start + size])]


def _half(raw: bytes, place: int) -> float:
    return struct.unpack("<e", raw[place : place + 2])[0]


def _q8_0(raw: bytes) -> list[float]:
    return [_half(raw, 0) * q for q in struct.unpack("<32b", raw[2:])]


def _nibbles(raw: bytes) -> list[int]:
    return [byte & 15 for byte in raw] + [byte >> 4 for byte in raw]


def _q4_0(raw: bytes) -> list[float]:
    return [_half(raw, 0) * (q - 8) for q in _nibbles(raw[2:])]


def _q4_1(raw: bytes) -> list[float]:
    return [_half(raw, 0) * q + _half(raw, 2) for q in _nibbles(raw[4:])]


def _fifth_bits(raw: bytes) -> list[int]:
    (bits,) = struct.unpack("<I", raw)
    return [(bits >> i & 1) << 4 for i in range(32)]


def _q5_0(raw: bytes) -> list[float]:
    return [
        _half(raw, 0) * ((q | high) - 16)
        for q, high in zip(_nibbles(raw[6:]), _fifth_bits(raw[2:6]), strict=True)
    ]


def _q5_1(raw: bytes) -> list[float]:
    return [
        _half(raw, 0) * (q | high) + _half(raw, 2)
        for q, high in zip(_nibbles(raw[8:]), _fifth_bits(raw[4:8]), strict=True)
    ]


def _q4_k(raw: bytes) -> list[float]:
    packed, quants, out = raw[4:16], raw[16:], []
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = packed[part + 4] & 15 | (packed[part - 4] >> 6) << 4
            least = packed[part + 4] >> 4 | (packed[part] >> 6) << 4
        for i in range(32):
            byte = quants[32 * (part // 2) + i]
            q = byte >> 4 if part % 2 else byte & 15
            out.append(_half(raw, 0) * scale * q - _half(raw, 2) * least)
    return out


def _q6_k(raw: bytes) -> list[float]:
    low, high, scales = raw[:128], raw[128:192], struct.unpack("<16b", raw[192:208])
    out = []
    for i in range(256):
        half, place = divmod(i, 128)
        quarter, column = divmod(place, 32)
        byte = low[64 * half + 32 * (quarter % 2) + column]
        nibble = byte >> 4 if quarter >= 2 else byte & 15
        q = nibble | (high[32 * half + column] >> 2 * quarter & 3) << 4
        out.append(_half(raw, 208) * scales[i // 16] * (q - 32))
    return out
