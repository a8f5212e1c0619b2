"""Files of weights: what is written is read back bit for bit, and damage is never read as weights.

The safetensors library is the oracle: it reads what is written here, writes what is read here, and
whatever is accepted here it must accept too, with the same numbers.
"""

import io
import json
import os
import stat
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tinyldm.checkpoints import safetensors as safetensors_module
from tinyldm.checkpoints.diffusers_folder import load_component
from tinyldm.checkpoints.safetensors import (
    CHECKSUM,
    DTYPES,
    WeightsError,
    load_metadata,
    load_weights,
    match,
    save_weights,
    tensor_shapes,
)
from tinyldm.files import replacing, write_json

dtypes = st.sampled_from(sorted(DTYPES.values()))
names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda n: n != "__metadata__")


def assert_same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@st.composite
def arrays(draw):
    """Any bits, NaNs too, in any layout: with no axis, with none along an axis, turned, gappy."""
    shape = draw(st.lists(st.integers(0, 3), max_size=5))
    dtype = np.dtype(draw(dtypes))
    size = int(np.prod(shape)) * dtype.itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    layout = draw(st.sampled_from(["plain", "Fortran", "backwards", "gaps"])) if shape else "plain"
    if layout == "Fortran":
        return np.asfortranarray(array)
    if layout == "backwards":
        return array[(slice(None, None, -1),) * array.ndim]
    if layout == "gaps":
        return np.repeat(array, 2, axis=0)[::2]
    return array


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A path that examples write to one after the other."""
    return tmp_path_factory.mktemp("weights") / "model.safetensors"


# -------------------------------------------------------------------------------------- round trips


@given(params=st.dictionaries(names, arrays(), max_size=4))
def test_save_and_load(file, params):
    save_weights(file, params)
    loaded = load_weights(file)
    assert loaded.keys() == params.keys()
    for name, x in params.items():
        assert_same_bits(loaded[name], x)
        assert loaded[name].flags.writeable and loaded[name].flags.c_contiguous


@given(params=st.dictionaries(names, arrays(), max_size=4))
def test_the_library_reads_what_we_write(file, params):
    save_weights(file, params)
    theirs = safetensors.numpy.load_file(file)
    assert theirs.keys() == params.keys()
    for name, x in params.items():
        assert_same_bits(theirs[name], x.transpose(3, 2, 0, 1) if x.ndim == 4 else x)


@given(params=st.dictionaries(names, arrays(), max_size=4))
def test_we_read_what_the_library_writes(file, params):
    params = {name: x.copy() for name, x in params.items()}
    safetensors.numpy.save_file(params, file)
    loaded = load_weights(file)
    assert loaded.keys() == params.keys()
    for name, x in params.items():
        assert_same_bits(loaded[name], x.transpose(2, 3, 1, 0) if x.ndim == 4 else x)


def test_kernels_lie_in_a_file_as_in_torch(tmp_path):
    kernel = np.arange(2 * 3 * 5 * 7.0).reshape(2, 3, 5, 7)  # kh, kw, c_in, c_out
    save_weights(tmp_path / "a", {"conv": kernel})
    theirs = safetensors.numpy.load_file(tmp_path / "a")["conv"]
    assert theirs.shape == (7, 5, 2, 3)
    assert theirs[6, 4, 1, 2] == kernel[1, 2, 4, 6]


def test_byte_order_of_other_machines(tmp_path):
    x = np.arange(6.0).reshape(2, 3)
    save_weights(tmp_path / "a", {"x": x.astype(">f8")})
    assert_same_bits(load_weights(tmp_path / "a")["x"], x)


def test_metadata(tmp_path):
    x = np.ones(3, "float32")
    save_weights(tmp_path / "a", {"x": x}, metadata={"format": "np", "step": "12"})
    notes = load_metadata(tmp_path / "a")
    assert notes.pop(CHECKSUM) and notes == {"format": "np", "step": "12"}
    assert_same_bits(load_weights(tmp_path / "a")["x"], x)
    save_weights(tmp_path / "b", {"x": x})
    assert load_metadata(tmp_path / "b").keys() == {CHECKSUM}


def test_every_tensor_lies_at_a_multiple_of_its_item(tmp_path):
    params = {"a": np.zeros(3, "u1"), "b": np.zeros(1, "f4"), "c": np.zeros(1, "f8")}
    save_weights(tmp_path / "x", params)
    data = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % params[name].itemsize == 0


@pytest.mark.parametrize("length", range(8))
def test_a_header_is_padded_to_eight_bytes(tmp_path, length):
    save_weights(tmp_path / "x", {"n" * length: np.zeros(1)})
    data = (tmp_path / "x").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    assert len(header) % 8 == 0 and len(header) - len(header.rstrip(b" ")) < 8


def test_a_list_of_names_stops_after_five():
    names = [f"n{i}" for i in range(8)]
    assert safetensors_module.some(names[:5]) == "n0, n1, n2, n3, n4"
    assert safetensors_module.some(names) == "n0, n1, n2, n3, n4 and 3 more"


@pytest.mark.parametrize("dtype", ["bool", "int8", "complex64", "longdouble", "O", "U3"])
def test_what_cannot_be_loaded_is_not_saved(tmp_path, dtype):
    with pytest.raises(WeightsError, match="^.*odd.*$"):
        save_weights(tmp_path / "a", {"fine": np.ones(2), "odd": np.ones(2).astype(dtype)})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- dtypes


def pack(header, data=b"", length=None):
    """The bytes of a file: `header` a dict, or text or bytes that need not be JSON."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def entry(dtype, shape, begin, end, **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


