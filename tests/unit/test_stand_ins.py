"""Files that are empty, pointers of Git LFS or saved web pages are told for what they are, wherever they stand."""

import pytest

from megatron.checkpoint.convert.formats import FORMATS, read_as
from megatron.errors import CheckpointError
from megatron.infer.pretrained import load_pretrained
from tests.megatron_files import write_original

CONTENTS = {
    "is empty; copy or download it again": b"",
    "is a pointer of Git LFS, and not what it points to; run git lfs pull there":
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1000\n",
    "is a web page, and not the file": b"\n<!DOCTYPE html><html><body>Sign in</body></html>"}


def refused(path, message):
    for load in (lambda: load_pretrained(str(path)), lambda: read_as("auto", path, None)):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("message", CONTENTS)
def test_a_ranks_file_or_one_of_its_own_is_told_for_what_it_is(message, tmp_path):
    place = write_original(tmp_path / "run", tensor=2)
    for rank in ("01", "00"):  # the first alone says of which format the others are
        (place / f"mp_rank_{rank}" / "model_optim_rng.pt").write_bytes(CONTENTS[message])
        refused(tmp_path / "run", message)
        refused(place, message)
    (tmp_path / "esm2_t6.pt").write_bytes(CONTENTS[message])
    refused(tmp_path / "esm2_t6.pt", message)
    (tmp_path / "run").rename(tmp_path.parent / f"{tmp_path.name}-run")
    refused(tmp_path, message)


@pytest.fixture
def distributed(tmp_path):
    write_original(tmp_path / "original", with_optimizer=False)
    return FORMATS["megatron-core-dist"].write(FORMATS["megatron-v2"].read(tmp_path / "original"), tmp_path / "run")


@pytest.mark.parametrize("file", ["metadata.json", ".metadata", "__0_0.distcp", "common.pt"])
@pytest.mark.parametrize("message", CONTENTS)
def test_a_file_of_torch_dist_is_told_for_what_it_is(message, file, distributed):
    (distributed / file).write_bytes(CONTENTS[message])
    refused(distributed, message)
    refused(distributed.parent, message)


def test_a_missing_metadata_json_is_asked_for(distributed):
    (distributed / "metadata.json").unlink()
    refused(distributed, "metadata.json cannot be read (No such file or directory); copy it as well")
    refused(distributed.parent, "metadata.json cannot be read")
