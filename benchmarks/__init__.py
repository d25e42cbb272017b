"""What a save costs training, beside the peers and beside the raw disk, measured in one run."""
