"""ssmorph turns a pretrained transformer into a Mamba-2 hybrid, in stages you can stop and resume."""

__version__ = "0.1.0"
