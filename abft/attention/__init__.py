"""Checked attention: O = softmax(Q Kᵀ · scale) V and its gradients, block of queries by block of queries."""
