"""lm-eval-kvpress: honest evaluation of KV-cache compression.

Importing the package loads nothing: start-up runs it in every interpreter of the environment (`_startup`).
"""

__version__ = "0.1.0"
