"""Lists the proteins in the rows of steps that went wrong, in a file below --save."""

from pathlib import Path

from megatron.checkpoint.places import SPIKES
from megatron.data.rows.members import members_of
from megatron.files import write_text
from megatron.train.setup.run import Run

_COLUMNS = ("row", "corpus", "document", "name", "residues")


def write_suspects(run: Run, step: int, rows: range) -> str:
    """Rank 0 writes the proteins of `rows` to SAVE/spikes/step_N.tsv; returns where they are, as the end of a log line.

    `rows`: positions in the order of training. If the file cannot be written, the returned text says so.
    """
    samples = [run.state.sample_at(position) for position in rows]
    said = f"; its rows are {samples[0]} to {samples[-1]}"
    if run.config.checkpoint.save is None:
        return said
    path = Path(run.config.checkpoint.save) / SPIKES / f"step_{step:07d}.tsv"
    if run.mesh.world.rank == 0:
        lines = ["\t".join(_COLUMNS), *("\t".join(map(str, (member.sample, member.prefix, member.document, member.name,
                                                            member.num_residues)))
                                        for member in members_of(run.data.train, samples))]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            return f"{said}; their proteins could not be written to {path} ({error.strerror or error})"
    return f"{said}, whose proteins are in {path}"
