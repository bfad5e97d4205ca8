"""The teacher: a quantised causal language model that ranks candidates in one forward pass."""
