"""Backends: three ways to compute a product and the evidence that it is right."""
