"""What happened to the rows on their way: each step, how many rows it dropped, what was left."""

from collections.abc import Iterable
from dataclasses import dataclass, field

# How many dropped rows are shown as examples.
EXAMPLES = 5


def counted(count: int, noun: str) -> str:
    """`1 line`, `1,234 lines`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


@dataclass(frozen=True)
class Step:
    """One line of the printout.

    Attributes:
        text: What was done.
        dropped: Rows that went.
        left: Rows that stayed.
        examples: Where the first dropped rows stood, and what they said.
    """

    text: str
    dropped: int
    left: int
    examples: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """Steps over the interactions, and remarks about anything else, in the order they happened.

    Attributes:
        steps: Every step that changed the number of interactions.
        notes: One sentence each.
        rows: Interactions that the source holds, damaged ones included.
        damaged: Those of them that had to be dropped because they cannot be used.
    """

    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    damaged: int = 0

    def read(self, text: str, rows: int) -> None:
        """The first step: what the source holds."""
        self.rows = rows
        self.steps.append(Step(text, 0, rows))

    def drop(self, text: str, count: int, examples: Iterable[str] = ()) -> None:
        """A step that somebody asked for. Without rows to drop it is listed too."""
        self.steps.append(Step(text, count, self.left - count, list(examples)[:EXAMPLES]))

    def damage(self, text: str, count: int, examples: Iterable[str] = ()) -> None:
        """Rows that cannot be used; nothing is listed if there are none."""
        if count:
            self.damaged += count
            self.drop(text, count, examples)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def left(self) -> int:
        return self.steps[-1].left if self.steps else 0

    def damages(self) -> str:
        """What was damaged, as the lines of an error message."""
        lines = []
        for step in self.steps:
            if step.dropped:
                shown = "; ".join(step.examples)
                lines.append(f"  {step.dropped:,} × {step.text}" + (f": {shown}" if shown else ""))
        return "\n".join(lines)

    def table(self) -> str:
        """The steps as aligned columns, examples below their step, then the notes."""
        rows = [("step", "dropped", "left")]
        rows += [
            (step.text, f"{step.dropped:,}" if number else "", f"{step.left:,}")
            for number, step in enumerate(self.steps)
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = []
        for number, (text, dropped, left) in enumerate(rows):
            line = f"{text:<{widths[0]}}  {dropped:>{widths[1]}}  {left:>{widths[2]}}"
            lines.append(line.rstrip())
            if number:
                lines += [f"    {example}" for example in self.steps[number - 1].examples]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def record(self) -> dict:
        """Plain values for prepared.json."""
        return {
            "steps": [
                {"step": step.text, "dropped": step.dropped, "left": step.left}
                for step in self.steps
            ],
            "notes": self.notes,
        }
