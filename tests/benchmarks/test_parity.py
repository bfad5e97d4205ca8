"""The parity table: of every family, next to nothing, and the same words."""

import pytest

from cotrain.benchmarks import parity
from cotrain.benchmarks.settings import ParitySettings


@pytest.mark.parametrize("family", parity.FAMILIES)
def test_the_engine_says_of_every_family_what_generate_says(family: str):
    found = parity.measure(family, seed=7)
    gaps = {key: value for key, value in found.items() if key.endswith(("_state", "_logits"))}
    assert len(gaps) == 5
    assert max(gaps.values()) < 1e-5, gaps
    assert found["greedy"] == 1


def test_the_table_has_a_line_for_each_family(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    few = {name: parity.FAMILIES[name] for name in ("llama", "gemma2")}
    monkeypatch.setattr(parity, "FAMILIES", few)
    result = parity.run(ParitySettings(seeds=2))
    assert [line["family"] for line in result["families"]] == ["llama", "gemma2"]
    for line, printed in zip(
        result["families"], capsys.readouterr().out.splitlines()[-2:], strict=True
    ):
        assert printed.startswith(line["family"])
        assert printed.endswith("100%")
        assert line["direct_state"] == max(
            parity.measure(line["family"], seed)["direct_state"] for seed in (0, 1)
        )
