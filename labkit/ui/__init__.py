"""What students see: the panel, its figures and its static twin. The only place that imports ipywidgets or plotly.

- ``words``    sentences about a measurement (plain strings)
- ``plots``    small plotly figures; ``svg`` draws the same figures where no script runs
- ``table``    a small table
- ``view``     a method's three linked figures, sentence and table: a pure function of measurements
- ``static``   shows a view or a figure in notebooks, and on pages that run no script
- ``worker``   runs the newest job in the background;  ``stage`` puts figures on the page;  ``controls`` are the sliders
- ``panel``    a method's knobs and what they do;  ``explore`` the same for any pure function
- ``lessons``  the views of single notebooks, a module each
"""

from __future__ import annotations

import importlib

from labkit import colab, install

colab.setup()  # once; elsewhere than on Colab it does nothing


def need(module: str):
    """Import an optional module, or raise an ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise install.missing(module.split(".")[0], "lab") from error
