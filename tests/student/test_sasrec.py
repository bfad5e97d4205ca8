"""The student equals a plain SASRec written with loops, and keeps what training relies on."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cotrain.data.batches import SequenceBatch, SequenceDataset, collate
from cotrain.student.sasrec import SASRec

NUM_ITEMS, MAX_LENGTH = 23, 12


@pytest.fixture
def model() -> SASRec:
    """Two layers, two heads, dropout on, and weights large enough that all of them matter."""
    torch.manual_seed(0)
    model = SASRec(NUM_ITEMS, hidden_size=8, num_layers=2, num_heads=2, max_length=MAX_LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        model.item_embedding.weight[0] = 0
    return model.eval()


def batch_of(*histories: list[int], cut: list[int] | None = None) -> SequenceBatch:
    """The training batch whose rows are these items; the last item of each is a target only."""
    longest = max(map(len, histories)) - 1
    inputs = [[0] * (longest + 1 - len(row)) + row[:-1] for row in histories]
    targets = [[0] * (longest + 1 - len(row)) + row[1:] for row in histories]
    return SequenceBatch(
        user_index=torch.arange(len(histories)),
        item_ids=torch.tensor(inputs),
        target_ids=torch.tensor(targets),
        cut=torch.tensor(cut or [longest - 1] * len(histories)),
        history=torch.tensor(inputs),
    )


def random_batch(lengths: list[int], seed: int = 0) -> SequenceBatch:
    rng = np.random.default_rng(seed)
    return batch_of(*(rng.integers(1, NUM_ITEMS + 1, length).tolist() for length in lengths))


# ---- the plain SASRec ---------------------------------------------------------------------------


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    spread = ((x - x.mean()) ** 2).mean()
    scaled = (x - x.mean()) / (spread + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain_states(items: list[int], weights: dict[str, Tensor], layers: int, heads: int) -> Tensor:
    """States of one sequence without padding, one position and one head at a time, in float64."""
    size = weights["item_embedding.weight"].shape[1]
    hidden = [
        weights["item_embedding.weight"][item] * math.sqrt(size)
        + weights["position_embedding.weight"][position]
        for position, item in enumerate(items)
    ]
    width = size // heads
    for layer in range(layers):
        block = f"blocks.{layer}."
        mixed = [linear(norm(x, weights, block + "attention_norm"), weights, block + "qkv")
                 for x in hidden]  # fmt: skip
        for position in range(len(items)):
            outputs = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                query = mixed[position][:size][part]
                scores = [
                    float(query @ mixed[earlier][size : 2 * size][part]) / math.sqrt(width)
                    for earlier in range(position + 1)
                ]
                shares = [math.exp(score - max(scores)) for score in scores]
                output = torch.zeros(width, dtype=torch.float64)
                for earlier in range(position + 1):
                    value = mixed[earlier][2 * size :][part]
                    output += shares[earlier] / sum(shares) * value
                outputs.append(output)
            attended = linear(torch.cat(outputs), weights, block + "attention_out")
            hidden[position] = hidden[position] + attended
        for position, x in enumerate(hidden):
            inner = gelu(linear(norm(x, weights, block + "ffn_norm"), weights, block + "ffn_in"))
            hidden[position] = x + linear(inner, weights, block + "ffn_out")
    return torch.stack([norm(x, weights, "final_norm") for x in hidden])


def doubles(model: SASRec) -> dict[str, Tensor]:
    return {name: value.double() for name, value in model.state_dict().items()}


def test_states_and_loss_equal_the_plain_sasrec(model):
    batch = random_batch([13, 2, 6, 9])
    output = model(batch)
    weights = doubles(model)
    items = weights["item_embedding.weight"]
    loss = 0.0
    for row in range(len(batch.item_ids)):
        real = batch.item_ids[row] != 0
        plain = plain_states(batch.item_ids[row][real].tolist(), weights, layers=2, heads=2)
        torch.testing.assert_close(output.states[row][real].double(), plain, atol=1e-5, rtol=0)
        for state, target in zip(plain, batch.target_ids[row][real].tolist(), strict=True):
            # Softmax over the items; index 0 is none.
            logits = [float(state @ items[item]) for item in range(1, NUM_ITEMS + 1)]
            total = sum(math.exp(logit - max(logits)) for logit in logits)
            loss -= logits[target - 1] - max(logits) - math.log(total)
    assert output.n_targets == 12 + 1 + 5 + 8
    assert output.loss_sum.item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("layers", "heads", "size"), [(1, 1, 4), (3, 4, 16)])
def test_other_shapes_equal_the_plain_sasrec(layers, heads, size):
    torch.manual_seed(1)
    model = SASRec(NUM_ITEMS, size, layers, heads, MAX_LENGTH).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    states = model.encode(torch.tensor([[3, 1, 4, 1, 5]]))[0]
    plain = plain_states([3, 1, 4, 1, 5], doubles(model), layers, heads)
    torch.testing.assert_close(states.double(), plain, atol=1e-5, rtol=0)


# ---- invariances --------------------------------------------------------------------------------


def test_the_future_does_not_change_the_past(model):
    batch = random_batch([13, 13, 8])
    states = model.encode(batch.item_ids)
    for position in range(batch.item_ids.shape[1]):
        changed = batch.item_ids.clone()
        after = changed[:, position + 1 :]
        changed[:, position + 1 :] = torch.where(after > 0, after % NUM_ITEMS + 1, 0)
        again = model.encode(changed)
        assert torch.equal(states[:, : position + 1], again[:, : position + 1])
        if position + 1 < states.shape[1]:
            assert not torch.allclose(states[:, position + 1], again[:, position + 1], atol=1e-3)


def test_every_past_item_counts(model):
    """The counterpart: a state that ignored its past would pass the test of causality."""
    items = torch.tensor([[3, 1, 4, 1, 5, 9]])
    states = model.encode(items)
    for position in range(6):
        changed = items.clone()
        changed[0, position] = 17
        moved = (model.encode(changed) - states)[0].abs().amax(1)
        assert (moved[position:] > 1e-4).all()


@pytest.mark.parametrize("padding", [1, 3, 6])
def test_more_padding_changes_no_state(model, padding):
    batch = random_batch([7, 3, 5])
    states = model.encode(batch.item_ids)
    wider = torch.cat([batch.item_ids.new_zeros(3, padding), batch.item_ids], 1)
    again = model.encode(wider)
    assert again.isfinite().all()
    real = batch.item_ids != 0
    torch.testing.assert_close(again[:, padding:][real], states[real], atol=1e-6, rtol=0)


def test_rows_do_not_see_each_other(model):
    batch = random_batch([13, 2, 6, 9])
    together = model(batch)
    for row in range(4):
        alone = model(batch_of([*batch.item_ids[row][batch.item_ids[row] != 0].tolist(),
                                int(batch.target_ids[row, -1])]))  # fmt: skip
        length = alone.states.shape[1]
        torch.testing.assert_close(together.states[row, -length:], alone.states[0],
                                   atol=1e-5, rtol=0)  # fmt: skip
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        model.encode(batch.item_ids[order]), together.states[order], atol=1e-6, rtol=0
    )


def test_user_state_is_the_state_at_the_cut(model):
    batch = batch_of([1, 2, 3, 4, 5], [6, 7, 8], cut=[1, 2])
    output = model(batch)
    assert torch.equal(output.user_state[0], output.states[0, 1])
    assert torch.equal(output.user_state[1], output.states[1, 2])


def test_dropout_is_drawn_in_training_only(model):
    items = random_batch([9, 9]).item_ids
    assert torch.equal(model.encode(items), model.encode(items))
    model.train()
    assert not torch.equal(model.encode(items), model.encode(items))
    model.dropout = 0.0
    for block in model.blocks:
        block.dropout = 0.0
    trained = model.encode(items)
    torch.testing.assert_close(trained, model.eval().encode(items), atol=1e-6, rtol=0)


# ---- the loss -----------------------------------------------------------------------------------


def test_padding_row_gets_no_gradient_and_every_item_does(model):
    model.train()
    model(random_batch([13, 2, 6, 9])).loss_sum.backward()
    gradient = model.item_embedding.weight.grad
    assert (gradient[0] == 0).all()
    # Tied: also an item that no row holds is pushed away from the states.
    assert (gradient[1:].abs().amax(1) > 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name != "position_embedding.weight":
            assert (parameter.grad != 0).any(), name


def test_loss_ignores_how_the_padding_looks(model):
    batch = batch_of([1, 2, 3, 4, 5], [6, 7, 8])
    alone = [model(batch_of(row)).loss_sum.item() for row in ([1, 2, 3, 4, 5], [6, 7, 8])]
    assert model(batch).loss_sum.item() == pytest.approx(sum(alone), rel=1e-5)
    with torch.no_grad():
        before = model(batch).loss_sum
        # Large enough to win every softmax that it took part in.
        model.item_embedding.weight[0] = 100.0
        assert model(batch).loss_sum == before


def test_loss_of_a_fresh_model_on_real_data_is_that_of_guessing(ml100k):
    dataset = SequenceDataset(ml100k, max_length=50, seed=0)
    torch.manual_seed(0)
    model = SASRec(ml100k.num_items, hidden_size=64, max_length=50)
    output = model(collate([dataset[user, 0] for user in dataset.users[:32].tolist()]))
    mean = output.loss_sum.item() / output.n_targets.item()
    # Logits of variance 64 × 0.02² add about half of that.
    assert mean == pytest.approx(math.log(1682), abs=0.05)


# ---- saving -------------------------------------------------------------------------------------


def test_save_and_load_keep_sizes_and_states(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    loaded = SASRec.from_pretrained(tmp_path).eval()
    assert (loaded.hidden_size, loaded.max_length, len(loaded.blocks)) == (8, MAX_LENGTH, 2)
    assert loaded.dropout == model.dropout
    items = random_batch([13, 4]).item_ids
    assert torch.equal(loaded.encode(items), model.encode(items))