@given(bits=st.lists(st.integers(0, 2**16 - 1), max_size=8))
def test_bfloat16_becomes_float32_exactly(file, bits):
    """The upper halves of float32 numbers, all 65,536 of them NaNs and infinities included."""
    halves = np.array(bits, "<u2")
    header = {"x": entry("BF16", [len(bits)], 0, 2 * len(bits))}
    file.write_bytes(pack(header, halves.tobytes()))
    x = load_weights(file)["x"]
    assert_same_bits(x, (halves.astype("uint32") << 16).view("float32"))


def test_bfloat16_kernels_are_turned_too(tmp_path):
    kernel = np.arange(24, dtype="float32").reshape(2, 3, 4, 1)  # small integers are exact
    halves = (kernel.view("uint32") >> 16).astype("<u2")
    header = {"x": entry("BF16", [2, 3, 4, 1], 0, 48)}
    (tmp_path / "a").write_bytes(pack(header, halves.tobytes()))
    assert_same_bits(load_weights(tmp_path / "a")["x"], kernel.transpose(2, 3, 1, 0).copy())
    as_float64 = load_weights(tmp_path / "a", "float64")["x"]
    assert_same_bits(as_float64, kernel.transpose(2, 3, 1, 0).astype("float64"))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_is_that_of_all_floating_tensors(tmp_path, dtype):
    params = {code: np.array([[1, 2], [3, 4]], numpy) for code, numpy in DTYPES.items()}
    save_weights(tmp_path / "a", params)
    for code, x in load_weights(tmp_path / "a", dtype).items():
        assert_same_bits(x, params[code].astype(dtype) if code[0] == "F" else params[code])


# ------------------------------------------------------------------------------------------- damage

PARAMS = {
    "bias": np.array([1, 2, 3], "<f4"),
    "kernel": np.arange(6, dtype="<f4").reshape(1, 1, 2, 3),
    "none": np.zeros((0, 2), "<f4"),
    "step": np.array(7, "<i8"),
}


@pytest.fixture
def good(tmp_path):
    """A sound file, with a tensor of each kind."""
    safetensors.numpy.save_file({name: x.copy() for name, x in PARAMS.items()}, tmp_path / "good")
    assert load_weights(tmp_path / "good").keys() == PARAMS.keys()
    return tmp_path / "good"


def assert_refused(file, *words):
    with pytest.raises(WeightsError) as caught:
        load_weights(file)
    assert "\n" not in str(caught.value)
    for word in (str(file), *words):
        assert word in str(caught.value)


def test_truncated_at_every_length(good):
    data = good.read_bytes()
    for length in range(len(data)):
        good.write_bytes(data[:length])
        assert_refused(good)


