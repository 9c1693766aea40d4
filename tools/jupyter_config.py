"""Settings of `make lab`: a notebook is cleaned when it is saved, as the checks want it."""
from nbdev.clean import clean_nb


def clean_before_saving(model, **_):
    "Remove execution counts and metadata from a notebook that Jupyter is about to save; outputs stay."
    if model["type"] == "notebook" and model["content"]["nbformat"] == 4:
        clean_nb(model["content"])


c = get_config()  # noqa: F821  (Jupyter runs this file and provides it)
c.ContentsManager.pre_save_hook = clean_before_saving
