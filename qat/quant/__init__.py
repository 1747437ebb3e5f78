"""Formats and fits: `spec` of a tensor, `plan` of a model, `quantized_tensor`, `fit`, `hessian`."""
