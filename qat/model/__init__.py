"""Models and their layers: `load`, `linear`, `surgery`, `checkpoint`, `packaged`."""
