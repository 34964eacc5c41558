"""Messages of the streams: what was sent arrives, and what is broken says so."""

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from masksl.engine.superlink import wire
from masksl.engine.superlink.wire import WireError

NUMBERS = [0, -1, 2**53 + 1, -(2**63), 2**200]
FLOATS = [0.0, -0.0, 1.0, 0.1, 1e22, 5e-324, math.inf, -math.inf, math.nan]
TEXTS = ["", "a", "Grüße, 世界 🙂", 'quote " and \\ and \n', "\0\ud800"]
BYTES = [b"", b"\0", bytes(range(256))]
LONGEST_LINE = 400


def same(left: Any, right: Any) -> bool:
    """Return whether values have the same types, zeros the same signs.

    A NaN is the same as any other.
    """
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        bits = struct.pack("d", left) == struct.pack("d", right)
        return bits or (math.isnan(left) and math.isnan(right))
    return bool(left == right)


def check(content: RecordDict) -> None:
    """Encode a content, decode it, and demand what was sent."""
    head, decoded = wire.decode(wire.encode(7, {"kind": "query"}, content))
    assert head == {"kind": "query"}
    assert list(decoded) == list(content)
    for name, record in content.items():
        assert type(decoded[name]) is type(record)
        assert list(decoded[name]) == list(record)
        for key, value in record.items():
            assert same(decoded[name][key], value), (name, key, value)


def array(data: bytes, dtype: str = "uint8", shape: tuple[int, ...] = ()) -> Array:
    return Array(dtype=dtype, shape=shape, stype="raw", data=data)


@pytest.mark.parametrize("number", [0, 1, 2**64 - 1])
def test_a_message_has_its_number_and_its_head(number: int) -> None:
    sent = {"kind": "query", "group": "ü", "more": [1, None, {"a": True}]}
    data = wire.encode(number, sent)
    assert wire.number_of(data) == number
    assert wire.decode(data) == (sent, RecordDict())


@pytest.mark.parametrize("values", [NUMBERS, FLOATS, TEXTS, BYTES, [True, False]])
def test_values_of_settings_arrive_as_they_were(values: list[Any]) -> None:
    alone = {f"{index}": value for index, value in enumerate(values)}
    lists = {"all": values, "one": values[:1], "none": []}
    check(RecordDict({"r": ConfigRecord(alone | lists), "empty": ConfigRecord()}))


@pytest.mark.parametrize("values", [NUMBERS, FLOATS])
def test_values_of_metrics_arrive_as_they_were(values: list[Any]) -> None:
    alone = {f"{index}": value for index, value in enumerate(values)}
    lists = {"all": values, "one": values[:1], "none": []}
    check(RecordDict({"r": MetricRecord(alone | lists), "empty": MetricRecord()}))


def test_arrays_arrive_as_they_were() -> None:
    record = ArrayRecord()
    record["empty"] = array(b"", shape=(0,))
    record["none of many"] = array(b"", "float32", (3, 0, 5))
    record["scalar"] = array(bytes(4), "float32")
    record["matrix"] = array(bytes(range(24)), "float32", (2, 3))
    record["ünïcode"] = array(b"\xff")
    numpy = ArrayRecord([np.arange(6.0).reshape(2, 3), np.zeros((0, 2), np.int8)])
    content = RecordDict({"a": record, "none": ArrayRecord(), "z": numpy})
    check(content)
    _, decoded = wire.decode(wire.encode(1, {}, content))
    arrays = decoded.array_records
    for sent, came in zip(numpy.values(), arrays["z"].values(), strict=True):
        np.testing.assert_array_equal(sent.numpy(), came.numpy())
    assert type(arrays["a"]["matrix"].data) is bytes


def test_records_keep_their_order_and_their_arrays_apart() -> None:
    content = RecordDict()
    for index, name in enumerate(["z", "", "a"]):
        content[f"c{name}"] = ConfigRecord({"z": index, "a": 1.0})
        content[f"a{name}"] = ArrayRecord({"x": array(bytes([index]) * index)})
        content[f"m{name}"] = MetricRecord({"z": [index], "a": [1.0]})
    check(content)


TEXT = st.text(max_size=8)
SCALARS = [st.integers(), st.floats(), st.booleans(), TEXT, st.binary(max_size=20)]
VALUES = st.one_of(*SCALARS, *(st.lists(scalar, max_size=4) for scalar in SCALARS))
METRICS = st.one_of(
    *SCALARS[:2], *(st.lists(scalar, max_size=4) for scalar in SCALARS[:2])
)
ARRAYS = st.builds(
    Array,
    dtype=TEXT,
    shape=st.lists(st.integers(), max_size=3).map(tuple),
    stype=TEXT,
    data=st.binary(max_size=20),
)
RECORDS = st.one_of(
    st.dictionaries(TEXT, VALUES, max_size=3).map(ConfigRecord),
    st.dictionaries(TEXT, METRICS, max_size=3).map(MetricRecord),
    st.dictionaries(TEXT, ARRAYS, max_size=3).map(ArrayRecord),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, RECORDS, max_size=3).map(RecordDict))
def test_whatever_is_sent_arrives(content: RecordDict) -> None:
    check(content)


# --- broken messages ------------------------------------------------------------------


def small() -> bytes:
    """Return a small message with every kind of record and value."""
    content = RecordDict(
        {
            "c": ConfigRecord({"b": b"ab", "l": [b"c"], "f": -1.5, "t": "x", "e": []}),
            "m": MetricRecord({"i": 3, "f": [0.5]}),
            "a": ArrayRecord({"x": array(b"12", shape=(2,)), "y": array(b"")}),
        }
    )
    return wire.encode(5, {"error": [1, "no"], "too_long": 1}, content)


