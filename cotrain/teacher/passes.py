"""Forward passes of a frozen decoder: last states only, a shared prefix computed once, and steps
with a cache for modes that write."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from cotrain.errors import TeacherError
from cotrain.teacher.backbone import Backbone
from cotrain.teacher.compiled import eager
from cotrain.teacher.cpu import _ATTENTION as BF16_ATTENTION
from cotrain.teacher.growing_cache import GrowingCache


class SharedPrefix(Cache):
    """Keys and values of the tokens that all prompts begin with: read by every row, never written.

    What a layer adds is used by that layer and forgotten, so a pass holds the keys of one layer at
    a time and not a cache.

    Args:
        filled: A cache after one pass over the prefix, one row.
    """

    def __init__(self, filled: DynamicCache):
        super().__init__(layers=list(filled.layers))
        layers = [layer for layer in filled.layers if isinstance(layer, DynamicLayer)]
        # Stacked: a compiled layer picks its own by a number, without being compiled anew for it.
        self.keys = torch.stack(
            [_filled(layer.keys) for layer in layers]
        )  # (layers, 1, heads, P, d)
        self.values = torch.stack([_filled(layer.values) for layer in layers])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Prefix and (B, heads, S, d) of the rows, joined: (B, heads, P + S, d)."""
        shape = (key_states.shape[0], -1, -1, -1)
        keys = torch.cat([self.keys[layer_idx].expand(shape), key_states], dim=2)
        return keys, torch.cat([self.values[layer_idx].expand(shape), value_states], dim=2)

    def copy_to(self, cache: GrowingCache, rows: int) -> None:
        """Begin the empty cache of rows that will be continued."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)


def _filled(states: Tensor | None) -> Tensor:
    if states is None:
        raise TypeError("a layer without keys")
    return states


class Passes:
    """One decoder and the prefix of its prompts.

    Args:
        backbone: The language model.
        prefix: Tokens that prompts begin with; empty: nothing is shared. Models whose layers keep
            something else than keys and values share nothing either.

    Attributes:
        computed_tokens: Tokens that went through the decoder, padding included.
    """

    def __init__(self, backbone: Backbone, prefix: Sequence[int] = ()):
        self.backbone = backbone
        self.prefix = list(prefix)
        self.computed_tokens = 0
        self._shared: tuple[str, SharedPrefix | None] | None = None

    @torch.no_grad()
    def last_states(self, prompts: Sequence[list[int]]) -> Tensor:
        """Last hidden state, after the final norm, at the last token of each prompt.

        Prompts are padded on the right: under causal attention nothing after a token can reach it,
        so no attention mask is needed. No cache is kept, and neither the states of other layers nor
        logits over the vocabulary are computed.

        Returns:
            (B, H) in the model's compute dtype.
        """
        # Behind a prefix attention needs a mask, which on a CPU with bf16 products costs more than
        # the prefix saves (4.9 against 5.2 rows/s for SmolLM2-135M, 106 of 620 tokens shared).
        backbone = self.backbone
        pays = backbone.device.type != "cpu" or backbone.compute != "bf16"
        shared = self.shared(prompts) if pays else None
        hidden = self._right_padded(prompts, shared)  # (B, S, H)
        skipped = len(self.prefix) if shared else 0
        last = torch.tensor([len(prompt) - skipped - 1 for prompt in prompts]).to(hidden.device)
        return hidden[torch.arange(len(prompts), device=hidden.device), last]

    @torch.no_grad()
    def mean_states(self, texts: Sequence[list[int]]) -> Tensor:
        """Mean of each text's states after the final norm, (B, H) float32; a text embedding."""
        hidden = self._right_padded(texts, None).float()
        lengths = torch.tensor([len(text) for text in texts], device=hidden.device)[:, None]
        real = torch.arange(hidden.shape[1], device=hidden.device) < lengths  # (B, T)
        return torch.einsum("bth,bt->bh", hidden, real.float()) / lengths

    def shared(self, prompts: Sequence[list[int]]) -> SharedPrefix | None:
        """The prefix, where all of these prompts begin with it and go on after it."""
        size = len(self.prefix)
        if not size or any(len(p) <= size or p[:size] != self.prefix for p in prompts):
            return None
        version = self.backbone.adapter_version
        if self._shared is None or self._shared[0] != version:
            self._shared = (version, self._compute_prefix())
        return self._shared[1]

    def _compute_prefix(self) -> SharedPrefix | None:
        # Without the model's settings every layer keeps everything, also where it will only ever
        # look back a window: the mask does the rest.
        if not self._keeps_keys_only():
            return None
        cache = DynamicCache()
        self._decode(torch.tensor([self.prefix]), cache=cache)
        layers = [layer for layer in cache.layers if type(layer) is DynamicLayer]
        lengths = {layer.get_seq_length() for layer in layers}
        if len(layers) != len(cache.layers) or lengths != {len(self.prefix)}:
            return None
        try:
            return SharedPrefix(cache)
        except (RuntimeError, TypeError):  # layers of several shapes
            return None

    def _keeps_keys_only(self) -> bool:
        kept = DynamicCache(config=self.backbone.model.config).layers
        return all(isinstance(layer, DynamicLayer) for layer in kept)

    def check_steps(self) -> None:
        """Whether prompts can be continued by what their pass has left.

        Raises:
            TeacherError: The model keeps something else than keys and values, as recurrent ones do.
        """
        if not self._keeps_keys_only():
            raise TeacherError(
                f"teacher.model {self.backbone.name!r} keeps something else of a prompt than keys "
                "and values, so prompts of several lengths cannot be continued at once. Set "
                "teacher.mode direct, teacher.decision_position predict and teacher.identifiers "
                "letters, or choose another teacher.model."
            )

    def _right_padded(self, prompts: Sequence[list[int]], shared: SharedPrefix | None) -> Tensor:
        """(B, S, H) of the tokens after the prefix; meaningless at padding."""
        skipped = len(self.prefix) if shared else 0
        ids = padded([prompt[skipped:] for prompt in prompts])
        if shared is None:
            return self._decode(ids)
        positions = torch.arange(skipped, skipped + ids.shape[1])[None]
        return self._decode(ids, cache=shared, positions=positions)

    def _decode(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, S, H) last hidden states of (B, S) ids."""
        self.computed_tokens += ids.numel()
        decoder, device = self.backbone.decoder, self.backbone.device
        options: dict[str, object] = {}
        if positions is not None:
            options["position_ids"] = to_device(positions.expand(ids.shape), device)
        if mask is not None:
            options["attention_mask"] = to_device(mask, device)
        # A cache that grows has one shape a step; only whole prompts are worth compiled code.
        growing = cache is not None and not isinstance(cache, SharedPrefix)
        with eager() if growing and self.backbone.compiled else contextlib.nullcontext():
            return decoder(
                input_ids=to_device(ids, device),
                past_key_values=cache,
                use_cache=cache is not None,
                **options,
            ).last_hidden_state


class Steps:
    """Prompts that are continued token by token, with their cache.

    Rows stand padded on the left, or, behind a shared prefix, with the padding after it, so that
    all of them end at the same place and slide over the same window.

    Args:
        passes: The decoder.
        prompts: B prompts.
        further: Tokens that will be added at most.

    Attributes:
        state: (B, H) last hidden state at the last token.
    """

    @torch.no_grad()
    def __init__(self, passes: Passes, prompts: Sequence[list[int]], further: int):
        passes.check_steps()
        self.passes = passes
        shared = passes.shared(prompts)
        config = passes.backbone.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window and max(map(len, prompts)) + further > window:
            shared = None  # padding in the middle would make what lies before it look farther away
        skipped = len(passes.prefix) if shared else 0
        ids = padded([prompt[skipped:] for prompt in prompts], left=True)
        capacity = skipped + ids.shape[1] + further
        # In bf16 where attention would round them to it, each time anew.
        rounded = config._attn_implementation == BF16_ATTENTION
        self.cache = GrowingCache(capacity, torch.bfloat16 if rounded else None)
        if shared is not None:
            shared.copy_to(self.cache, len(prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        real = torch.arange(ids.shape[1]) >= ids.shape[1] + skipped - lengths[:, None]
        positions = (skipped + real.long().cumsum(1) - 1).clamp(min=0)
        mask = torch.ones(len(prompts), capacity, dtype=torch.bool)
        mask[:, skipped : skipped + ids.shape[1]] = real
        device = passes.backbone.device
        self.mask, self.lengths = to_device(mask, device), to_device(lengths, device)
        self.state = self._decode(ids, positions)

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        """Add (B, n) tokens to the rows; returns the new `state`."""
        count = tokens.shape[1]
        positions = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        self.state = self._decode(tokens, positions)
        self.lengths = self.lengths + count
        return self.state

    def _decode(self, tokens: Tensor, positions: Tensor) -> Tensor:
        mask = self.mask[:, : self.cache.get_seq_length() + tokens.shape[1]]
        hidden = self.passes._decode(tokens, cache=self.cache, positions=positions, mask=mask)
        return hidden[:, -1].clone()  # not a view that would hold the states of whole prompts

    def peek(self, tokens: Tensor) -> Tensor:
        """(B, H) state after (B, n) tokens, which are taken back again."""
        state, count = self.state, tokens.shape[1]
        after = self.advance(tokens)
        self.cache.crop(-count)
        self.lengths, self.state = self.lengths - count, state
        return after

    @torch.no_grad()
    def read(self, suffixes: Sequence[list[int]]) -> Tensor:
        """(B, H) state at the end of each row's suffix of one token or more, which are taken back
        again."""
        tokens = padded(suffixes)
        count = tokens.shape[1]
        positions = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        mask = self.mask[:, : self.cache.get_seq_length() + count]
        hidden = self.passes._decode(tokens, cache=self.cache, positions=positions, mask=mask)
        self.cache.crop(-count)
        # What stands after a row's own end it cannot see.
        last = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=hidden.device)
        return hidden[torch.arange(len(suffixes), device=hidden.device), last]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, (n,) indices on the CPU; one may be named several times."""
        rows = rows.to(self.state.device)
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths, self.state = self.mask[rows], self.lengths[rows], self.state[rows]


def padded(rows: Sequence[Sequence[int]], left: bool = False) -> Tensor:
    """(B, longest) int64 with 0 behind the rows, or before them."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for line, row in zip(ids, rows, strict=True):
        values = torch.tensor(row, dtype=torch.int64)
        if left:
            line[len(line) - len(row) :] = values
        else:
            line[: len(row)] = values
    return ids


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Moved to a GPU from page-locked memory, while it still works on what came before."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.contiguous().pin_memory().to(device, non_blocking=True)
    return values.to(device)