def test_trailing_bytes(good):
    data = good.read_bytes()
    for more in (b"\0", b" ", b"\0" * 8, data):
        good.write_bytes(data + more)
        assert_refused(good)


def test_every_flipped_bit_of_the_header(good):
    """Refused, or read as the library reads it: a flip within a name makes another name."""
    data = good.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for position in range(end):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            good.write_bytes(damaged)
            try:
                ours = load_weights(good)
            except WeightsError:
                continue
            theirs = safetensors.numpy.load(bytes(damaged))
            assert ours.keys() == theirs.keys()
            for name, x in theirs.items():
                assert_same_bits(ours[name], x.transpose(2, 3, 1, 0) if x.ndim == 4 else x)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        load_metadata(tmp_path / "none")


A = entry("F32", [1], 0, 4)
LENGTHS = {
    "huge": 2**64 - 1,
    "negative if signed": 2**63,
    "over the limit": 100_000_001,
    "one too long": len(json.dumps({"a": A})) + 5,
    "one too short": len(json.dumps({"a": A})) - 1,
    "none": 0,
}
HEADERS = {
    # what is not JSON, or not an object of objects
    "no JSON": "weights",
    "half an object": '{"a": {"dtype": "F32", "shape": [1]',
    "two objects": json.dumps({"a": A}) + "{}",
    "bytes that are not text": b'{"\xff": 1}',
    "a list": "[]",
    "null": "null",
    "a number": "1",
    "a text": '"a"',
    "nested deeply": "[" * 100_000,
    "nested deeply inside": '{"a":' * 100_000,
    "a long number": '{"a": ' + "9" * 5000 + "}",
    "tensor is null": {"a": None},
    "tensor is a number": {"a": 1},
    "tensor is a list": {"a": ["F32", [1], [0, 4]]},
    "tensor is a text": {"a": "F32"},
    "tensor is empty": {"a": {}},
    # names
    "a name twice": '{"a": A, "a": A}'.replace("A", json.dumps(A)),
    "a key twice": '{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    # keys
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    # dtype
    "unknown dtype": {"a": entry("F31", [1], 0, 4)},
    "dtype of NumPy": {"a": entry("float32", [1], 0, 4)},
    "dtype is a number": {"a": entry(4, [1], 0, 4)},
    "dtype is null": {"a": entry(None, [1], 0, 4)},
    "dtype is a list": {"a": entry(["F32"], [1], 0, 4)},
    "another width": {"a": entry("F64", [1], 0, 4)},
    # shape
    "negative shape": {"a": entry("F32", [-1], 0, 4)},
    "twice negative shape": {"a": entry("F32", [-1, -1], 0, 4)},
    "fractional shape": {"a": entry("F32", [1.0], 0, 4)},
    "shape of booleans": {"a": entry("F32", [True], 0, 4)},
    "shape of texts": {"a": entry("F32", ["1"], 0, 4)},
    "shape is null": {"a": entry("F32", None, 0, 4)},
    "shape is a number": {"a": entry("F32", 1, 0, 4)},
    "shape is a text": {"a": entry("F32", "", 0, 4)},
    "shape is an object": {"a": entry("F32", {}, 0, 4)},
    "nested shape": {"a": entry("F32", [[1]], 0, 4)},
    "larger than its bytes": {"a": entry("F32", [2], 0, 4)},
    "smaller than its bytes": {"a": entry("F32", [1, 0], 0, 4)},
    "overflow": {"a": entry("F32", [2**62, 4], 0, 4)},
    "overflow to the right size": {"a": entry("F32", [2**63 + 1, 2], 0, 4)},
    "overflow times nothing": {"a": A, "b": entry("F32", [2**40, 2**40, 0], 4, 4)},
    "larger than a machine word": {"a": A, "b": entry("F32", [2**70, 0], 4, 4)},
    "too many axes": {"a": entry("F32", [1] * 65, 0, 4)},
    # offsets
    "hole before": {"a": entry("F32", [0], 4, 4)},
    "hole between": {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 3, 4)},
    "overlap": {"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)},
    "same bytes twice": {"a": A, "b": A},
    "one inside another": {"a": A, "b": entry("U8", [1], 1, 2)},
    "beyond the end": {"a": entry("F32", [2], 0, 8)},
    "bytes left over": {"a": entry("U8", [3], 0, 3)},
    "no tensors at all": {},
    "reversed offsets": {"a": entry("F32", [1], 4, 0)},
    "negative offsets": {"a": entry("F32", [1], -4, 0)},
    "fractional offsets": {"a": entry("F32", [1], 0.0, 4.0)},
    "offsets of booleans": {"a": entry("U8", [1], False, True), "b": entry("U8", [3], 1, 4)},
    "offsets of texts": {"a": entry("F32", [1], "0", "4")},
    "offsets not a number": {"a": entry("F32", [1], float("nan"), float("nan"))},
    "endless offsets": {"a": entry("F32", [1], 0, float("inf"))},
    "offsets of null": {"a": entry("F32", [1], None, None)},
    "offsets mixed": {"a": entry("U8", [0], 0, 0), "b": entry("F32", [1], "0", 4)},
    "one offset": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}},
    "offsets are a number": {"a": {"dtype": "F32", "shape": [1], "data_offsets": 0}},
    "offsets are a text": {"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}},
    "offsets are an object": {"a": {"dtype": "F32", "shape": [1], "data_offsets": {"0": 0}}},
    # notes
    "notes are a number": {"a": A, "__metadata__": 1},
    "notes are a list": {"a": A, "__metadata__": ["a"]},
    "a note is a number": {"a": A, "__metadata__": {"step": 1}},
}


