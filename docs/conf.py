"""How Sphinx makes pages of this folder: `python -m sphinx -W docs docs/_build/html`, from the checkout, offline.

The Markdown here is written to be read on GitHub too. What `generate.py` makes (flags, file formats, two pages that lie
elsewhere) comes from the code at each build and is not in git. Equations become MathML, which browsers draw themselves.
"""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

_DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(_DOCS.parent), str(_DOCS)]

from generate import ELSEWHERE, write_pages  # noqa: E402

project = "Protein language models, pretrained on packed proteins"
author = "its contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"  # as docstrings mean `this`
autodoc_member_order = "bysource"
autodoc_typehints = "description"
html_theme = "furo"
html_title = "Protein language models"
html_copy_source = False
smartquotes = False
html_math_renderer = "mathml"
linkcheck_timeout = 20
linkcheck_workers = 4


def setup(app: Any) -> None:
    """What Sphinx calls: generates pages, points links to what lies elsewhere at them, draws equations."""
    write_pages(_DOCS.parent, _DOCS / "generated")
    app.connect("source-read", _point_at_pages)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


def _point_at_pages(_app: Any, _name: str, source: list[str]) -> None:
    for path, page in ELSEWHERE.items():
        source[0] = source[0].replace(f"](../{path}", f"](generated/{page}.md")


def _inline(writer: Any, node: nodes.math) -> None:
    _draw(writer, node, is_block=False)


def _block(writer: Any, node: nodes.math_block) -> None:
    _draw(writer, node, is_block=True)


def _draw(writer: Any, node: nodes.Element, is_block: bool) -> None:
    # The theme lets elements scroll, which puts bars beside equations that need none.
    writer.body.append(tex2mathml(node.astext(), is_block).replace("<math ", '<math style="overflow: visible" ', 1))
    raise nodes.SkipNode
