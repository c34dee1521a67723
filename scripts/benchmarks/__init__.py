"""How fast and how large: this package, its presses and its peers."""
