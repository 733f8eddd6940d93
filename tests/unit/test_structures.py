"""Chains in PDB and mmCIF files agree with what one reads off the same lines by hand."""

import gzip
import json
import sys

import numpy as np
import pytest
import torch

from megatron.errors import ConfigError, DataError
from megatron.infer.contacts.chains import Chain, structures_of
from megatron.infer.contacts.structures import read_chains
from tests.structure_files import LETTERS, RESOLVED, SEQUENCE, mmcif, pdb, place_of

gemmi = pytest.importorskip("gemmi", reason="gemmi is not installed")

def by_hand():
    """C-beta atoms of the chain, C-alpha of its glycines."""
    where = np.array([place_of(place) for place in range(len(SEQUENCE))])
    return np.where(np.isin(np.arange(len(SEQUENCE)), RESOLVED)[:, None], where, np.nan)


@pytest.mark.parametrize(("name", "text"), [("1abc.pdb", pdb()), ("1abc.ent", pdb()), ("1abc.cif", mmcif()),
                                            ("1abc.cif.gz", mmcif()), ("1abc.PDB", pdb())])
def test_a_chain_has_every_residue_of_its_sequence_and_the_beta_atoms_of_the_first_model(name, text, tmp_path):
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    chain = read_chains([f"{file}:A"])[0]
    assert (chain.name, chain.sequence) == ("1abc_A", LETTERS)
    np.testing.assert_allclose(chain.atoms_r3.numpy(), by_hand(), atol=1e-3)


def test_contacts_are_those_of_the_definition(tmp_path):
    (tmp_path / "1abc.cif").write_text(mmcif())
    pairs, where = read_chains([str(tmp_path)])[0].pairs(), by_hand()
    found = dict(zip(zip(pairs.first_p.tolist(), pairs.second_p.tolist(), strict=True), pairs.touches_p.tolist(),
                     strict=True))
    assert found == {(first, second): bool(np.sqrt(((where[first] - where[second])**2).sum()) < 8)
                     for first in RESOLVED for second in RESOLVED if second - first >= 6}
    assert set(found.values()) == {True, False}


def test_a_file_without_a_sequence_has_the_residues_that_are_resolved(tmp_path):
    (tmp_path / "x.pdb").write_text(pdb(has_sequence=False))
    chain = read_chains([f"{tmp_path / 'x.pdb'}:A"])[0]
    assert chain.sequence == "".join(LETTERS[place] for place in RESOLVED)
    np.testing.assert_allclose(chain.atoms_r3.numpy(), by_hand()[RESOLVED], atol=1e-3)


def test_a_folder_has_the_protein_chains_of_all_its_structures(tmp_path):
    (tmp_path / "1abc.pdb").write_text(pdb())
    (tmp_path / "2xyz.cif").write_text(mmcif())
    (tmp_path / "more.jsonl").write_text(json.dumps({"id": "3jsn_Q", "seq": "MK", "ca": [[1, 2, 3], None]}) + "\n")
    (tmp_path / "notes.txt").write_text("no structure")
    chains = read_chains([str(tmp_path)])
    assert [(chain.name, len(chain.sequence)) for chain in chains] == [
        ("1abc_A", 10), ("1abc_B", 3), ("2xyz_A", 10), ("3jsn_Q", 2)]
    assert chains[3].atoms_r3[0].tolist() == [1, 2, 3] and chains[3].atoms_r3[1].isnan().all()
    assert [chain.name for chain in read_chains([f"{tmp_path / '1abc.pdb'}:B,A"])] == ["1abc_B", "1abc_A"]


@pytest.mark.parametrize(("name", "text", "chains", "message"), [
    ("x.pdb", pdb(), ":C", "x.pdb: has no protein chain C; it has A, B"),
    ("x.pdb", "", "", "x.pdb: holds no protein chain"),
    ("x.cif", "", "", "x.cif: holds no protein chain"),
    ("x.cif", "data_x\nloop_\n_atom_site.id\n1 2\n", "", "x.cif: "),
    ("x.cif", "nothing of the kind", "", "x.cif: cannot be read as a structure"),
    ("x.txt", pdb(), "", "x.txt: is no structure by its name"),
    ("x.jsonl", "", "", "x.jsonl: holds no protein chain"),
    ("x.jsonl", '{"seq": "MK"}', "", "x.jsonl: line 1: damaged, or of another form (no 'ca')"),
    ("x.jsonl", '\n{"seq": "MK", "ca": [[1, 2, 3]]}', "", "line 2: .* 2 residues, and C-alpha atoms of 1"),
    ("x.jsonl", '{"seq": ', "", "x.jsonl: line 1: damaged"),
    ("x.jsonl", "[]", "", "x.jsonl: line 1: damaged"),
    ("x.jsonl.gz", "not packed", "", "x.jsonl.gz: cannot be read"),
    ("x.jsonl", '{"seq": "M", "ca": [null], "id": 1}\n' * 2, "", "1 is the name of two chains"),
])
def test_what_holds_no_such_chain_is_refused_in_one_line(name, text, chains, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_chains([f"{tmp_path / name}{chains}"])
    assert all(part in str(caught.value) for part in message.split(" .* ")) and "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path):
    for word in ("no.pdb", "no.jsonl", "no.cif:A"):
        with pytest.raises(DataError, match="cannot be read .No such file"):
            read_chains([str(tmp_path / word)])
    with pytest.raises(DataError, match="holds no .pdb, .ent"):
        read_chains([str(tmp_path)])


def test_without_gemmi_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "x.pdb").write_text(pdb())
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(ConfigError, match="pip install gemmi"):
        read_chains([str(tmp_path / "x.pdb")])


def chain(name="1abc_A", sequence="MKV"):
    return Chain(name, sequence, torch.zeros(len(sequence), 3))


def test_a_chain_is_the_structure_of_the_protein_of_its_name_or_of_the_only_one():
    proteins = {"1abc_A": "MKV", "other": "MM"}
    assert list(structures_of(proteins, [chain(), chain("2xyz_A")])) == ["1abc_A"]
    assert structures_of({"mine": "MKV"}, [chain()])["mine"].name == "1abc_A"
    assert structures_of(proteins, []) == {}
    with pytest.raises(DataError, match="no structure has the name of a protein: the first are 2xyz_A and 1abc_A"):
        structures_of(proteins, [chain("2xyz_A")])


@pytest.mark.parametrize(("sequence", "where"), [("MRV", "residue 2 is K there and R here"),
                                                 ("MKVV", "it has 3 residues there and 4 here"),
                                                 ("MK", "it has 3 residues there and 2 here")])
def test_a_structure_of_another_sequence_is_refused_and_it_is_said_where(sequence, where):
    with pytest.raises(DataError, match=f"the structure 1abc_A is not of mine: {where}"):
        structures_of({"mine": sequence}, [chain()])
