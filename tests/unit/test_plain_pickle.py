"""Pickles of unknown origin: plain data is read, all else is refused, and none can exhaust memory or time."""

import collections
import os
import pickle
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.corpus.indexed import open_indexed
from megatron.plain_pickle import load_plain_pickle


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_that_would_run_code_are_refused(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (Evil(), {"primary": Evil()}, [getattr], np.array([Evil()], dtype=object), open_indexed):
        with pytest.raises(pickle.UnpicklingError, match="which is not plain data|cannot be"):
            load_plain_pickle(pickle.dumps(value, protocol=protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_read(protocol):
    value = {"primary": "MK", "n": 3, "x": 1.5, "b": b"\x00\xff", "t": (1, None, True), "s": {1}, "big": 10**30,
             "f": np.float32(2.5), "i": np.int64(7)}
    assert load_plain_pickle(pickle.dumps(value, protocol=protocol)) == value
    value = collections.OrderedDict([("a", [frozenset({3}), b""]), (2, set())])
    assert load_plain_pickle(pickle.dumps(value, protocol=protocol)) == value
    for array in (np.arange(6).reshape(2, 3), np.array(["ab", "c"]), np.zeros(0), np.array([{"a": 1}], dtype=object),
                  np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(3).astype(">i4"), np.array(2.5)):
        pickled = pickle.dumps(array, protocol=protocol)
        loaded = load_plain_pickle(pickled)
        assert loaded.dtype == pickle.loads(pickled).dtype
        assert loaded.shape == array.shape
        assert loaded.tolist() == array.tolist()


@pytest.mark.parametrize("data", [
    b"cbuiltins\nbytes\n(I10000000000000\ntR.", b"cnumpy\nndarray\n((I10000000000000\nttR.",
    b"c_codecs\nencode\n(V\nVrot13\ntR)R.", b"cbuiltins\ngetattr\n.", b"cnumpy.core.multiarray\nfromfile\n."])
def test_allowed_names_cannot_be_turned_to_other_ends(data):
    with pytest.raises(pickle.UnpicklingError):
        load_plain_pickle(data)


def test_a_short_pickle_cannot_fill_the_memory():
    assert load_plain_pickle(b"\x80\x02}r\xff\xff\xff\x7f.") == {}
    tracemalloc.start()
    try:
        bytes_of_its_own = b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"."
        copies = b"\x80\x04]c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + b"a" * 65536 + b"q\x01U\x06latin1q\x02000("
        for data in (bytes_of_its_own, copies + b"h\x00h\x01h\x02\x86R" * 1000 + b"e."):
            with pytest.raises(pickle.UnpicklingError):
                load_plain_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_a_short_pickle_cannot_take_for_ever():
    """The hash of nested tuples that share their parts takes twice as long with each level."""
    nested = b")" + b"2\x86" * 60
    for data in (b"}" + nested + b"K\x01s.", b"}(" + nested + b"K\x01u.", b"(" + nested + b"K\x01d.",
                 b"\x8f(" + nested + b"\x90.", b"(" + nested + b"\x91.", b"cbuiltins\nset\n](" + nested + b"e\x85R.",
                 b"ccollections\nOrderedDict\n](" + nested + b"K\x01\x86e\x85R.",
                 b"c_codecs\nencode\n}(" + nested + b"K\x01ub."):
        with pytest.raises(pickle.UnpicklingError, match="tuple as a key"):
            load_plain_pickle(b"\x80\x04" + data)


def test_a_pickle_cannot_make_addresses_of_numbers():
    """A structured kind that says it holds objects, but not that they are counted: its data would be taken for them."""
    kind = (b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8K\x00K\x01tR(K\x03X\x01\x00\x00\x00|NX\x01\x00\x00\x00a\x85}"
            b"X\x01\x00\x00\x00acnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tRK\x00\x86sK\x08K\x01K\x00tb")
    scalar = b"cnumpy.core.multiarray\nscalar\n" + kind + b"C\x08AAAAAAAA\x86R"
    objects = np.array([None], dtype=object)
    of_other_size = pickle.dumps(objects, protocol=2).replace(b"K\x01\x85", b"K\x7f\x85", 1)
    for data in (b"\x80\x03}" + scalar + b"K\x01s.", b"\x80\x03" + kind + b".",
                 b"\x80\x03" + kind.replace(b"V8", b"i8") + b".", of_other_size,
                 pickle.dumps(np.arange(3), protocol=2).replace(b"i8", b"O8")):
        with pytest.raises(pickle.UnpicklingError):
            load_plain_pickle(data)


@given(data=st.binary(max_size=200), seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_damaged_pickle_is_an_unpickling_error_or_plain_data(data, seed):
    generator = random.Random(seed)
    mutated = bytearray(pickle.dumps({"primary": "MKV", "a": np.arange(3), "n": [1, (2, 3)]}, protocol=seed % 5))
    for _ in range(generator.randrange(1, 6)):
        mutated[generator.randrange(len(mutated))] = generator.randrange(256)
    for candidate in (data, bytes(mutated)):
        try:
            load_plain_pickle(candidate)
        except pickle.UnpicklingError as error:
            assert str(error)
