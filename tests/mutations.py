"""Damage: of bytes, of what lies in an archive or a header with its checksum right again, of an ONNX graph's fields."""

import io
import json
import zipfile
from pathlib import Path

from hypothesis import strategies as st
from onnx import ModelProto
from safetensors.numpy import load, save

from micronet.unpack import digest

NUMBERS = (0, 1, -1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, -(2**63))
TEXTS = ("", "x", "../../etc/passwd", "/etc/passwd", "a\nb\x1b[31m", "\0", "é" * 300, "os:system", "input", "NaN")

kinds = ("flip", "cut", "insert", "repeat", "zero", "length", "swap", "end")
damages = st.lists(
    st.tuples(st.sampled_from(kinds), st.floats(0, 1), st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3
)
hostile = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.floats() | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=5,
)


def damaged(data: bytes, how: list[tuple[str, float, float, int]]) -> bytes:
    """Bytes with damage: each of a kind, at a share of the length, up to another, with a byte."""
    made = bytearray(data)
    for kind, first, second, byte in how:
        here, there = sorted((int(first * len(made)), int(second * len(made))))
        length = min(there - here, 1 + byte)
        if kind == "flip" and here < len(made):
            made[here] ^= byte or 1
        elif kind == "cut":
            del made[here : here + length]
        elif kind == "insert":
            made[here:here] = bytes([byte]) * (1 + byte % 9)
        elif kind == "repeat":
            made[here:here] = made[here : here + length] * (1 + byte % 5)
        elif kind == "zero":
            made[here : here + length] = bytes(length)
        elif kind == "length":
            made[here : here + 8] = (2 ** (8 + byte % 56) - byte % 2).to_bytes(8, "little")
        elif kind == "swap":
            made[here : here + length], made[there : there + length] = (
                made[there : there + length],
                made[here : here + length],
            )
        elif kind == "end":
            del made[here:]
    return bytes(made)


def repacked(data: bytes, change) -> bytes:
    """An archive, its entries given to a function by name and content, with checksums that are right again."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename), change(entry.filename, old.read(entry)))
    return made.getvalue()


def headed(data: bytes, change) -> bytes:
    """A packed file, its JSON and tensors given to a function that changes them, with a digest that is right again."""
    length = int.from_bytes(data[:8], "little")
    content = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["micronet"])
    tensors = load(data)
    change(content, tensors)
    text = json.dumps(content)
    return save(tensors, {"micronet": text, "sha256": digest(text, tensors)})


def spoil(draw, content) -> None:
    """Put something else in a place that is drawn, of nested lists and dicts."""
    place = content
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw(st.sampled_from(list(keys)))
        if not (isinstance(place[key], dict | list) and place[key]) or draw(st.integers(0, 2)) == 0:
            break
        place = place[key]
    place[key] = draw(hostile)


def messages(message) -> list:
    """A protobuf message and all within it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                found += messages(inner)
    return found


def spoil_graph(draw, data: bytes) -> bytes:
    """A graph in which fields are other numbers, texts or parts than an exporter writes."""
    model = ModelProto.FromString(data)
    for _ in range(draw(st.integers(1, 3))):
        message = draw(st.sampled_from(messages(model)))
        if not (fields := message.ListFields()):
            continue
        field, value = draw(st.sampled_from(fields))
        what = draw(st.sampled_from(("clear", "double", "turn", "set", "set", "set")))
        if what == "clear":
            message.ClearField(field.name)
        elif field.is_repeated:
            items = list(value)
            if what == "double":
                items += items
            elif what == "turn":
                items.reverse()
            elif field.type != field.TYPE_MESSAGE:
                items[draw(st.integers(0, len(items) - 1))] = _value(draw, field)
            copies = [type(item).FromString(item.SerializeToString()) for item in items] if _nested(field) else items
            message.ClearField(field.name)
            getattr(message, field.name).extend(copies)
        elif not _nested(field):
            setattr(message, field.name, _value(draw, field))
    return model.SerializeToString()


def _nested(field) -> bool:
    return field.type == field.TYPE_MESSAGE


def _value(draw, field):
    if field.type == field.TYPE_STRING:
        return draw(st.sampled_from(TEXTS))
    if field.type == field.TYPE_BYTES:
        return draw(st.binary(max_size=40))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return draw(st.sampled_from((0.0, -1.0, 1e38, float("nan"), float("inf"))))
    if field.type == field.TYPE_ENUM:
        return draw(st.sampled_from([value.number for value in field.enum_type.values]))
    least, most = (-(2**31), 2**31 - 1) if field.type == field.TYPE_INT32 else (-(2**63), 2**63 - 1)
    least, most = (0, 2**64 - 1) if field.type == field.TYPE_UINT64 else (least, most)
    return min(max(draw(st.sampled_from(NUMBERS)), least), most)


def written(path: Path, data: bytes) -> Path:
    """A file with this content."""
    path.write_bytes(data)
    return path
