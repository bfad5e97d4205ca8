"""How good a recommender is, whether a difference is real, and the page that says so."""
