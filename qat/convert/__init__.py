"""Students out of models and of other students: `config`, `init_student`, `q4_to_q2`."""
