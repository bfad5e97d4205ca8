"""The answer in words, which claim no more than the numbers: a difference is called one only where
it holds for other users, and a finding only where it holds for other seeds as well."""

from dataclasses import dataclass, field
from typing import Any

from cotrain.evaluation.formats import number, p_text, percent, signed

LEVEL = 0.05
# Fewer test users than this make differences between seeds as large as most lifts.
_FEW_USERS = 5000
_FEW_SEEDS = 5

STANDINGS = {
    "better": "better",
    "better_here": "better with these seeds",
    "open": "not distinguishable",
    "worse_here": "worse with these seeds",
    "worse": "worse",
}


@dataclass(frozen=True)
class Verdict:
    """The answer. `tone` is good, bad or neutral.

    Attributes:
        tone: How it is coloured.
        headline: The answer in a sentence, without its full stop.
        measure: What the numbers of the findings are.
        findings: A sentence on every arm.
        limits: What these runs cannot tell.
    """

    tone: str
    headline: str
    measure: str
    findings: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def standing(against: dict[str, Any]) -> str:
    """Key of `STANDINGS` for one arm's difference on the primary metric.

    The corrected p-value and the interval, both over users, must agree that there is a difference.
    Where the interval over seeds does not exclude zero as well, it is one of these seeds only.
    """
    low, high = against["ci95"]
    seeds = against["over_seeds"]["ci95"]
    if against["p_holm"] >= LEVEL or low <= 0 <= high:
        return "open"
    side = "better" if low > 0 else "worse"
    holds = seeds is not None and (seeds[0] > 0 if side == "better" else seeds[1] < 0)
    return side if holds else f"{side}_here"


def verdict(result: dict[str, Any]) -> Verdict:
    """What a comparison says.

    Args:
        result: As `summarise` returns it.
    """
    arms, chosen = result["arms"], result["chosen"]
    compared = {name: of for name, of in arms.items() if of["against_baseline"]}
    if not compared:
        return Verdict(
            "neutral",
            "Nothing can be compared",
            "",
            [],
            _absent(result) or ["There is one arm only."],
        )
    tone, headline = _headline(result, chosen)
    findings = [
        _finding(name, result["baseline"], _primary(of, result)) for name, of in compared.items()
    ]
    if result.get("live_offline"):
        findings.append(_live_offline(result["live_offline"]))
    findings += [_frugal(name, of["frugal"]) for name, of in compared.items() if of.get("frugal")]
    several = f", p corrected for {len(compared)} arms (Holm)" if len(compared) > 1 else ""
    return Verdict(
        tone, headline,
        f"Differences in NDCG@10 on test to {result['baseline']}, with 95 % intervals{several}:",
        findings, _limits(result, compared),
    )  # fmt: skip


def _headline(result: dict[str, Any], chosen: str) -> tuple[str, str]:
    baseline = result["baseline"]
    if chosen == baseline:
        better = [
            name
            for name, of in result["arms"].items()
            if of["against_baseline"] and standing(_primary(of, result)) == "better"
        ]
        if better:
            return "neutral", (
                f"Validation prefers {baseline}, though on test {' and '.join(better)} did better: "
                "chosen honestly, nothing was gained"
            )
        return "neutral", f"On validation, no arm is ahead of {baseline}"
    against = _primary(result["arms"][chosen], result)
    return {
        "better": ("good", f"{chosen}, the best on validation, beats {baseline} on test"),
        "better_here": (
            "neutral",
            f"{chosen}, the best on validation, is ahead of {baseline} on test with the seeds that "
            "were run; whether it is with others stays open",
        ),
        "open": (
            "neutral",
            f"{chosen}, the best on validation, cannot be told apart from {baseline} on test",
        ),
        "worse_here": (
            "bad",
            f"{chosen}, the best on validation, is behind {baseline} on test with the seeds that "
            "were run",
        ),
        "worse": ("bad", f"{chosen}, the best on validation, is worse than {baseline} on test"),
    }[standing(against)]


def _finding(name: str, baseline: str, against: dict[str, Any]) -> str:
    words = {
        "better": f"is better than {baseline}",
        "better_here": f"is ahead of {baseline} with these seeds, and perhaps only with these",
        "open": f"cannot be told apart from {baseline}",
        "worse_here": f"is behind {baseline} with these seeds, and perhaps only with these",
        "worse": f"is worse than {baseline}",
    }
    low, high = against["ci95"]
    relative = f" ({signed(100 * against['relative'], 1)} %)" if against["relative"] else ""
    text = (
        f"{name} {words[standing(against)]}: {signed(against['absolute'])}{relative}, over users "
        f"{signed(low)} to {signed(high)}, {p_text(against['p_holm'])}"
    )
    seeds = against["over_seeds"]
    if seeds["ci95"] is None:
        return f"{text}; one seed."
    low, high = seeds["ci95"]
    values = list(seeds["by_seed"].values())
    return (
        f"{text}; over seeds {signed(low)} to {signed(high)}, single ones {signed(min(values))} to "
        f"{signed(max(values))}."
    )


