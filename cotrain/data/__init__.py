"""From tables of interactions and items to what the student and the teacher read."""
