"""From a prompt to images: the reverse process in latents, and what can go into it."""
