"""Keys and values of rows that are continued, written into memory that was set aside for all of
them; a cache that is joined anew for each token copies everything for every token."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingCache(Cache):
    """Keys and values of every token of every layer, also where a layer looks back a window only:
    the mask does the rest.

    Args:
        capacity: Tokens of a row at most, padding included.
        dtype: To keep them in; None: as they are computed.
    """

    def __init__(self, capacity: int, dtype: torch.dtype | None = None):
        super().__init__(layer_class_to_replicate=lambda: _Layer(capacity, dtype))  # pyright: ignore


class _Layer(DynamicLayer):
    """One layer's; `keys` and `values` are the filled part, (B, heads, S, d)."""

    def __init__(self, capacity: int, dtype: torch.dtype | None):
        super().__init__()
        self._capacity, self._dtype = capacity, dtype
        self._memory: list[Tensor] = []  # of keys and of values, (B, heads, capacity, d)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Add (B, heads, n, d); returns all of them, which stay valid until the next change."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.is_initialized:
            self._memory = [self._set_aside(states) for states in (key_states, value_states)]
            self.is_initialized = True
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, start:end] = states
        return self._filled_to(end)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last −n tokens."""
        if self.is_initialized:
            self._filled_to(self.get_seq_length() + tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; one may be named several times."""
        if not self.is_initialized:
            return
        filled = self.get_seq_length()
        for place, memory in enumerate(self._memory):
            self._memory[place] = memory.new_empty((len(indices), *memory.shape[1:]))
            torch.index_select(
                memory[:, :, :filled], 0, indices, out=self._memory[place][:, :, :filled]
            )
        self._filled_to(filled)

    def _set_aside(self, states: Tensor) -> Tensor:
        rows, heads, _, width = states.shape
        dtype = self._dtype or states.dtype
        return states.new_empty((rows, heads, self._capacity, width), dtype=dtype)

    def _filled_to(self, end: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        return self.keys, self.values
