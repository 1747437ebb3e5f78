"""Models and their layers: `load`, `linear`, `surgery`, `checkpoint`, `packaged`.

`architectures` names the shapes of new ones.
"""