def test_the_base_of_the_attacks_is_sound(tmp_path):
    (tmp_path / "a").write_bytes(pack({"a": A, "__metadata__": {"step": "1"}}, b"\0" * 4))
    assert load_weights(tmp_path / "a")["a"].shape == (1,)


@pytest.mark.parametrize("case", LENGTHS)
def test_wrong_length_of_the_header(tmp_path, case):
    (tmp_path / "a").write_bytes(pack({"a": A}, b"\0" * 4, LENGTHS[case]))
    assert_refused(tmp_path / "a")


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_header(tmp_path, case):
    (tmp_path / "a").write_bytes(pack(HEADERS[case], b"\0" * 4))
    assert_refused(tmp_path / "a")


@pytest.mark.parametrize("case", ["no JSON", "a list", "a name twice", "notes are a number"])
def test_metadata_of_a_wrong_header(tmp_path, case):
    (tmp_path / "a").write_bytes(pack(HEADERS[case], b"\0" * 4))
    with pytest.raises(WeightsError):
        load_metadata(tmp_path / "a")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(
    key=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=json_values | st.lists(st.integers(-1, 5) | st.sampled_from([0.0, True, 2**40, 2**70])),
    data=st.binary(max_size=6),
)
def test_any_value_in_a_header(file, key, value, data):
    """Refused, or read as the library reads it."""
    file.write_bytes(pack({"a": {**entry("U8", [len(data)], 0, len(data)), key: value}}, data))
    try:
        ours = load_weights(file)
    except WeightsError:
        return
    theirs = safetensors.numpy.load(file.read_bytes())
    expected = theirs["a"]
    assert_same_bits(ours["a"], expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected)


# ----------------------------------------------------------------------------------- written or not


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interruption])
@pytest.mark.parametrize("written", [b"", b"half"])
def test_the_old_file_stays_when_writing_fails(tmp_path, error, written):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    with pytest.raises(error):
        with replacing(file) as temporary:
            temporary.write_bytes(written)
            raise error
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_new_file_appears_at_the_end(tmp_path):
    file = tmp_path / "new folder" / "model.safetensors"
    with replacing(file) as temporary:
        assert temporary.parent == file.parent, "a rename must not cross file systems"
        temporary.write_bytes(b"new")
        assert not file.exists()
    assert file.read_bytes() == b"new"
    assert list(file.parent.iterdir()) == [file]
    with replacing(file) as temporary:
        temporary.write_bytes(b"newer")
    assert file.read_bytes() == b"newer"


