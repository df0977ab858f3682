"""What a newcomer sees first: the paper in miniature on the embedded models."""
