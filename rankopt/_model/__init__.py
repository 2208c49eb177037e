"""The user's model: its layers, how they are called, what they cost, and running it."""
