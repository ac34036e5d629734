"""Measured evidence: campaigns, floors and costs. ``python -m bench`` lists them; results lie in bench/results/."""
