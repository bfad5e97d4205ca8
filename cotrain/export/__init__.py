"""A finished run's student in the form that somebody else runs."""
