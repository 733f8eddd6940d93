"""Converts FASTA files to loose JSON, one protein per line.

    python protein_tools/fasta2json.py INPUT [INPUT …] OUTPUT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.data.sources.json_lines import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main("fasta", "Write the proteins of FASTA files as loose JSON."))