def outcome(data: bytes) -> str:
    """Decode a message; return the text of its `WireError`, empty if it has none."""
    try:
        wire.decode(data)
    except WireError as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1 and len(text) < LONGEST_LINE
        return text
    return ""


def test_what_is_cut_or_goes_on_is_broken() -> None:
    data = small()
    assert outcome(data) == ""
    assert all(outcome(data[:length]) for length in range(len(data)))
    assert outcome(data + b"\0") == "1 bytes that are no array's"


def test_every_change_of_a_byte_decodes_or_is_broken() -> None:
    data = small()
    start = 8  # any number is one
    texts = []
    for place in range(start, len(data)):
        for value in {*b'\0\n" ,:[]{}019-.eENtn\\/=\x80\xff', data[place] ^ 1}:
            changed = bytearray(data)
            changed[place] = value
            texts.append(outcome(bytes(changed)))
    assert len([text for text in texts if text]) > len(texts) / 2


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=10))
def test_whatever_comes_decodes_or_is_broken(head: bytes, rest: bytes) -> None:
    outcome(head + rest)
    outcome(struct.pack("<QI", 1, len(head)) + head + rest)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["config", "arrays", "metrics", "x"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from(["base64", "error", "too_long", "x"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["config", "arrays", "metrics"]), JSON, JSON))
    | JSON,
    st.dictionaries(st.sampled_from(["error", "too_long"]), JSON),
)
def test_whatever_a_head_has_decodes_or_is_broken(records: Any, more: Any) -> None:
    text = json.dumps({"records": records, **more}).encode()
    outcome(struct.pack("<QI", 1, len(text)) + text + b"12345678")


def headed(text: bytes, rest: bytes = b"", length: int | None = None) -> bytes:
    """Return a message with this text in place of its head."""
    return struct.pack("<QI", 1, len(text) if length is None else length) + text + rest


def one_array(*, length: Any, shape: Any = (1,), key: Any = "x") -> bytes:
    values = [[key, "uint8", shape, "raw", length]]
    return json.dumps({"records": [["arrays", "a", values]]}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "message of 0 bytes: at least 12"),
        (bytes(11), "message of 11 bytes: at least 12"),
        (headed(b"{}", length=3), "head of 3 bytes in a message of 14"),
        (headed(b"", length=2**32 - 1), "head of 4294967295 bytes in a message"),
        (headed(b"no JSON"), "head that is broken: JSONDecodeError"),
        (headed(b"\x80" * 2**20), "head that is broken: UnicodeDecodeError"),
        (headed(b"{}"), "head that is broken: KeyError('records')"),
        (headed(b"[]"), "head that is broken: TypeError"),
        (headed(b"1" * 5000), "head that is broken: ValueError"),
        (headed(b"[" * 100_000), "head that is broken: RecursionError"),
        (headed(b'{"records":' * 100_000), "head that is broken: RecursionError"),
        (headed(b'{"records": 1}'), "head that is broken: TypeError"),
        (headed(b'{"records": [["config", "a"]]}'), "head that is broken: ValueError"),
        (headed(b'{"records": [["x", "a", {}]]}'), "record of kind 'x'"),
        (headed(b'{"records": [["config", 1, {}]]}'), "head that is broken: TypeErr"),
        (headed(b'{"records": [["config", "a", {"x": null}]]}'), "head that is brok"),
        (headed(b'{"records": [["config", "a", {"x": [[1]]}]]}'), "head that is brok"),
        (headed(b'{"records": [["metrics", "a", {"x": "y"}]]}'), "head that is brok"),
        (headed(b'{"records": [["config", "a", {"x": {"base64": "a"}}]]}'), "value t"),
        (headed(b'{"records": [["config", "a", {"x": {"base": "aa"}}]]}'), "value th"),
        (headed(b'{"records": [], "error": [1]}'), "head that is broken: ValueError"),
        (headed(b'{"records": [], "error": null}'), "head that is broken: TypeError"),
        (headed(b'{"records": [], "error": {"a": 1, "b": 2}}'), "error or length that"),
        (headed(b'{"records": [], "error": [Infinity, ""]}'), "error or length that"),
        (headed(b'{"records": [], "too_long": Infinity}'), "error or length that is"),
        (headed(b'{"records": [], "too_long": true}'), "error or length that is"),
        (headed(one_array(length=2)), "array of 2 bytes beyond the end of the message"),
        (headed(one_array(length=2**63)), "array of 9223372036854775808 bytes beyond"),
        (headed(one_array(length=-1)), "array of -1 bytes beyond the end"),
        (headed(one_array(length=True)), "array 'x' of length True, shape"),
        (headed(one_array(length=1.0)), "array 'x' of length 1.0, shape"),
        (headed(one_array(length=0, shape=[1.5])), "array 'x' of length 0, shape [1.5"),
        (headed(one_array(length="1", key="x\n" * 2**20)), "array 'x\\nx\\n"),
        (headed(one_array(length=1), b"12"), "1 bytes that are no array's"),
        (headed(b'{"records": []}', b"1"), "1 bytes that are no array's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_messages_say_what_is_wrong(data: bytes, message: str) -> None:
    assert outcome(data).startswith(message)


def test_heads_have_a_limited_length(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wire.MAX_HEAD == 16 * 2**20
    data = wire.encode(1, {"x": "y" * 100})
    monkeypatch.setattr(wire, "MAX_HEAD", 100)
    with pytest.raises(WireError, match=r"head of \d+ bytes: at most 100"):
        wire.encode(1, {"x": "y" * 100})
    assert outcome(data).startswith("head of 121 bytes in a message of 133")
