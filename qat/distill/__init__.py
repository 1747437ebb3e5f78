"""Distillation: `teacher`, the student on a few tokens (`candidates`), `kl`, the objective."""
