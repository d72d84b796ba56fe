"""Says what a GPU will hold of a checkpoint, before anything is built."""
