"""Images with captions: the embedded shapes, folders of your own images, and file formats."""
