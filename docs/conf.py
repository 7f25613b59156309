"""How the documentation site is built from these pages, README and the docstrings: `make docs`."""

import re
import sys
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the copy beside these pages is described, not one that is installed

import moelora  # noqa: E402

project = "moelora"
author = "The moelora contributors"
version = release = moelora.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["requirements.txt"]

# The pages are read on GitHub too: its anchors, and links between files of the repository.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
highlight_language = "none"
smartquotes_action = "qe"  # no dashes, which it would make of the two before an option

# Docstrings are in Google's style, with Markdown's `code`.
default_role = "literal"
napoleon_numpy_docstring = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# A docstring's link to a name of ours has to lead somewhere; types of signatures need not, nor do names of others.
nitpicky = True
nitpick_ignore_regex = [(r"py:(?!obj).*", ".*"), ("py:obj", r"(?!moelora\.).*")]

html_theme = "furo"
pygments_dark_style = "a11y-dark"
html_title = "moelora"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

PAGES_OF_FILES = {
    "CHANGELOG.md": "/project/changelog.md",
    "CONTRIBUTING.md": "/project/contributing.md",
    "SECURITY.md": "/project/security.md",
}
"""The pages that show files from outside this folder."""


def for_the_site(text: str) -> str:
    """A page's text: links to files outside this folder lead to the pages that show them, and links that have the name
    of a file for their text get the page's title for it."""
    for name, page in PAGES_OF_FILES.items():
        text = re.sub(rf"\]\((\.\./)?{re.escape(name)}\)", f"]({page})", text)
    text = re.sub(r"\]\((?:\.\./)?benchmarks/results/([\w-]+)/\w+\.md\)", r"](/project/results.md#\1)", text)
    return re.sub(r"\[(?:docs/)?([\w-]+\.md)\]\(((?:docs/)?\1(?:#[\w-]+)?)\)", r"[](\2)", text)


def on_page(app, docname, content):
    content[0] = for_the_site(content[0])


def on_included_file(app, path, docname, content):
    content[0] = for_the_site(content[0])


def on_docstring(app, what, name, obj, options, lines):
    """Make links of the names and pages that docstrings write as [`moelora.experts.grow`] and docs/maths.md."""
    for i, line in enumerate(lines):
        line = re.sub(r"\[`(\w+)`\]", r":py:obj:`.\1`", line)  # by its last name
        line = re.sub(r"\[`(~?[\w.]+)`\]", r":py:obj:`\1`", line)
        lines[i] = re.sub(r"\bdocs/([\w-]+)\.md", r":doc:`/\1`", line)


def on_doctree(app, doctree):
    """Put a colon, as docstrings do, where Sphinx puts two dashes: between the name and the meaning of a parameter."""
    for text in [text for text in doctree.findall(nodes.Text) if text == " -- "]:
        text.parent.replace(text, nodes.Text(": "))


def setup(app):
    app.connect("source-read", on_page)
    app.connect("include-read", on_included_file)
    app.connect("autodoc-process-docstring", on_docstring, priority=400)  # before napoleon
    app.connect("doctree-read", on_doctree)
