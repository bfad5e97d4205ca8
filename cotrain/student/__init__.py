"""The student: a small sequential recommender, its losses and its retrieval."""