def test_a_new_file_may_be_read_as_any_other(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    save_weights(tmp_path / "weights", PARAMS)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "weights")}
    assert len(modes) == 1


def test_no_file_stays_open(tmp_path):
    before = set(os.listdir("/dev/fd"))
    save_weights(tmp_path / "weights", PARAMS)
    load_weights(tmp_path / "weights")
    assert set(os.listdir("/dev/fd")) <= before


def test_the_umask_is_honoured_and_stays(tmp_path):
    before = os.umask(0o027)
    try:
        save_weights(tmp_path / "weights", PARAMS)
    finally:
        after = os.umask(before)
    assert after == 0o027
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == 0o640


def test_json_has_its_keys_in_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": {"d": 1, "c": None}, "a": [2]})
    write_json(tmp_path / "b.json", {"a": [2], "b": {"c": None, "d": 1}})
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text()
    assert text.split() == '{ "a": [ 2 ], "b": { "c": null, "d": 1 } }'.split()


def test_no_temporary_is_left_where_the_rename_fails(tmp_path):
    target = tmp_path / "a folder, not a file"
    target.mkdir()
    with pytest.raises(OSError):
        with replacing(target) as temporary:
            temporary.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("fits", [0, 8, 100, 200])
def test_the_old_file_stays_when_the_disk_is_full(tmp_path, monkeypatch, fits):
    file = tmp_path / "model.safetensors"
    save_weights(file, PARAMS)
    before = file.read_bytes()

    class Disk(io.FileIO):
        def write(self, data):
            if self.tell() + memoryview(data).nbytes > fits:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(safetensors_module, "open", Disk, raising=False)
    with pytest.raises(OSError, match="No space left on device: .*model.safetensors"):
        save_weights(file, PARAMS)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------------------------------- checksums


def test_no_flipped_bit_goes_unseen(tmp_path):
    """Each bit of a small file: it is refused, or what is loaded is what was saved."""
    params = {"w": np.float32([[1, 2], [3, 4]]), "b": np.float64([5]), "n": np.uint8([6, 7, 8])}
    file = tmp_path / "a.safetensors"
    save_weights(file, params, {"format": "pt"})
    whole, seen = file.read_bytes(), 0
    for i in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        file.write_bytes(flipped)
        try:
            found = load_weights(file)
        except WeightsError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            seen += 1
            continue
        assert found.keys() == params.keys(), i
        for name, x in params.items():
            assert_same_bits(found[name], x)
    # Those that change nothing are in the notes, and in the white space after the header.
    assert seen > 0.8 * 8 * len(whole)


def test_a_checksum_that_cannot_be_is_cut_in_the_message(tmp_path):
    safetensors.numpy.save_file({"x": np.ones(3)}, tmp_path / "a", {CHECKSUM: "0123456789" * 99})
    with pytest.raises(WeightsError, match="its checksum was 01234567 when it was written"):
        load_weights(tmp_path / "a")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_tensors_in_each_others_place_are_seen(tmp_path, share):
    params = {name: np.float32(np.random.default_rng(i).normal(size=50)) for i, name in
              enumerate("abcdef")}  # fmt: skip
    file = tmp_path / "a.safetensors"
    save_weights(file, params)
    data = file.read_bytes()
    start = len(data) - 6 * 200
    at = start + int(share * 1000) // 4 * 4
    swapped = data[:start] + data[at:] + data[start:at]
    file.write_bytes(swapped)
    with pytest.raises(WeightsError, match="damaged: its checksum was"):
        load_weights(file)


def test_large_tensors_are_checked_row_by_row(tmp_path):
    """Rows are folded together: any bit of them, pages of a disk exchanged, lost or doubled."""
    rows = 2 * safetensors_module.ROWS + 5
    x = np.random.default_rng(0).normal(size=2 * rows * safetensors_module.ROW + 3).astype("f4")
    file = tmp_path / "a.safetensors"
    save_weights(file, {"x": x})
    whole = file.read_bytes()
    start, page = len(whole) - x.nbytes, 4096
    first, second = whole[start : start + page], whole[start + page : start + 2 * page]
    rest = whole[start + 2 * page :]
    pages = [second + first, first + first, second + second, bytes(page) + second, bytes(2 * page)]
    changed = [whole[:start] + two + rest for two in pages]
    for bit in np.random.default_rng(1).integers(8 * start, 8 * len(whole), 50):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        changed.append(bytes(flipped))
    for data in changed:
        file.write_bytes(data)
        with pytest.raises(WeightsError, match="damaged: its checksum was"):
            load_weights(file)
    file.write_bytes(whole)
    assert_same_bits(load_weights(file)["x"], x)


