"""The items of a run: index -> raw id, title and categories.

The index is what models compute with (0 is padding, items are 1..V-1); the raw id is what the
user's tables call the item. Both are kept apart everywhere, and this is the only place that maps
one to the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from cotrain.errors import DataError

FILE = "items.parquet"
_COLUMNS = ["index", "item_id", "title", "categories"]


@dataclass(frozen=True)
class Catalog:
    """Items by index; index 0 is padding in each list.

    Attributes:
        item_ids: Raw ids, all int or all str, (V,); None at index 0.
        titles: (V,); the id as text where the tables give no title; "" at index 0.
        categories: Joined by a bar, "" where there are none, (V,).
    """

    item_ids: list[Any]
    titles: list[str]
    categories: list[str]

    def __len__(self) -> int:
        """V: items and the padding."""
        return len(self.item_ids)

    def title(self, index: int) -> str:
        """Title of an item, as the tables have it.

        Raises:
            IndexError: The index is none of 1..V-1.
        """
        if not 1 <= index < len(self):
            raise IndexError(f"item index {index} is outside 1..{len(self) - 1}")
        return self.titles[index]

    def save(self, folder: Path) -> None:
        """Writes `items.parquet` (index, item_id, title, categories; no padding row)."""
        folder.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(
            {
                "index": range(1, len(self)),
                "item_id": self.item_ids[1:],
                "title": self.titles[1:],
                "categories": self.categories[1:],
            },
            # A catalogue without items has nothing to infer the text columns from.
            schema_overrides={"title": pl.String, "categories": pl.String},
        ).write_parquet(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "Catalog":
        """Reads what `save` wrote.

        Raises:
            DataError: The file is missing, unreadable, or no saved catalogue.
        """
        path = folder / FILE
        remedy = "Give the folder that a finished run wrote its student to."
        if not path.is_file():
            raise DataError(f"There is no catalogue {path}. {remedy}")
        try:
            table = pl.read_parquet(path)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}. {remedy}") from error
        if table.columns != _COLUMNS or table["index"].to_list() != list(
            range(1, table.height + 1)
        ):
            raise DataError(
                f"{path} is not a saved catalogue: it has the columns {table.columns} and "
                f"{table.height} rows; expected {_COLUMNS} with index 1, 2, … {remedy}"
            )
        return cls(
            item_ids=[None, *table["item_id"].to_list()],
            titles=["", *table["title"].to_list()],
            categories=["", *table["categories"].to_list()],
        )
