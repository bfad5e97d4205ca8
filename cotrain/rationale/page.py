"""What came out of the writing, for people: counts, and ten samples to read."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cotrain.data.interactions import InteractionData
from cotrain.files import write_whole
from cotrain.rationale.checks import FLAGS
from cotrain.rationale.records import Rationale

_SAMPLES = 5


@dataclass
class Summary:
    """Counts over many rationales, and a few of them drawn at random; in bounded memory.

    Attributes:
        rows: Rationales.
        clean: Those without a flag.
        flags: How many have each flag.
        tokens, with_tokens, logprob_sum, with_logprob: Sums over those that tell, and how many do.
        users: Who have one.
        texts: How many different texts there are.
        samples: Up to five clean and five flagged ones.
    """

    rows: int = 0
    clean: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    with_tokens: int = 0
    logprob_sum: float = 0.0
    with_logprob: int = 0
    users: set[int | str] = field(default_factory=set)
    texts: set[int] = field(default_factory=set)
    samples: dict[str, list[Rationale]] = field(
        default_factory=lambda: {"clean": [], "flagged": []}
    )

    @classmethod
    def of(cls, rationales: Iterable[Rationale], seed: int = 0) -> "Summary":
        """Count them; the same rationales and seed give the same samples."""
        summary, draw = cls(), random.Random(seed)
        for rationale in rationales:
            summary._add(rationale, draw)
        return summary

    def _add(self, rationale: Rationale, draw: random.Random) -> None:
        self.rows += 1
        self.clean += not rationale.flags
        self.flags.update(rationale.flags)
        if rationale.tokens is not None:
            self.tokens += rationale.tokens
            self.with_tokens += 1
        if rationale.logprob is not None:
            self.logprob_sum += rationale.logprob
            self.with_logprob += 1
        self.users.add(rationale.user_id)
        self.texts.add(hash(rationale.rationale))
        kind = "flagged" if rationale.flags else "clean"
        seen = self.rows - self.clean if rationale.flags else self.clean
        kept = self.samples[kind]
        if len(kept) < _SAMPLES:
            kept.append(rationale)
        elif (place := draw.randrange(seen)) < _SAMPLES:
            kept[place] = rationale

    def as_report(self) -> dict[str, Any]:
        """The counts as JSON."""
        rows = max(1, self.rows)
        return {
            "rows": self.rows,
            "users": len(self.users),
            "different_texts": len(self.texts),
            "clean": self.clean,
            "clean_share": self.clean / rows,
            "flags": {name: self.flags[name] for name in FLAGS},
            "tokens": self.tokens,
            "mean_tokens": self.tokens / self.with_tokens if self.with_tokens else None,
            "mean_logprob": self.logprob_sum / self.with_logprob if self.with_logprob else None,
        }


def write_page(
    facts: dict[str, Any],
    strata: Sequence[tuple[str, int, int]],
    summary: Summary,
    data: InteractionData,
    history_length: int,
    folder: Path,
) -> Path:
    """Write `report.json` and a self-contained `rationales.html`.

    Args:
        facts: What was asked, by label.
        strata: Name, interactions and chosen ones of each.
        summary: Counts and samples.
        data: Gives titles.
        history_length: Titles that a question showed.
        folder: Of the rationales.

    Returns:
        Path of the page.
    """
    report = {"asked": facts, "strata": strata, **summary.as_report()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    users = {user: index for index, user in enumerate(data.user_ids)}
    samples = [
        _shown(rationale, data, users[rationale.user_id], history_length)
        for kind in ("clean", "flagged")
        for rationale in summary.samples[kind]
    ]
    html = environment.get_template("page.html.jinja").render(
        report=report, meanings=FLAGS, samples=samples, name=data.name
    )
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    for name, content in (("report.json", text), ("rationales.html", html)):
        write_whole(folder / name, content)
    return folder / "rationales.html"


def _shown(
    rationale: Rationale, data: InteractionData, user: int, history_length: int
) -> dict[str, Any]:
    items, titles = data.history(user), data.catalog.titles
    target = int(items[rationale.cut])
    return {
        "history": [titles[i] for i in items[: rationale.cut][-history_length:]],
        "target": titles[target],
        "categories": data.catalog.categories[target].replace("|", ", "),
        "text": rationale.rationale,
        "flags": rationale.flags,
        "logprob": rationale.logprob,
        "popularity": int(data.train_counts[target]),
    }
