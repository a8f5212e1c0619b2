"""Images with captions: the built-in shapes, folders of your own images, and file formats."""