def _live_offline(against: dict[str, Any]) -> str:
    low, high = against["ci95"]
    told = low > 0 or high < 0
    words = ("beats" if low > 0 else "is behind") if told else "cannot be told apart from"
    text = (
        f"Asking live {words} asking once after the warm-up (ranking less offline): "
        f"{signed(against['absolute'])}, over users {signed(low)} to {signed(high)}, "
        f"{p_text(against['p_value'])}"
    )
    seeds = against["over_seeds"]["ci95"]
    if seeds is not None:
        text += f"; over seeds {signed(seeds[0])} to {signed(seeds[1])}"
    rows = against["rows"]
    return f"{text}; with {number(round(rows['live']))} and {number(round(rows['offline']))} rows."


def _frugal(name: str, found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    kept = found["kept"]
    gain = "" if kept is None else f" and keeps {percent(kept, 0)} of what that gains"
    text = (
        f"{name} asks {percent(found['rows'], 0)} of the rows of {found['of']}{gain}: "
        f"{signed(found['absolute'])} to it, over users {signed(low)} to {signed(high)}"
    )
    seeds = found["over_seeds"]["ci95"]
    if seeds is None:
        return f"{text}."
    return f"{text}, over seeds {signed(seeds[0])} to {signed(seeds[1])}."


def _limits(result: dict[str, Any], compared: dict[str, Any]) -> list[str]:
    limits = _absent(result)
    counts = {
        name: len(_primary(of, result)["over_seeds"]["by_seed"]) for name, of in compared.items()
    }
    once = [name for name, count in counts.items() if count == 1]
    several = [count for count in counts.values() if count > 1]
    if once:
        limits.append(
            f"With one seed ({', '.join(once)}), what teaching changed cannot be told from what "
            "another seed would have changed. Run at least three."
        )
    if several and min(several) < _FEW_SEEDS:
        limits.append(
            f"{min(several)} seeds: their interval is wide, and an arm that does not clear it may "
            "still be better or worse. More seeds can be added to this comparison."
        )
    widest = max(
        (_primary(of, result)["ci95"][1] - _primary(of, result)["ci95"][0]) / 2
        for of in compared.values()
    )
    base = result["arms"][result["baseline"]]["test"][result["metric"]]["mean"]
    share = f", {percent(widest / base, 0)} of {result['baseline']}'s NDCG@10," if base else ""
    limits.append(
        f"With these users, differences below about {number(widest)}{share} cannot be seen."
    )
    users = max(_primary(of, result)["users"] for of in compared.values())
    if users < _FEW_USERS:
        limits.append(
            f"{users:,} test users are few: between seeds NDCG@10 moves by several percent on such "
            "data. Use it as a smoke test."
        )
    limits.append(
        "Every arm has the weights that the recipe gives; none was tuned for it. An arm that gains "
        "nothing here may gain with others."
    )
    return limits + _unequal(result)


def _unequal(result: dict[str, Any]) -> list[str]:
    terms, lines = result["equal_terms"], []
    if terms["early"]:
        lines.append(
            f"In {_times(terms['early'])}, {result['baseline']} was best before the epoch in which "
            "the others begin to learn something else, and these choose among later epochs only: "
            "that favours it. Compare them with their own twins, and raise regularisation or lower "
            "train.epochs."
        )
    if terms["differ"]:
        lines.append(
            f"In {_times(terms['differ'])}, a twin trained on cross-entropy alone ranks test items "
            f"otherwise than {result['baseline']} of its seed. Runs on this machine do not repeat "
            "exactly, so part of every difference is chance."
        )
    if result["added"]:
        lines.append(
            f"Added after results had been seen: {', '.join(result['added'])}. p-values read "
            "repeatedly are lower than they should be."
        )
    return lines


def _absent(result: dict[str, Any]) -> list[str]:
    failed = result["failed"]
    if not failed:
        return []
    names = ", ".join(f"{one['arm']} with seed {one['seed']}" for one in failed)
    count = "One run" if len(failed) == 1 else f"{len(failed)} runs"
    return [
        f"{count} failed, missing here: {names}. Means over other seeds do not compare with each "
        "other; differences are of the seeds that both arms have. The same command tries again."
    ]


def _primary(arm: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return arm["against_baseline"][result["metric"]]


def _times(count: int) -> str:
    return "one run" if count == 1 else f"{count} runs"
