"Writers of the files that Pillow itself does not write, for tests."

import io
import struct
import zlib

import numpy as np
from PIL import Image


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values: np.ndarray, clear: tuple | None = None, orientation: int | None = None) -> bytes:
    "A PNG of 16 bits: (H, W) grey, or (H, W, 2, 3 or 4) grey with alpha, RGB, RGBA; `clear`: its transparent colour."
    height, width = values.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2] if values.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if clear is not None:
        chunks.append(_chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)))
    if orientation is not None:
        chunks.append(_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def tiff(
    values: np.ndarray,  # (H, W) or (H, W, bands), of any numbers
    order: str = "<",  # byte order
    photometric: int | None = None,  # default: 2 for three bands and more, else 1
    more: dict | None = None,  # further tags of type SHORT, such as {274: 6}
    pages: int = 1,  # copies of the picture
    reduced: tuple = (),  # which of them are marked as reduced copies
) -> bytes:
    "An uncompressed TIFF."
    values = values.astype(values.dtype.newbyteorder(order))
    bands = values.shape[2] if values.ndim == 3 else 1
    bits = values.dtype.itemsize * 8
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    out = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    place = 4
    for page in range(pages):
        at = len(out)
        out += values.tobytes()
        if len(out) % 2:
            out += b"\0"
        tags = {254: int(page in reduced), 256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1}
        tags |= {
            262: photometric if photometric is not None else 2 if bands > 2 else 1,
            273: at,
            277: bands,
            278: values.shape[0],
        }
        tags |= {279: values.nbytes, 339: kind, **({338: 2} if bands == 4 else {}), **(more or {})}
        if bands > 1:
            tags[258] = len(out)
            out += struct.pack(f"{order}{bands}H", *[bits] * bands)
            tags[339] = len(out)
            out += struct.pack(f"{order}{bands}H", *[kind] * bands)
        out[place : place + 4] = struct.pack(f"{order}I", len(out))
        out += struct.pack(f"{order}H", len(tags))
        for tag, value in sorted(tags.items()):
            count = bands if bands > 1 and tag in (258, 339) else 1
            long = tag in (254, 273, 279)
            data = struct.pack(
                f"{order}I" if long or count > 2 else f"{order}HH", *([value] if long or count > 2 else [value, 0])
            )
            out += struct.pack(f"{order}HHI", tag, 4 if long else 3, count) + data
        place = len(out)
        out += bytes(4)
    return bytes(out)


def netpbm(values: np.ndarray, maximum: int = 65535) -> bytes:
    "A PGM or PPM of 16 bits."
    magic = b"P6" if values.ndim == 3 else b"P5"
    return magic + f" {values.shape[1]} {values.shape[0]} {maximum}\n".encode() + values.astype(">u2").tobytes()


def encoded(values: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    "What Pillow writes, as bytes."
    out = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(out, kind, **options)
    return out.getvalue()
