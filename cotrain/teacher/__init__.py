"""The teacher: a quantised causal language model that ranks candidates in one forward pass."""

import logging

# Before it is imported: bitsandbytes logs hints at import and in every int8 product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
