"""cotrain: teach a small sequential recommender what a large language model knows, live."""
