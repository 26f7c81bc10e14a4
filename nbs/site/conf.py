"""The site, as Sphinx reads it; `make docs` lays the pages out (build_site.py) and calls it.

Why Sphinx with MyST-NB and not Material for MkDocs with mkdocs-jupyter, which the issue names first: in December 2026
MkDocs 1 has no maintainer, MkDocs 2 has no plugins, and Material for MkDocs ends on 5 May 2027 (its own release notes,
9.8.1); its successor Zensical is before 1.0 and reads no notebooks. Sphinx 9, MyST-Parser 5 (2026) and the PyData theme
0.24 (2026) are released several times a year, and Sphinx gives what a reference of two thousand functions needs: an
index of names, links to them, a search without a server. MyST-NB 1.4 shows stored outputs without a kernel.
The PyData theme and not Furo, whose last release is a year old: rooms stand in its header, one room's notebooks at the
side; NumPy's, pandas' and SciPy's readers know it.

MathJax comes from the package django-static-mathjax (MathJax 3.2.2 as its authors publish it; of Django nothing is
needed), Mermaid from mermaidx: both are pinned in constraints.txt and become files of the site, so that equations and
diagrams need no network."""

from build_site import settings

cfg = settings()
project = cfg["lib_name"]
version = release = cfg["version"]
author = cfg["author"]
copyright = cfg["copyright"]

extensions = ["myst_nb", "sphinx.ext.mathjax"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_extra", "**_attachments/*.md"]
language = "en"
smartquotes = False  # --help is not –help

# Notebooks are shown as they were committed: nothing is executed, and widgets are shown by their stills.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("*", "application/vnd.jupyter.widget-view+json", None)]
nb_merge_streams = True
nb_code_prompt_show = "Imports and checks"  # cells that nbdev hides are folded
nb_code_prompt_hide = "Imports and checks"
highlight_language = "text"  # of fences that name none
myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath", "fieldlist", "strikethrough"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_links_external_new_tab = False

# One parameter a line where a signature is long; a module's page lists its functions at the side.
maximum_signature_line_length = 70
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
suppress_warnings = ["myst.header"]  # a notebook may go from # to ###

# Equations: one file of the site, whose letters are paths: no fonts to fetch.
mathjax_path = "mathjax.js"
mathjax3_config = {"svg": {"fontCache": "local", "scale": 0.92}, "options": {"enableMenu": False}}

html_theme = "pydata_sphinx_theme"
html_title = project
html_baseurl = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"
html_static_path = ["static"]  # and what build_site.py takes out of packages
html_favicon = "static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = ["tables.js", "diagrams.js"]
html_sidebars = {page: [] for page in ("index", "paper_figures/**", "CONTRIBUTING", "CHANGELOG", "zsad_nb/**")}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": project},
    "icon_links": [{"name": "Repository", "url": cfg["git_url"], "icon": "fa-brands fa-git-alt"}],
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "navigation_depth": 3,
    "show_nav_level": 1,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "search_bar_text": "Search notebooks and functions",
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
