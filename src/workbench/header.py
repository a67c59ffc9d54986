"""Headers of safetensors files: checked in full before anything is made of what they claim.

    read_header("adapter_model.safetensors")        # tensor name → dtype, shape, data_offsets

A header is a stranger's JSON. What passes here, the safetensors library opens: the same text, the same tensors.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from workbench.errors import AdapterError
from workbench.plain import show

__all__ = ["MAX_HEADER", "MAX_TENSORS", "WIDTH", "header_length", "parse_header", "read_header"]

MAX_HEADER, MAX_TENSORS, MAX_DIMENSIONS = 2**23, 20_000, 8
MAX_MARKS = (
    12 * MAX_TENSORS
)  # brackets and commas: a tensor of two dimensions has eight; each may cost 100 bytes to parse
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes


def read_header(path: str | Path) -> dict[str, dict]:
    """The header of a safetensors file: tensor name → dtype, shape, data_offsets; checked against the file's size.

    Raises:
        AdapterError: the header is too large, is not JSON, or does not describe the file.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_length(file.read(8), size, path.name)
        return parse_header(file.read(length), size, path.name)


def header_length(first: bytes, size: int, name: str) -> int:
    """How many bytes of header follow the first eight of a file of `size` bytes.

    Raises:
        AdapterError: more than are in the file, or than are read here.
    """
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise AdapterError(
            f"{name} has {size:,} bytes and claims a header of {length:,}; expected at most {MAX_HEADER:,}, within the file"
        )
    return length


def parse_header(text: bytes, size: int, name: str) -> dict[str, dict]:
    """The header's text, without the eight bytes before it, checked against the size of the whole file.

    Raises:
        AdapterError: as `read_header`.
    """
    if sum(map(text.count, (b"{", b"[", b","))) > MAX_MARKS:
        raise AdapterError(f"{name}: the header has {len(text):,} bytes, of more than {MAX_TENSORS:,} tensors")
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_once,
            parse_int=_whole,
            parse_float=_no_size,
            parse_constant=_no_size,
        )
        if b"\\u" in text:
            json.dumps(header, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{name}: the header is not JSON ({str(error)[:100]})") from error
    if text[:1] != b"{":  # so it is an object
        raise AdapterError(f"{name}: the header begins with {show(text[:1])}, expected an object")
    note = header.pop("__metadata__", None)
    if note is not None and not (isinstance(note, dict) and all(isinstance(value, str) for value in note.values())):
        raise AdapterError(f"{name}: the header's __metadata__ is {show(note)}, expected texts by name")
    for key, entry in header.items():
        if not _sound(entry):
            raise AdapterError(f"{name}: the header's entry for {show(key)} is not sound: {show(entry)}")
    end = 0
    places = sorted((entry["data_offsets"], key) for key, entry in header.items())
    for (start, stop), key in places:
        if start != end:
            raise AdapterError(f"{name}: {show(key)} begins at byte {start:,} of the data, where {end:,} was expected")
        end = stop
    if end != size - 8 - len(text):
        raise AdapterError(
            f"{name} is damaged: it has {size:,} bytes, its header says {end + 8 + len(text):,}; fetch it again"
        )
    return header


def _once(pairs: list[tuple]) -> dict:
    """An object's entries; of two of one name, other readers may take the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has two entries of one name")
    return found


def _whole(word: str) -> int:
    return _no_size(word) if word == "-0" or len(word) > 20 else int(word)


def _no_size(word: str) -> int:
    raise ValueError(f"{word[:20]} is no size")


def _sound(entry) -> bool:
    """Whether a tensor's entry has a type, a shape and a place, no more, and the place is as long as the others say."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(kind, str) and _counts(shape) and len(shape) <= MAX_DIMENSIONS):
        return False
    if not (_counts(place) and len(place) == 2):
        return False
    start, stop = place
    width = WIDTH.get(kind)  # other types are refused by a rule
    return start <= stop and (width is None or stop - start == width * math.prod(shape))


def _counts(value) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
