"""Settings of the site, which `make docs` builds."""

import sys
from pathlib import Path

import pyro_flowvi

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_extensions"))

project = "pyro_flowvi"
author = "The pyro_flowvi authors"
release = version = pyro_flowvi.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "api_pages",
    "citations",
    "repository_files",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

# Pages and notebooks.  The outputs of a notebook are those that it was saved with.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The reference.
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries = False

# Every reference has to lead somewhere, apart from those to other packages, and types in signatures that are
# no public names.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|pyro|numpy|np|scipy|sklearn|matplotlib|xarray|arviz|collections|os|pathlib|typing|types)\b.*",
    ),
    (r"py:.*", r"pyro_flowvi\.(.*\.)?_.*"),
    (
        r"py:(class|exc)",
        r"pyro_flowvi\.transforms\.compose\.Chain|pyro_flowvi\.diagnostics\.probes\.Effort|SuperLU|NotFittedError",
    ),
]
suppress_warnings = ["config.cache"]  # of the function that templates call

html_theme = "furo"
html_title = f"pyro_flowvi {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
linkcheck_timeout = 20
