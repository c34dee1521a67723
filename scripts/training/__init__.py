"""How the built-in checkpoint was trained and is evaluated."""
