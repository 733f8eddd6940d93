"""Our own reading and writing of torch.save's files; torch is the oracle, and planted code is not executed."""

import argparse
import io
import os
import pickle
import random
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

from megatron.checkpoint.contents import StoredTensor, one_piece
from megatron.checkpoint.convert import torch_writing
from megatron.checkpoint.convert.torch_files import read_torch_file
from megatron.checkpoint.convert.torch_pickle import PickledObject, load_torch_pickle
from megatron.checkpoint.convert.torch_writing import write_torch_file
from megatron.errors import CheckpointError

MATRIX = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def tree():
    torch.manual_seed(1)
    split = nn.Parameter(torch.ones(4))
    split.tensor_model_parallel = True  # pickled with its attributes
    return {
        "args": argparse.Namespace(num_layers=2, params_dtype=torch.float16, data_path=["a"], lr=1e-3, x=None),
        "model": nn.Linear(2, 3).state_dict(), "views": [MATRIX, MATRIX.t(), MATRIX[1:4, 2:5]], "parameter": split,
        "kinds": [MATRIX.to(kind) for kind in (torch.half, torch.bfloat16, torch.double, torch.int64, torch.bool,
                                               torch.uint8, torch.int8)],
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(4.0), "size": torch.Size([2, 3]), 0: OrderedDict(a=1),
        "random": random.Random(1).getstate(), "numpy": np.random.RandomState(1).get_state(), "float": np.float64(2.5),
        "torch": torch.Generator().manual_seed(1).get_state(), "text": "α", "tuple": ((1, True), {"b": b"\0\xff"})}


