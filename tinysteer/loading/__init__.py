"""From a folder or the Hugging Face Hub to weights in memory; what differs between families."""
