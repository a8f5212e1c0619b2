"""From a prompt to images: the reverse process in latents, and the inputs that it takes."""
