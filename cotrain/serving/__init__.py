"""The page on which people look at a finished run."""
