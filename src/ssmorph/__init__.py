"""ssmorph turns a pretrained transformer into a Mamba-2 hybrid, in stages you can stop and resume.

From Python the commands are the functions of `ssmorph.verbs`; `import ssmorph.hf` lets transformers load hybrids. Both
import torch and transformers when they need them.
"""

__version__ = "0.1.0"
