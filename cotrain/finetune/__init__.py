"""Training the teacher: ranking, reasoning, reinforcement, and how good it is."""
