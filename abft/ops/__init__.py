"""Operators: the checked product as torch sees it."""
