"""Distillation of a student: `config`, `trainable`, `schedule`, `step`, `state`, `loop`."""