def check_same(read, expected):
    if isinstance(expected, torch.Tensor):
        values = read.read() if isinstance(read, StoredTensor) else read
        assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
        assert torch.equal(values, expected.detach())
    elif isinstance(expected, dict):
        assert list(read) == list(expected)
        for key, value in expected.items():
            check_same(read[key], value)
    elif isinstance(expected, list | tuple):
        assert isinstance(read, tuple if isinstance(expected, tuple) else list)
        assert len(read) == len(expected)
        for one, other in zip(read, expected, strict=True):
            check_same(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(read, expected)
    elif isinstance(expected, argparse.Namespace):
        check_same(vars(read), vars(expected))
    else:
        assert type(read) is type(expected)
        assert read == expected


def read_through(value):
    if isinstance(value, StoredTensor):
        value.read()
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            read_through(part)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_is_read_as_torch_reads_it(is_zip, protocol, tmp_path):
    path = tmp_path / "model_optim_rng.pt"
    torch.save(tree(), path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    check_same(read_torch_file(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_within_a_file_is_read(is_zip, tmp_path):
    path, outer = tmp_path / "x.pt", tmp_path / "x.distcp"
    torch.save(tree(), path, _use_new_zipfile_serialization=is_zip)
    outer.write_bytes(b"before" + path.read_bytes() + b"behind")
    check_same(read_torch_file(outer, 6, path.stat().st_size), tree_of(path))


def tree_of(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("is_zip", [True, False])
def test_boxes_of_tensors_are_read(is_zip, tmp_path):
    path = tmp_path / "x.pt"
    torch.save([MATRIX, MATRIX.t(), MATRIX[1:4, 2:5], MATRIX[2], MATRIX[::2, ::3], MATRIX[:, 4:5], MATRIX[:1].t(),
                MATRIX[:1, :1].t(), MATRIX.view(3, 2, 8).permute(2, 0, 1)], path, _use_new_zipfile_serialization=is_zip)
    for read, whole in zip(read_torch_file(path), tree_of(path), strict=True):
        for start, stop in ((0, 3), (1, 2), (2, 2)):
            box = tuple(slice(min(start, size), min(stop, size)) for size in whole.shape)
            part = read.pieces[0].read(box)
            assert part.is_contiguous()
            assert len(part.reshape(-1).view(torch.uint8)) == part.nbytes, "what writes it sees it as bytes"
            assert torch.equal(part, whole[box])


def test_what_is_written_is_read_by_torch_and_by_us(tmp_path):
    path = tmp_path / "model_optim_rng.pt"
    lazy = one_piece(MATRIX.shape, MATRIX.dtype, lambda box: MATRIX[box].clone())
    written = tree() | {"lazy": lazy}
    write_torch_file(path, written)
    check_same(tree_of(path), tree() | {"lazy": MATRIX})
    check_same(read_torch_file(path), tree_of(path))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        pickled = archive.read("model_optim_rng/data.pkl")
    assert pickled[:2] == b"\x80\x02"
    assert b"numpy._core" not in pickled  # which NumPy 1 lacks
    check_same(torch.load(path, weights_only=False, mmap=True)["model"], written["model"])


def test_large_records_are_written_in_the_wide_form(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_writing, "_ROOM", 100)
    path = tmp_path / "model_optim_rng.pt"
    write_torch_file(path, [MATRIX, MATRIX[0]])
    check_same(tree_of(path), [MATRIX, MATRIX[0]])
    check_same(read_torch_file(path), [MATRIX, MATRIX[0]])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_writing_and_reading_hold_one_tensor_at_a_time(tmp_path):
    path, size = tmp_path / "x.pt", 2**20
    block = one_piece((size,), torch.uint8, lambda box: torch.frombuffer(bytearray(size), dtype=torch.uint8))
    blocks = [block for _ in range(20)]
    tracemalloc.start()
    try:
        write_torch_file(path, blocks)
        read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()


class DynamicLossScaler:
    def __init__(self):
        self.cur_scale, self.cur_hysteresis = 65536.0, 1


@pytest.mark.parametrize("is_zip", [True, False])
def test_known_classes_are_inert_records(is_zip, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    torch.save({"loss_scaler": DynamicLossScaler()}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"it asks for .*DynamicLossScaler"):
        read_torch_file(path)
    path.write_bytes(renamed(path, f"{__name__}\nDynamic", "megatron.fp16.loss_scaler\nDynamic"))
    scaler = read_torch_file(path)["loss_scaler"]
    assert isinstance(scaler, PickledObject)
    assert scaler.name == "megatron.fp16.loss_scaler.DynamicLossScaler"
    assert scaler.state == {"cur_scale": 65536.0, "cur_hysteresis": 1}


def renamed(path, old, new):
    """The file with another name in its pickle."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes().replace(old.encode(), new.encode())
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    return zipped({name: data.replace(old.encode(), new.encode()) for name, data in records.items()})


def zipped(records, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Evil:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def test_a_member_of_an_enumeration_is_read_however_its_python_pickled_it():
    kind = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    member, records = kind.TORCH_CONTIGUOUS_FORMAT, []
    for made in (Evil(kind, member.value), Evil(getattr, kind, member.name)):  # the second: Python 3.11.0 to 3.11.3
        for protocol in (2, 4):
            data = pickle.dumps(made, protocol)
            records.append(load_torch_pickle(io.BytesIO(data), len(data)))
    assert [record.name.rpartition(".")[2] for record in records] == ["_MEM_FORMAT_ENCODING"] * 4
    assert [record.arguments for record in records] == [(member.value,)] * 2 + [(member.name,)] * 2
    signal_by_name = load_torch_pickle(io.BytesIO(data := b"csignal\nSIGTERM\n."), len(data))
    assert (signal_by_name.name, signal_by_name.arguments) == ("signal.Signals", ("SIGTERM",))


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("evil", [
    Evil(os.system, "touch executed"), Evil(eval, "open('executed', 'w')"), Evil(exec, "open('executed', 'w')"),
    Evil(getattr, "x", "upper"), Evil(torch.load, "executed"), Evil(np.save, "executed", 1),
    Evil(torch.hub.load, "x"), Evil(__import__, "os")])
@pytest.mark.parametrize("place", ["args", "model", "optimizer", "random_rng_state", "alone"])
def test_planted_code_does_not_run_and_is_named(is_zip, evil, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    planted = tree()
    if place == "alone":
        planted = evil
    elif place == "args":
        planted["args"].lr = evil
    else:
        planted[place] = {"layers.0": [evil]}
    torch.save(planted, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"x\.pt: it asks for [\w.]+, .*nothing of it was run") as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def pickled_tensor(offset=b"K\0", shape=b"K\x02K\x02\x86", strides=b"K\x02K\x01\x86", storage=STORAGE):
    return (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides
            + b"\x89ccollections\nOrderedDict\n)RtR.")


def hostile():
    data = torch.arange(4.0).numpy().tobytes()
    good = {"x/data.pkl": pickled_tensor(), "x/data/0": data, "x/version": b"3"}
    yield "compressed", zipped(good, compression=zipfile.ZIP_DEFLATED), "is compressed"
    yield "no pickle", zipped({"x/data/0": data}), "not of torch.save"
    yield "path", zipped({"x/data.pkl": b"N.", "../../x": b""}), "has a path for a name"
    yield "root", zipped({"/x/data.pkl": b"N."}), "has a path for a name"
    yield "big-endian", zipped(good | {"x/byteorder": b"big"}), "another order of bytes"
    for name, tensor, message in (
            ("offset", pickled_tensor(offset=b"K\x01"), "more than its storage"),
            ("negative offset", pickled_tensor(offset=b"J\xff\xff\xff\xff"), "not its offset"),
            ("negative stride", pickled_tensor(strides=b"J\xff\xff\xff\xffK\x01\x86"), "not its offset"),
            ("stride", pickled_tensor(strides=b"K\x03K\x01\x86"), "more than its storage"),
            ("expanded", pickled_tensor(shape=b"J\0\0\0\x7fK\x02\x86", strides=b"K\0K\x01\x86"),
             "more than its storage"),
            ("dimensions", pickled_tensor(shape=b"K\x02\x85"), "not its offset"),
            ("sizes", pickled_tensor(shape=b"NK\x02\x86"), "not its offset"),
            ("numbers", pickled_tensor(storage=STORAGE.replace(b"K\x04t", b"K\x05t")), "whose record is of 16"),
            ("negative numbers", pickled_tensor(storage=STORAGE.replace(b"K\x04t", b"J\xff\xff\xff\xfft")),
             "not its type"),
            ("missing", pickled_tensor(storage=STORAGE.replace(b"\x000X", b"\x001X")), "not in the file"),
            ("no storage", pickled_tensor(storage=b"N"), "not known here|no storage"),
            ("view of a tensor", b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cargparse\nNamespace\nN)NtR.",
             "not known here"),
            ("persistent", b"\x80\x02K\x01Q.", "no storage"),
            ("memo", b"\x80\x02}r\xff\xff\xff\x7f0\x8e" + (2**40).to_bytes(8, "little") + b"x", "it |Error")):
        yield name, zipped(good | {"x/data.pkl": tensor}), message
    yield "twice", twice(good), "is there twice"
    yield "text", b"<html>not found</html>", "is a web page"
    yield "empty", b"", "is empty"
    yield "pickle", pickle.dumps({"a": 1}), "not a file of torch.save"


def twice(records):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for name, data in [*records.items(), ("x/data/0", b"1" * 16)]:
            archive.writestr(name, data)
    return buffer.getvalue()


def test_hostile_files_are_refused_in_one_line_and_little_memory(tmp_path):
    path = tmp_path / "x.pt"
    for name, content, message in hostile():
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=message) as caught:
                read_torch_file(path)
            assert tracemalloc.get_traced_memory()[1] < 2**22, name
        finally:
            tracemalloc.stop()
        assert "\n" not in str(caught.value), name
    path.write_bytes(zipped({"x/data.pkl": pickled_tensor(), "x/data/0": torch.arange(4.0).numpy().tobytes()}))
    assert read_torch_file(path).read().tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("is_zip", [True, False])
def test_damage_is_told_in_one_line_wherever_it_is(is_zip, tmp_path):
    path, generator = tmp_path / "x.pt", random.Random(1)
    torch.save(tree(), path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    for number in range(150):
        damaged = bytearray(content)
        if number % 2:
            damaged = damaged[:generator.randrange(len(damaged))]
        else:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read_through(read_torch_file(path))
            assert number % 2 == 0, "whatever is cut off is found"
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    path = tmp_path / "x.pt"
    torch.save([MATRIX], path)
    content = bytearray(path.read_bytes())
    content[content.index(MATRIX.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        read_torch_file(path)[0].read()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_is_passed_over_whichever_python_wrote_it(module):
    written = f"c{module}\nPosixPath\n(V/runs\ntR.".encode()  # Python 3.13 names the module by its inner name
    found = load_torch_pickle(io.BytesIO(written), len(written))
    assert (found.name, found.arguments) == (f"{module}.PosixPath", ("/runs",))
