"""Distillation of a student: `config`, `trainable`, `schedule`, `step`, `state`, `end_to_end`."""
