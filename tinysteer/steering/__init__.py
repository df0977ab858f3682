"""What an edit is, where vectors come from and go, and a batch's edits."""
