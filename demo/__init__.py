"""The demonstration: a real model answers questions and a small one learns, while faults strike their products."""
