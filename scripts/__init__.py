"""What is run from a checkout: `python -m scripts.FOLDER.NAME`. The wheel has none of it."""
