"""A small protein structure as a PDB and as an mmCIF file, written column by column without a library."""

import numpy as np

SEQUENCE = ("MET", "ALA", "GLY", "LEU", "MSE", "LYS", "VAL", "TRP", "SER", "GLY")  # of chain A; 1 and 6 are unresolved
LETTERS = "MAGLMKVWSG"
RESOLVED = [place for place in range(len(SEQUENCE)) if place not in (0, 5)]


def place_of(place, model=1):
    """The coordinates [3] of the residue at `place`, in Å, on a helix whose turns are in contact."""
    return np.round([6 * np.cos(place), 6 * np.sin(place), 1.1 * place + 100 * (model - 1)], 3)


def atoms(model=1):
    """The atoms of chain A: name, alternative location, residue, its place, coordinates, occupancy."""
    for place in RESOLVED:
        name, where = SEQUENCE[place], place_of(place, model)
        yield "N", "", name, place, where + 1, 1.0
        yield "CA", "", name, place, where if name == "GLY" else where + 2, 1.0
        if name == "LEU":  # two alternative locations; readers take the second, of higher occupancy
            yield "CB", "A", name, place, where + 3, 0.4
            yield "CB", "B", name, place, where, 0.6
        elif name != "GLY":
            yield "CB", "", name, place, where, 1.0


def pdb(has_sequence=True):
    """The PDB file: two models of chain A with a water; the first also has a chain B of three alanines."""
    lines = [f"SEQRES   1 A   10  {' '.join(SEQUENCE)}", "SEQRES   1 B    3  ALA ALA ALA"] if has_sequence else []
    for model in (1, 2):
        lines.append(f"MODEL     {model:4}")
        serial = 0
        for name, location, residue, place, (x, y, z), occupancy in atoms(model):
            serial += 1
            record = "HETATM" if residue == "MSE" else "ATOM  "
            lines.append(f"{record}{serial:5} {f' {name}':4}{location or ' '}{residue} A{place + 1:4}    {x:8.3f}"
                         f"{y:8.3f}{z:8.3f}{occupancy:6.2f}{0:6.2f}          {name[0]:>2}")
        lines.append(f"TER   {serial + 1:5}      GLY A  10")
        for place in range(3 if model == 1 else 0):
            for name in ("CA", "CB"):
                serial += 1
                lines.append(f"ATOM  {serial:5} {f' {name}':4} ALA B{place + 1:4}    {place:8.3f}{0:8.3f}{0:8.3f}"
                             f"{1:6.2f}{0:6.2f}           C")
        lines += ["TER", f"HETATM{serial + 9:5}  O   HOH A 101    {0:8.3f}{0:8.3f}{0:8.3f}{1:6.2f}{0:6.2f}           O",
                  "ENDMDL"]
    return "\n".join([*lines, "END", ""])


def mmcif():
    """The mmCIF file: chain A of both models.

    The authors' chain A is the file's chain B, and the authors number the residues from 101.
    """
    head = ["data_1ABC", "loop_", "_entity.id", "_entity.type", "1 polymer", "loop_", "_entity_poly.entity_id",
            "_entity_poly.type", "1 'polypeptide(L)'", "loop_", "_entity_poly_seq.entity_id", "_entity_poly_seq.num",
            "_entity_poly_seq.mon_id", *(f"1 {place} {name}" for place, name in enumerate(SEQUENCE, 1)), "loop_",
            "_struct_asym.id", "_struct_asym.entity_id", "B 1", "loop_"]
    columns = ("group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id "
               "label_seq_id Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv auth_seq_id auth_comp_id auth_asym_id "
               "auth_atom_id pdbx_PDB_model_num").split()
    rows = [f"ATOM {serial} {name[0]} {name} {location or '.'} {residue} B 1 {place + 1} {x} {y} {z} {occupancy} 0 "
            f"{place + 101} {residue} A {name} {model}" for model in (1, 2)
            for serial, (name, location, residue, place, (x, y, z), occupancy) in enumerate(atoms(model), 1)]
    return "\n".join([*head, *(f"_atom_site.{column}" for column in columns), *rows, "#", ""])
