"""The site: `sphinx-build -W -b html docs build/docs` with `pip install '.[docs]'`."""

import re
from pathlib import Path

project = "Paceline"
author = "the Paceline authors"
release = version = re.search(
    r'^version = "(.+)"', (Path(__file__).parent.parent / "pyproject.toml").read_text(), re.M
)[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Paceline"
html_theme_options = {"source_repository": "", "navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_use_ivar = True
suppress_warnings = ["myst.header", "ref.python"]
