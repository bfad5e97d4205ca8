"""Where student and teacher meet: losses, alignment, the co-training loop, a whole run."""
