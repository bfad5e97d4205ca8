"""Readers of raw data sets as their publishers ship them, each to the one form of `raw.RawData`."""

from cotrain.data.readers import amazon, movielens, recbole, tabular
from cotrain.data.readers.raw import Reader

READERS: dict[str, Reader] = {
    "movielens": movielens.read,
    "amazon": amazon.read,
    "recbole": recbole.read,
    "tables": tabular.read,
}
