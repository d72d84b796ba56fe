"""Reads the little of an ONNX file that concerns the runtime.

That is its operators, and where its tensors lie. The onnx package is not needed.

ONNX is protobuf (https://protobuf.dev/programming-guides/encoding/): a message is a row of fields,
each a number and a value. Fields that are not looked at are copied as they are. Field numbers are
those of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_OP_TYPE = 4
_TENSOR_EXTERNAL_DATA = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


def operators(model: bytes) -> set[str]:
    """The types of a model's nodes.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    nodes = (
        node for graph in _messages(model, _MODEL_GRAPH) for node in _messages(graph, _GRAPH_NODE)
    )
    return {name.decode() for node in nodes for name in _messages(node, _NODE_OP_TYPE)}


def change_external_data(model: bytes, change: Callable[[dict[str, str]], dict[str, str]]) -> bytes:
    """Return the model with other entries for external data.

    They are those of each initializer whose data lies in another file.

    Args:
        model: Serialized ``ModelProto``.
        change: Function from the entries of one initializer (``location``, ``offset``, ...) to
            those that take their place.

    Raises:
        ValueError: the bytes are no protobuf message.
    """

    def change_tensor(tensor: bytes) -> bytes:
        old = dict(_entry(entry) for entry in _messages(tensor, _TENSOR_EXTERNAL_DATA))
        if not old:
            return tensor
        kept = b"".join(
            tensor[begin:end]
            for number, begin, _, end, _ in _fields(tensor)
            if number != _TENSOR_EXTERNAL_DATA
        )
        return kept + b"".join(
            _encode(_TENSOR_EXTERNAL_DATA, _encode_entry(key, value))
            for key, value in change(old).items()
        )

    return _replace(
        model, _MODEL_GRAPH, lambda graph: _replace(graph, _GRAPH_INITIALIZER, change_tensor)
    )


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the fields of a message.

    Each is its number, where it begins, where its value begins and ends, and its wire type.
    """
    position = 0
    while position < len(message):
        begin = position
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == _VARINT:
            _, end = _varint(message, position)
        elif wire == _LENGTH:
            size, position = _varint(message, position)
            end = position + size
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            end = position + (8 if wire == _EIGHT_BYTES else 4)
        else:
            raise ValueError(f"wire type {wire} at byte {begin}")
        if end > len(message):
            raise ValueError(f"a field of {end - position} bytes at byte {begin} of {len(message)}")
        yield tag >> 3, begin, position, end, wire
        position = end


def _messages(message: bytes, number: int) -> list[bytes]:
    """Return the values of that number's fields: messages or strings."""
    return [
        message[value:end]
        for found, _, value, end, wire in _fields(message)
        if found == number and wire == _LENGTH
    ]


def _replace(message: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return the message with ``change`` applied to that number's fields."""
    parts = (
        _encode(number, change(message[value:end]))
        if found == number and wire == _LENGTH
        else message[begin:end]
        for found, begin, value, end, wire in _fields(message)
    )
    return b"".join(parts)


def _entry(message: bytes) -> tuple[str, str]:
    (key,), (value,) = _messages(message, _ENTRY_KEY), _messages(message, _ENTRY_VALUE)
    return key.decode(), value.decode()


def _encode_entry(key: str, value: str) -> bytes:
    return _encode(_ENTRY_KEY, key.encode()) + _encode(_ENTRY_VALUE, value.encode())


def _encode(number: int, value: bytes) -> bytes:
    return _encode_varint(number << 3 | _LENGTH) + _encode_varint(len(value)) + value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the number that begins at ``position``, and where it ends.

    It is written seven bits a byte, the lowest first.
    """
    value = shift = 0
    while position < len(message):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"a number that does not end in {len(message)} bytes")


def _encode_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
