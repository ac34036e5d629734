"""Passes over host memory, compiled from C at first use: judgements, panels, fingerprints. Torch does the same in more passes."""
