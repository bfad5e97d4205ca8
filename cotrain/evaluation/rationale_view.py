"""What the report's page says of rationales: what there was, how it taught, and whether the reasons
that are found for recommendations fit them."""

from typing import Any

from cotrain.evaluation.formats import NONE, number, percent, signed

Row = tuple[str, str, str]

_FORMS = {
    "cosine": "1 − cos(W_r u, v): each user state is pulled to its own rationale",
    "gram": "user states are to be as similar to each other as their rationales are",
}
_TARGETS = {
    "plain": "as the encoder gave them",
    "centred": "without their mean",
    "whitened": "without their mean, all directions equally wide",
}


def rationale_rows(rationales: dict[str, Any]) -> list[Row]:
    """(label, value, how to read it) of everything that is known; empty without rationales."""
    if not rationales:
        return []
    get = rationales.get
    form, targets, weight = get("form"), get("targets"), get("lambda_rdr")
    rows = [
        ("Interactions with a rationale", number(get("rows")),
         "each teaches in every epoch after the warm-up in which its user's sequence reaches it"),
        ("Share of the training interactions", percent(get("share_of_positions")), ""),
        ("Users, items", f"{number(get('users'))}, {number(get('items'))}", "that have one"),
        ("Encoder", f"{get('encoder', NONE)}, {number(get('dimension'))} dimensions", ""),
        ("Weight", number(weight), "λ_rdr; at 0 the student is left alone and only W_r learns"),
        ("Form", str(form or NONE), _FORMS.get(str(form), "")),
        ("Vectors", str(targets or NONE), _TARGETS.get(str(targets), "")),
        *_agreement_rows("student", get("agreement")),
        *_agreement_rows("control", get("agreement")),
    ]  # fmt: skip
    return [row for row in rows if row[1] != NONE]


def _agreement_rows(name: str, agreement: dict[str, Any] | None) -> list[Row]:
    found = (agreement or {}).get(name)
    if not found:
        return []
    rows = []
    labels = {"nearest": "Nearest reason", "shown": "Reason shown for an item"}
    for key, label in labels.items():
        one = found[key]
        low, high = one["ci95"]
        rows.append(
            (
                f"{label}, {name}",
                f"{percent(one['share'])} against {percent(one['random'])}",
                "its source item shares a category with the recommended one; against a random "
                f"reason: {signed(100 * one['difference'], 1)} points, 95 % interval "
                f"{signed(100 * low, 1)} to {signed(100 * high, 1)}, over {number(one['users'])} "
                "test users",
            )
        )
    return rows
