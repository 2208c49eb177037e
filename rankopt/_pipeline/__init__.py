"""The stages of `rankopt.compress`."""
