"""Distillation: what is known of the teacher (`teacher`), divergences (`kl`), the objective."""
