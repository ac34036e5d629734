"""The second detector: what many residuals say together that none says alone (docs/explanation/statistics.md)."""
