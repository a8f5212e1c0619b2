"""Models on disk: safetensors files, folders of diffusers, single files of the original."""
