"""What a newcomer sees first: steering at work on an embedded model, in seconds."""