@pytest.mark.parametrize(
    "start, says",
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; fetch"),
        (b"<!DOCTYPE html><html>", "a web page; download the file itself"),
        (b"GGUF\3\0\0\0\0\0", "a GGUF file"),
        (b"\xff" * 20, "its header would be longer than"),
    ],
)
def test_other_files_under_the_name_are_told_what_they_are(tmp_path, start, says):
    (tmp_path / "a.safetensors").write_bytes(start + bytes(100))
    with pytest.raises(WeightsError, match=f"not a safetensors file: {says}"):
        load_weights(tmp_path / "a.safetensors")


def test_equal_weights_give_equal_bytes(tmp_path):
    for name in "ab":
        save_weights(tmp_path / name, PARAMS, {"format": "pt", "other": "note"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    there = {name: PARAMS[name] for name in reversed(PARAMS)}
    save_weights(tmp_path / "b", there, {"other": "note", "format": "pt"})
    assert load_weights(tmp_path / "b").keys() == PARAMS.keys()


def test_files_of_others_have_no_checksum_and_are_read(tmp_path):
    safetensors.numpy.save_file({"x": np.ones(3, "float32")}, tmp_path / "a")
    assert load_metadata(tmp_path / "a") == {}
    np.testing.assert_array_equal(load_weights(tmp_path / "a")["x"], [1, 1, 1])


def test_what_is_written_here_is_read_by_the_library(tmp_path):
    save_weights(tmp_path / "a", PARAMS, {"format": "pt"})
    theirs = safetensors.numpy.load_file(tmp_path / "a")
    ours = load_weights(tmp_path / "a")
    for name, x in theirs.items():
        x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
        np.testing.assert_array_equal(ours[name], x)
    assert theirs.keys() == PARAMS.keys()


@pytest.mark.parametrize("length", [2**24 + 1, 99_000_000, 2**63])
def test_a_huge_header_is_not_read(tmp_path, length):
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    with pytest.raises(WeightsError, match="its header would be longer than 16,777,216 bytes"):
        load_weights(tmp_path / "a")


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for read in (load_weights, load_metadata, tensor_shapes):
        with pytest.raises(WeightsError, match="expected a file, found something else"):
            read(tmp_path / "a.safetensors")


# ----------------------------------------------------------------------------------------- matching

SHAPES = {"conv.weight": (3, 3, 2, 4), "conv.bias": (4,), "norm.weight": (4,)}


def weights_of(shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def test_everything_that_does_not_fit_is_listed_at_once():
    params = weights_of(SHAPES)
    match(SHAPES, SHAPES, "unet")
    params["extra.1"] = params["extra.2"] = params.pop("conv.bias")
    params["norm.weight"] = np.ones((2, 2))
    params["conv.weight"] = params["conv.weight"].transpose(3, 2, 0, 1)
    with pytest.raises(WeightsError) as caught:
        match({n: x.shape for n, x in params.items()}, SHAPES | {"norm.bias": (4,)}, "unet")
    message = str(caught.value)
    assert message.startswith("unet: ") and "\n" not in message
    for part in (
        "missing (2): conv.bias, norm.bias",
        "unexpected (2): extra.1, extra.2",
        "misshapen (2): conv.weight: expected (3, 3, 2, 4), found (4, 2, 3, 3), "
        "norm.weight: expected (4,), found (2, 2)",
    ):
        assert part in message


# -------------------------------------------------------------------------------- component folders


def assert_loaded(folder, params, dtype="float32", shapes=SHAPES):
    loaded = load_component(folder, shapes, dtype)
    assert loaded.keys() == params.keys()
    for name, x in params.items():
        assert_same_bits(loaded[name], x.astype(dtype))


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_one_file(tmp_path, stem, variant):
    params = weights_of(SHAPES, "float16" if variant else "float32")
    save_weights(tmp_path / f"{stem}{variant}.safetensors", params)
    assert_loaded(tmp_path, params)
    assert_loaded(tmp_path, params, "float64")


def test_the_name_of_diffusers_comes_first(tmp_path):
    params = weights_of(SHAPES)
    save_weights(tmp_path / "diffusion_pytorch_model.safetensors", params)
    others = {name: x + 1 for name, x in params.items()}
    save_weights(tmp_path / "model.safetensors", others)
    assert_loaded(tmp_path, params)


def test_full_precision_comes_first(tmp_path):
    params = weights_of(SHAPES)
    save_weights(tmp_path / "model.safetensors", params)
    half = {name: x.astype("float16") for name, x in params.items()}
    save_weights(tmp_path / "model.fp16.safetensors", half)
    assert_loaded(tmp_path, params)


def write_shards(folder, params, stem, variant, count=2):
    """As diffusers and transformers share out large models."""
    files = [f"{stem}{variant}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: files[i % count] for i, name in enumerate(params)}
    for file in files:
        save_weights(folder / file, {n: x for n, x in params.items() if weight_map[n] == file})
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, files


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_sharded_files(tmp_path, stem, variant):
    params = weights_of(SHAPES, "float16" if variant else "float32")
    _, files = write_shards(tmp_path, params, stem, variant)
    assert_loaded(tmp_path, params)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=files[1]):
        load_component(tmp_path, SHAPES)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index(tmp_path, text):
    index, _ = write_shards(tmp_path, weights_of(SHAPES), "model", "")
    index.write_text(text)
    with pytest.raises(WeightsError, match=r"^.*model\.safetensors\.index\.json.*$"):
        load_component(tmp_path, SHAPES)


TEXT_SHAPES = {"text_model.embeddings.token_embedding.weight": (5, 4), "text_model.norm.bias": (4,)}


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("position_ids", [True, False])
def test_text_encoders_of_all_ages(tmp_path, prefix, position_ids):
    """Older files hold the position ids, newer ones leave out the first part of every name."""
    params = weights_of(TEXT_SHAPES)
    stored = {prefix + name.removeprefix("text_model."): x for name, x in params.items()}
    if position_ids:
        stored[f"{prefix}embeddings.position_ids"] = np.arange(7).reshape(1, 7)
    save_weights(tmp_path / "model.safetensors", stored)
    assert_loaded(tmp_path, params, shapes=TEXT_SHAPES)


def test_misfit_of_a_component_names_its_folder(tmp_path):
    params = weights_of(SHAPES)
    params["conv.extra"] = params.pop("conv.bias")
    save_weights(tmp_path / "model.safetensors", params)
    with pytest.raises(
        WeightsError, match="missing .*conv.bias.*unexpected .*conv.extra"
    ) as caught:
        load_component(tmp_path, SHAPES)
    assert str(caught.value).startswith(str(tmp_path))


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        load_component(tmp_path, SHAPES)


# ------------------------------------------------------------------------------------------- memory

MIB = 2**20


@pytest.mark.parametrize("shape", [(1024, 1024), (3, 3, 256, 455)], ids=["matrices", "kernels"])
def test_memory_of_loading(tmp_path, shape):
    """A 64 MiB file takes its size, one tensor of 4 MiB, and next to nothing."""
    params = {str(i): np.full(shape, i, "float32") for i in range(16)}
    save_weights(tmp_path / "model.safetensors", params)
    del params
    size = (tmp_path / "model.safetensors").stat().st_size
    shapes = {str(i): shape for i in range(16)}
    for load in (
        lambda: load_weights(tmp_path / "model.safetensors"),
        lambda: load_component(tmp_path, shapes),
    ):
        tracemalloc.start()
        try:
            loaded = load()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert [x.flat[-1] for x in loaded.values()] == [float(name) for name in loaded]
        del loaded
        assert peak < size + size / 16 + MIB / 2, f"peak of {peak / MIB:.1f} MiB"
