"""Sphinx's configuration. ``make docs`` builds the site into build/docs, without a network."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in place, installed or not

import stn_triton

project = "stn_triton"
author = "the stn_triton authors"
version = release = stn_triton.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["README.md"]

# Docstrings are Google's form. Arguments of a class are in its __init__, where ``help`` shows them too.
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# A link that leads nowhere within the site is an error. Names of others are not ours to find.
nitpicky = True
_OTHERS = r"(torch|matplotlib|collections|typing|abc|contextlib|numbers)\..*"
_TYPES = r"(Tensor|Any|Sequence|Literal|Callable|Iterator|bool|str|int|float|tuple|list|dict|None)"
_BUILT_IN = r"(Type|Value|Import|Runtime)Error|Exception"
_INNER = r".*\.(Block|_Regression)|device|dtype|nn\.(Module|Sequential)"
nitpick_ignore_regex = [(r"py:.*", pattern) for pattern in (_OTHERS, _TYPES, _BUILT_IN, _INNER)]
suppress_warnings = ["myst.header"]  # pages that are parts of others begin below the first heading

html_theme = "furo"
html_title = f"stn_triton {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options: dict[str, Any] = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#0b5a8f", "color-brand-content": "#0b5a8f"},
    "dark_css_variables": {"color-brand-primary": "#6fc0f0", "color-brand-content": "#6fc0f0"},
}


def _link_to_pytorch(app: Any, env: Any, node: Any, content: Any) -> Any:
    """PyTorch's functions and modules, at PyTorch's own pages: no inventory is fetched for them."""
    from docutils import nodes

    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not re.match(r"torch\.(nn|func|compiler|export|utils)\.", target):
        return None
    page = f"https://docs.pytorch.org/docs/stable/generated/{target}.html"
    return nodes.reference("", "", content, refuri=page, internal=False)


def _escape_stars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``(N, C, *size)`` is a shape, not the beginning of an emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=\w+\))", r"\*", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _escape_stars)
    app.connect("missing-reference", _link_to_pytorch)
