"""What steps cost: `config`, `ratios` against plain fine-tuning."""
