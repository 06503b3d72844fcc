"""Progress bars: tqdm's, as a widget in a notebook that can show one."""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # of a notebook without ipywidgets, where text serves
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
