"""Distillation of a student: `config`, `trainable`, `schedule`, `step`, `state`, `loop`.

`pretraining` gives the same step and loop a new model and its text.
"""
