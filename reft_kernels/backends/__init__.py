"""The implementations of the edit, and the choice among them."""
