"""JSON objects become rows, those that Python reads, however the file is cut into blocks."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotrain.data.readers import sources
from cotrain.data.readers.json_lines import JsonLines
from cotrain.data.readers.sources import Source

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)
TEXTS = st.lists(st.text(max_size=3), max_size=3)
OBJECTS = st.fixed_dictionaries(
    {},
    optional={"a": SCALARS, "c": NESTED, "l": st.one_of(TEXTS, st.lists(TEXTS), st.none(), NESTED)},
)
JSON_LINES = st.lists(
    st.one_of(
        OBJECTS.map(json.dumps),
        st.lists(TEXTS).map(lambda lists: json.dumps({"a": "x", "l": lists})),
        NESTED.map(json.dumps),
        st.sampled_from(["", "{", "{'a': 1}", '{"a": NaN}', "}{", '{"a": 1} x', "{'a': x}"]),
    ),
    min_size=1,
    max_size=8,
)


def flattened(value) -> list[str]:
    if isinstance(value, list):
        return [text for part in value for text in flattened(part)]
    if isinstance(value, str):
        return [value]
    return [] if value is None else [json.dumps(value, ensure_ascii=False)]


@SETTINGS
@given(lines=JSON_LINES)
def test_json_rows_are_those_of_python_and_do_not_depend_on_the_blocks(
    lines, tmp_path, monkeypatch
):
    path = tmp_path / "t.jsonl"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    monkeypatch.setattr("cotrain.data.readers.lines.Malformed.check", lambda *_: None)
    outcomes = []
    for block_bytes in (1 << 20, 1):
        monkeypatch.setattr(sources, "BLOCK_BYTES", block_bytes)
        reader = JsonLines(["a"], ["l"])
        rows = [row for frame in reader.frames(Source(path)) for row in frame.rows()]
        outcomes.append((rows, reader.lines, reader.blank, reader.malformed.counts))
        assert len(rows) + reader.malformed.counts.total() == reader.lines
    assert outcomes[0] == outcomes[1]
    for number, text, texts in outcomes[0][0]:
        if lines[number - 1].startswith('{"'):
            value = json.loads(lines[number - 1])
            assert [text] == (flattened(value.get("a")) or [None])
            assert texts == (None if value.get("l") is None else flattened(value["l"]))
