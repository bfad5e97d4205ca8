"""Several ways of teaching the same student, on equal terms: who runs, what is told apart."""
