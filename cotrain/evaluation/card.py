"""What a run's report says on the model card of what it ships."""

from collections.abc import Mapping
from typing import Any

from cotrain.errors import CheckpointError
from cotrain.evaluation.report import verdict

# Terms of the data sets that are known by name; of others only their owner can speak.
_DATA_TERMS = {
    "ml-": "MovieLens data belong to GroupLens and are for research use; see "
    "grouplens.org/datasets.",
    "amazon-": "Amazon reviews were published for research by J. McAuley, UCSD; ask there before "
    "other uses.",
}
_PROTOCOLS = {
    "leave-one-out": "of each user the last item is held out for test, the one before it for "
    "validation",
    "time": "what users took after two moments that hold for all of them is held out",
}


def card_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Fills the model card from a report.

    Args:
        report: Of a finished run, or what is to become its report.json.

    Returns:
        The `model_card_kwargs` of `Recommender.save_pretrained`.

    Raises:
        CheckpointError: It lacks what every report of a run has.
    """
    try:
        return _facts(report)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"The report is not one of a finished run: {type(error).__name__} {str(error)[:200]}. "
            "Expected report.json as scripts/train_online.py wrote it."
        ) from error


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    data, shipped = report["dataset"], report["shipped"]
    found = verdict(dict(report))
    others = [name for name in ("student", "control") if name != shipped and report.get(name)]
    results = {
        name: {split: report[name][split] for split in ("test", "validation")}
        for name in (shipped, *others)
    }
    metrics = results[shipped]["test"]
    users = data["evaluated_users"]
    return {
        "dataset_name": plain(data["name"]),
        "data": [
            f"{data['users']:,} users, {data['items']:,} items, {data['interactions']:,} "
            "interactions.",
            *map(plain, data["notes"]),
        ],
        "protocol": f"Split {data['split']}: {_PROTOCOLS[data['split']]}. The held-out item is "
        f"ranked among all {data['items']:,} items, the user's history left out; "
        f"{users['validation']:,} users on validation, {users['test']:,} on test. The epoch was "
        "chosen on validation, test was computed once.",
        "shipped": shipped,
        "results": [
            (f"{name} on {split}", {metric: float(values[metric]) for metric in metrics})
            for name, of_splits in results.items()
            for split, values in of_splits.items()
        ],
        "metrics": {metric: float(value) for metric, value in metrics.items()},
        "lift": f"{found.headline}. {found.detail}",
        "taught_by": _taught_by(report),
        "terms": _terms(report),
        "warnings": [plain(warning) for warning in report.get("warnings") or []],
        "seed": report["seed"],
    }


def _taught_by(report: Mapping[str, Any]) -> str:
    teacher, rationales = report.get("teacher"), report.get("rationales")
    parts = []
    if teacher:
        adapter = f" with the adapter {plain(teacher['adapter'])}" if teacher["adapter"] else ""
        how = teacher["quantization"] or f"by {teacher['mode']} of texts"
        parts.append(
            f"{plain(teacher['model'])}{adapter}, {how}, ranked "
            f"{teacher['rows_asked']:,} lists of {teacher['num_candidates']} candidates "
            f"({teacher['rows_valid']:,} valid) while it was trained"
        )
    if rationales and rationales["lambda_rdr"]:
        parts.append(f"{rationales['rows']:,} rationales taught it")
    return "; ".join(parts) or "nobody; it learned from the data alone"


def _terms(report: Mapping[str, Any]) -> list[str]:
    """Licence notes. What has to be known of somebody else's work is said, and not decided."""
    name = report["dataset"]["name"]
    known = [terms for start, terms in _DATA_TERMS.items() if name.startswith(start)]
    notes = known or [
        f"The data ({plain(name)}): their owner's terms hold for what was learned from them, and "
        "for the titles in items.parquet."
    ]
    if report.get("teacher"):
        notes.append(
            f"The teacher ({plain(report['teacher']['model'])}) is not part of this model; see its "
            "licence for what it says of models that learn from its output."
        )
    return [*notes, "cotrain itself is under Apache-2.0, which says nothing about these weights."]


def plain(text: Any) -> str:
    """Text from elsewhere as one line that Markdown does not read as markup."""
    line = " ".join(str(text).split())
    for sign in "\\`*_[]|":
        line = line.replace(sign, "\\" + sign)
    return line.replace("<", "&lt;")[:500]
