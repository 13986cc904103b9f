"""The site that `make docs` makes of docs/*.md, of README, CONTRIBUTING and CHANGELOG, and of the docstrings."""

import re
from pathlib import Path

import tomllib
from docutils import nodes
from sphinx.addnodes import pending_xref

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
INCLUDED = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}

project = "rgd_ext"
version = release = PROJECT["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
templates_path = ["_templates"]
nitpicky = True
nitpick_ignore_regex = [
    (r"py:\w+", r"(?!rgd_ext\b).*"),  # types of other packages
    ("py:class", r"rgd_ext\.(contributions\..*|layers\..*|diffusion\.sources\..*|metric\.stats\.(Grams|Known))"),
]

myst_heading_anchors = 4  # with the slugs of GitHub

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
smartquotes_action = "D"  # dashes only: x'' is a derivative
toc_object_entries_show_parents = "hide"

copybutton_exclude = ".linenos, .gp, .go"  # prompts and output of doctests

html_theme = "pydata_sphinx_theme"
html_title = f"{project} {release}"
html_sidebars = {"**": ["navigation"]}
html_copy_source = False
html_use_index = html_domain_indices = False  # the page about the API is one
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_theme_options = {
    "github_url": REPOSITORY,
    "navbar_center": [],  # all pages are in the sidebar
    "article_header_start": [],
    "secondary_sidebar_items": ["page-toc"],
    "footer_end": [],
}


def resolve_links(app, docname, source):
    """Expand files of the root, and let relative links lead to pages of the site, else to files of the repository."""
    page = Path(app.env.doc2path(docname))

    def expand(include):
        file = page.parent / include[1]
        app.env.note_dependency(str(file))
        return redirected(file.read_text(), file.parent)

    source[0] = re.sub(r"^```\{include\} (.*)\n```$", expand, redirected(source[0], page.parent), flags=re.MULTILINE)


def redirected(text, folder):
    """The text of a page in the folder, with its links as those of a page of the site."""

    def redirect(link):
        file = (folder / link[1]).resolve()
        if not file.is_file():  # brackets in code
            return link[0]
        path = str(file.relative_to(ROOT))
        if path in INCLUDED:
            return f"](/{INCLUDED[path]}.md"
        return f"](/{path.removeprefix('docs/')}" if path.startswith("docs/") else f"]({REPOSITORY}/blob/main/{path}"

    return re.sub(r"\]\(([^)#:]+)", redirect, text)


def translate(app, what, name, obj, options, lines):
    """Translate docstrings from the Markdown that they are to reStructuredText.

    Names of classes and of what is in them become links, and other code in backticks stays code, as doctests do and
    *emphasis*. The bars of norms, |g|, and the stars of shapes, (B, *shape), are no markup.
    """

    def rewritten(match):
        kept, code, suffix = match.groups()
        if not code:
            return kept or f"\\{match[0]}"
        link = ":py:obj:" if re.fullmatch(r"(rgd_ext(?=\.)|[A-Z]\w+)(\.\w+)*", code) else ""
        ticks = "`" if link else "``"
        return f"{link}{ticks}{code}{ticks}" + ("\\ " + suffix if suffix else "")

    markup = r"(>>>[\s\S]*?(?:\n\s*\n|$)|(?<!\w)\*\w[^*]*[\w.]\*(?!\w))|`([^`]+)`(\w?)|[|*]"
    lines[:] = re.sub(markup, rewritten, "\n".join(lines)).split("\n")


def link_names(app, doctree):
    """Let names of the package in the prose lead to the reference."""
    for literal in doctree.findall(nodes.literal):
        name = re.match(r"rgd_ext(\.\w+)+(?=\(|$)", literal.astext())
        if name and isinstance(literal.parent, nodes.paragraph | nodes.entry | nodes.strong):
            reference = pending_xref("", refdomain="py", reftype="obj", reftarget=name[0], refdoc=app.env.docname)
            literal.replace_self(reference)
            reference += literal


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", resolve_links)
    app.connect("autodoc-process-docstring", translate, priority=400)  # before napoleon, which writes markup
    app.connect("doctree-read", link_names)
