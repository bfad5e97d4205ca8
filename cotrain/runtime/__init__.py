"""What a run needs around the loop: checkpoints, tracking, seeds, interruption."""
